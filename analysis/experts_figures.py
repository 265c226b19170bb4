"""Figures 3a and 3b of He 2024 (2407.04153) from frozen results: nothing is fitted here."""

from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.experts import ExpertsPoint, ExpertsStudy
from analysis.figures import LOOKS, SPARE_LOOKS, STYLE, count_label, legend_above
from analysis.usage_growth import Growth
from peer_scaling.record import budget_label

NORM_DASHES = {"batch": "-", "layer": ":", "none": "--"}
NORMS = {"batch": LOOKS["peer"], "layer": LOOKS["pkm"], "none": LOOKS["moe"]}
LINES = (*LOOKS.values(), *SPARE_LOOKS)


def plot_num_experts(study: ExpertsStudy, budget: float) -> Figure:
    """Figure 3a: loss against the number of experts, a line per norm of the query, and dense."""
    with style.context(STYLE):
        figure = Figure((5.2, 3.6))
        ax = figure.subplots()
        for norm, look in NORMS.items():
            points = study.with_experts(budget, norm)
            if points:
                label = f"PEER, query norm {norm}"
                _line(ax, [p.num_experts for p in points], points, look.colour, look.marker, label)
        for dense in study.dense:
            if dense.budget == budget:
                ax.axhline(dense.loss, color=LOOKS["dense"].colour, lw=1, ls="--", label="dense")
        numbers = sorted({p.num_experts for p in study.points if p.budget == budget})
        _finish(ax, numbers, "number of experts N", budget)
    return figure


def plot_num_heads(study: ExpertsStudy, budget: float) -> Figure:
    """Figure 3b: loss against the number of heads h, a line per number of active experts h k."""
    with style.context(STYLE):
        figure = Figure((5.2, 3.6))
        ax = figure.subplots()
        lines = study.with_heads(budget)
        for (active, points), look in zip(lines.items(), LINES, strict=False):
            heads = [p.num_heads for p in points]
            _line(ax, heads, points, look.colour, look.marker, f"h k = {active}")
        numbers = sorted({p.num_heads for points in lines.values() for p in points})
        _finish(ax, numbers, "heads h", budget)
    return figure


def plot_usage_growth(growths: Sequence[Growth], budget: float) -> Figure:
    """Share of the experts read over validation tokens, a line per number of experts and norm of
    the query; bands are the range of the runs.
    """
    numbers = sorted({growth.point.num_experts for growth in growths})
    colours = {n: LINES[i % len(LINES)].colour for i, n in enumerate(numbers)}
    several = len({growth.point.query_norm for growth in growths}) > 1
    with style.context(STYLE):
        figure = Figure((5.2, 4.0))
        ax = figure.subplots()
        for growth in growths:
            point, colour = growth.point, colours[growth.point.num_experts]
            norm = f", query norm {point.query_norm}" if several else ""
            ax.plot(
                growth.tokens, growth.share, color=colour, marker="o", markersize=3,
                ls=NORM_DASHES.get(point.query_norm, "-"),
                label=f"{point.num_experts:,} experts{norm}",
            )  # fmt: skip
            ax.fill_between(growth.tokens, growth.least, growth.most, color=colour, alpha=0.15)
        ax.set(xscale="log", ylim=(0, 1.05), xlabel="validation tokens")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: count_label(tokens)))
        ax.set_ylabel("share of the experts read")
        heads = {(g.point.num_heads, g.point.experts_per_head) for g in growths}
        told = ", ".join(f"h {h}, k {k}" for h, k in sorted(heads))
        ax.set_title(f"{budget_label(budget)} training FLOPs, {told}")
        legend_above(figure, *ax.get_legend_handles_labels())
    return figure


def _line(
    ax: Axes, x: list[int], points: list[ExpertsPoint], colour: str, marker: str, label: str
) -> None:
    margins = np.array([p.margin for p in points])
    bars = margins if np.isfinite(margins).all() else None
    ax.errorbar(
        x, [p.loss for p in points], yerr=bars, color=colour, marker=marker, markersize=4,
        elinewidth=0.8, capsize=2, label=label,
    )  # fmt: skip


def _finish(ax: Axes, numbers: list[int], label: str, budget: float) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(numbers))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: count_label(number)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label)
    ax.set_ylabel("validation loss (nats per token)")
    ax.set_title(f"{budget_label(budget)} training FLOPs")
    ax.legend(fontsize=8)
