"""Figures from frozen results: nothing is fitted here, and no file is written.

Colours are Okabe and Ito's (2008), each with a marker and a dash pattern of its own, so that a
figure can be read without colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike

from analysis.fitting import student_quantile
from analysis.isoflop import IsoflopFit
from analysis.laws import power_law
from analysis.load import display_name, usable
from analysis.profile import Profile
from peer_scaling.record import budget_label

STYLE = Path(__file__).with_name("style.mplstyle")
AXIS_LABELS = {"num_params_total": "total parameters N", "num_params_active": "active parameters N"}
MAX_COLUMNS = 3
COLUMN_INCHES, ROW_INCHES = 4.2, 3.3
CHARACTERS_PER_INCH = 15
"""Of a legend's text, on average."""
HANDLE_CHARACTERS = 6
"""Room of a legend's line and the gap beside it."""
LEGEND_CHARACTERS = 110


@dataclass(frozen=True)
class Look:
    """How a variant is drawn."""

    colour: str
    marker: str
    dashes: tuple[float, ...]


LOOKS = {
    "dense": Look("#000000", "o", ()),
    "moe": Look("#D55E00", "s", (5, 1.5)),
    "pkm": Look("#009E73", "^", (1.5, 1.5)),
    "peer": Look("#0072B2", "D", (6, 1.5, 1.5, 1.5)),
}
SPARE_LOOKS = (
    Look("#CC79A7", "v", (3, 1)),
    Look("#E69F00", "P", (8, 2)),
    Look("#56B4E9", "X", (2, 2)),
    Look("#8A8A00", "*", (4, 1, 1, 1, 1, 1)),
)


def looks(variants: Sequence[str]) -> dict[str, Look]:
    """A look for each variant: the four's own, spare ones in turn for other labels."""
    others = [variant for variant in variants if variant not in LOOKS]
    spare = {v: SPARE_LOOKS[i % len(SPARE_LOOKS)] for i, v in enumerate(others)}
    return {variant: LOOKS.get(variant) or spare[variant] for variant in variants}


def plot_isoflop(fit: IsoflopFit, frame: pd.DataFrame) -> Figure:
    """Loss and perplexity against parameters, one panel per budget.

    Points are runs (hollow if excluded, in a larger outline if the profile's other sizes contradict
    them), lines the fitted curves, stars the minima with their 95 % intervals. A curve without a
    minimum is drawn thin, and its status stands in the legend.
    """
    with style.context(STYLE):
        # Three in a row, but four as two by two.
        columns = 2 if len(fit.budgets) == 4 else min(MAX_COLUMNS, len(fit.budgets))
        rows = -(-len(fit.budgets) // columns)
        size = (COLUMN_INCHES * columns, ROW_INCHES * rows + 0.5)
        figure = Figure(size)
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax, budget in zip(axes.flat, fit.budgets, strict=False):
            _panel(ax, fit, frame, budget)
        for ax in axes.flat[len(fit.budgets) :]:
            ax.set_visible(False)
        _shared_legend(figure, fit, frame)
    return figure


def plot_scaling(fit: IsoflopFit, frame: pd.DataFrame) -> Figure:
    """N*, D* and L* of every variant against the budget, with the power laws through them."""
    labels = {
        "N": AXIS_LABELS[fit.axis] + "*",
        "D": "training tokens D*",
        "L": "loss L* (nats per token)",
    }
    with style.context(STYLE):
        figure = Figure((3.3 * 3, 3.4))
        axes = figure.subplots(1, 3)
        if not any(profile.ok for profile in fit.profiles):
            figure.suptitle("no curve of this study has a minimum")
            return figure
        for ax, (of, label) in zip(axes, labels.items(), strict=True):
            for variant, look in looks(fit.variants).items():
                _scaling_line(ax, fit, variant, of, look, display_name(variant, frame))
            ax.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel=label)
            _budget_ticks(ax, fit.budgets)
            if of != "L":
                _count_ticks(ax.yaxis)
        _loss_ticks(axes[2])
        legend_above(figure, *axes[0].get_legend_handles_labels())
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, without dates, so that equal figures are equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with style.context(STYLE):  # it holds the salt of the SVG's identifiers
        figure.savefig(paths[0], dpi=150, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def count_label(count: float) -> str:
    """20k, 1.5M, 2G: a count of parameters or tokens, to three digits."""
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{suffix}"
    return f"{count:.3g}"


def _count_ticks(axis: Axis) -> None:
    """Few enough to be read beside one another, over a decade and over three."""
    least, most = axis.get_view_interval()
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if most > 10 * least else (1, 1.5, 2, 3, 4.5, 7))
    )
    axis.set_major_formatter(FuncFormatter(lambda count, _: count_label(count)))
    axis.set_minor_formatter(NullFormatter())


def _budget_ticks(ax: Axes, budgets: Sequence[float]) -> None:
    ax.xaxis.set_major_locator(FixedLocator(list(budgets)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda budget, _: budget_label(budget)))
    ax.xaxis.set_minor_locator(NullLocator())


def _loss_ticks(ax: Axes) -> None:
    ax.yaxis.set_major_locator(LogLocator(subs=[1 + 0.2 * i for i in range(45)]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _panel(ax: Axes, fit: IsoflopFit, frame: pd.DataFrame, budget: float) -> None:
    here = frame.loc[(frame["budget"] == budget) & frame["loss"].notna()]
    for variant, look in looks(fit.variants).items():
        runs = here.loc[here["variant"] == variant]
        kept, left = usable(runs), runs.loc[runs["excluded"].notna()]
        points = {"marker": look.marker, "linestyle": "none", "color": look.colour, "markersize": 4}
        ax.plot(kept[fit.axis], kept["loss"], **points, alpha=0.75)
        ax.plot(left[fit.axis], left["loss"], **points, markerfacecolor="none")
        profile = fit.profile(variant, budget)
        if profile is not None:
            far = profile.left_out
            N, L = [run.num_params for run in far], [run.loss for run in far]
            ax.scatter(N, L, s=64, marker=look.marker, facecolors="none", edgecolors=look.colour)
            _curve(ax, profile, look)
    ax.set_xscale("log")
    _count_ticks(ax.xaxis)
    ax.set_title(f"{budget_label(budget)} training FLOPs")
    ax.set_xlabel(AXIS_LABELS[fit.axis])
    ax.set_ylabel("validation loss (nats per token)")
    right = ax.secondary_yaxis("right", functions=(_exp, _safe_log))
    right.set_ylabel("perplexity")
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))


def _curve(ax: Axes, profile: Profile, look: Look) -> None:
    width = 1.6 if profile.ok else 0.7
    curve = ax.plot(profile.curve_num_params, profile.curve_loss, color=look.colour, lw=width)
    if look.dashes:
        curve[0].set_dashes(look.dashes)
    if not profile.ok:
        return
    ax.errorbar(
        profile.num_params,
        profile.loss,
        xerr=_interval(profile),
        yerr=profile.loss_margin if np.isfinite(profile.loss_margin) else None,
        marker="*",
        markersize=11,
        markeredgecolor="white",
        color=look.colour,
        elinewidth=0.9,
        capsize=2,
        zorder=5,
    )


def _interval(profile: Profile) -> np.ndarray | None:
    if not np.isfinite(profile.num_params_low):
        return None
    low = profile.num_params - profile.num_params_low
    return np.array([[low], [profile.num_params_high - profile.num_params]])


def _shared_legend(figure: Figure, fit: IsoflopFit, frame: pd.DataFrame) -> None:
    handles = []
    for variant, look in looks(fit.variants).items():
        refused = [p for p in fit.profiles if p.variant == variant and not p.ok]
        notes = "".join(f"; {p.status} at {budget_label(p.budget)}" for p in refused)
        label = display_name(variant, frame) + notes
        line = Line2D([], [], color=look.colour, marker=look.marker, markersize=4, label=label)
        if look.dashes:
            line.set_dashes(look.dashes)
        handles.append(line)
    star = {"marker": "*", "linestyle": "none", "color": "#666666", "markersize": 9}
    handles.append(Line2D([], [], **star, label="minimum, 95 % interval"))
    legend_above(figure, handles, [str(handle.get_label()) for handle in handles])


def legend_above(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """In one row if that is short enough to read, in one column if two would not fit."""
    columns = len(labels) if sum(map(len, labels)) < LEGEND_CHARACTERS else 2
    if 2 * (max(map(len, labels), default=0) + HANDLE_CHARACTERS) > (
        CHARACTERS_PER_INCH * figure.get_figwidth()
    ):
        columns = min(columns, 1)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=8)


def _scaling_line(ax: Axes, fit: IsoflopFit, variant: str, of: str, look: Look, name: str) -> None:
    optima = fit.optima(variant)
    C = np.array([p.budget for p in optima])
    values = {"N": [p.num_params for p in optima], "D": [p.tokens for p in optima]}
    points = values.get(of) or [p.loss for p in optima]
    laws = [law for law in fit.laws if (law.variant, law.of) == (variant, of)]
    label = f"{name}, N* ~ C^{laws[0].exponent:.2f}" if laws else name
    ax.plot(C, points, marker=look.marker, linestyle="none", color=look.colour, label=label)
    ends = np.array([interval(p, of) for p in optima]).reshape(-1, 2)
    known = np.isfinite(ends).all(axis=1)
    ax.vlines(C[known], ends[known, 0], ends[known, 1], color=look.colour, lw=0.9)
    for law in laws:
        line = ax.plot(C, power_law(law.log_coefficient, law.exponent, C), color=look.colour)
        if look.dashes:
            line[0].set_dashes(look.dashes)


def interval(profile: Profile, of: str) -> tuple[float, float]:
    """Of N* at the profile's level, of D* and L* at 95 %; NaN where there is none."""
    if of == "N":
        return profile.num_params_low, profile.num_params_high
    if of == "L":
        return profile.loss - profile.loss_margin, profile.loss + profile.loss_margin
    margin = np.exp(student_quantile(profile.dof) * profile.tokens_log_stderr)
    return float(profile.tokens / margin), float(profile.tokens * margin)


def _exp(x: ArrayLike) -> np.ndarray:
    return np.exp(np.asarray(x))


def _safe_log(x: ArrayLike) -> np.ndarray:
    # Matplotlib probes the inverse at values outside the axis.
    return np.log(np.maximum(np.asarray(x), 1e-300))
