"""What stands beside a figure: budgets, intervals, what is left out and why; and its numbers."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.experts import ExpertsPoint, ExpertsStudy
from analysis.figures import AXIS_LABELS, interval
from analysis.isoflop import IsoflopFit, PowerLaw
from analysis.laws import power_law
from analysis.load import display_name, excluded, usable
from analysis.usage_growth import Growth
from peer_scaling.record import budget_label

NORMS = ("batch", "layer", "none")
DRAWN = ["kind", "variant", "budget", "run_id", "num_params", "loss", "low", "high", "reason"]
SCALING = ["kind", "variant", "of", "budget", "value", "low", "high"]


def isoflop_caption(fit: IsoflopFit, frame: pd.DataFrame) -> str:
    """Of the figure of loss against parameters, in Markdown."""
    levels = sorted({f"{100 * p.level:g} %" for p in fit.profiles})
    parts = [
        f"Validation loss in nats per token against {AXIS_LABELS[fit.axis]}, one panel per budget: "
        f"{_budgets(fit)} training FLOPs. Points are runs, {len(usable(frame))} of {len(frame)}; "
        "hollow ones are excluded, ringed ones are not in the fit of their curve. Lines are fitted "
        "curves, thin where there is no minimum; stars are minima. Horizontal bars are "
        f"{' and '.join(levels)} intervals of N*, vertical ones 95 % intervals of L*: from the "
        "spread of the seeds, or the scatter of the sizes around the curve where that is larger or "
        "there is one seed.",
        "Curves without a minimum:",
        _list(refusal_lines(fit)),
        "Excluded runs, and runs that are left out of a fit:",
        _list(exclusion_lines(frame, fit)),
    ]
    return "\n\n".join(parts)


def scaling_caption(fit: IsoflopFit, frame: pd.DataFrame) -> str:
    """Of the figure of N*, D* and L* against the budget, in Markdown."""
    laws = [
        f"- {display_name(law.variant, frame)}: {law.of}* ~ C^{law.exponent:.4f} +- "
        f"{law.exponent_margin:.4f} ({law.num_budgets} budgets); {held_out_text(law)}"
        for law in fit.laws
    ]
    parts = [
        f"N* ({AXIS_LABELS[fit.axis]}), D* (tokens) and L* (nats per token) against training FLOPs "
        f"at {_budgets(fit)}. Points are minima of the curves with their 95 % intervals, "
        "lines the power laws through them, "
        "over the budgets that have a minimum. Intervals of the exponents are 95 %, from Student's "
        "t, of the errors of the minima and their scatter around the line; with two budgets there "
        "is none.",
        _list(laws),
        "Budgets that are no points, because their curve has no minimum:",
        _list(refusal_lines(fit)),
        "Excluded runs, and runs that are left out of a fit:",
        _list(exclusion_lines(frame, fit)),
    ]
    return "\n\n".join(parts)


def num_experts_caption(study: ExpertsStudy, budget: float, frame: pd.DataFrame) -> str:
    """Of the figure of loss against the number of experts, in Markdown."""
    points = [point for norm in NORMS for point in study.with_experts(budget, norm)]
    start = "Validation loss in nats per token against the number of experts N, a line per norm of "
    dense = [
        f"The dashed line is dense at its best size, {d.size}: {d.loss:.4f}, {d.num_seeds} run(s)."
        for d in study.dense
        if d.budget == budget
    ]
    return _experts_caption(study, budget, frame, points, [f"{start}the query", *dense])


def num_heads_caption(study: ExpertsStudy, budget: float, frame: pd.DataFrame) -> str:
    """Of the figure of loss against the number of heads, in Markdown."""
    points = [point for line in study.with_heads(budget).values() for point in line]
    start = "Validation loss in nats per token against the number of heads h, a line per number of "
    return _experts_caption(study, budget, frame, points, [f"{start}active experts h k"])


def _experts_caption(
    study: ExpertsStudy,
    budget: float,
    frame: pd.DataFrame,
    points: list[ExpertsPoint],
    told: list[str],
) -> str:
    start, *rest = told
    here = [point for point in study.points if point.budget == budget]
    others = [point for point in here if point not in points]
    parts = [
        f"{start}, at {budget_label(budget)} training FLOPs. A point is one setting of the layer "
        f"at the best of its trained sizes, the mean of its seeds; {len(points)} of {len(here)} "
        f"settings of the budget, from {len(usable(frame))} of {len(frame)} runs. "
        + " ".join([_bars(points), *rest]),
        "Points:",
        _list([_point_line(point) for point in points]),
        "Settings of the budget that are no points, because they differ from these in more:",
        _list([_point_line(point) for point in others]),
        "Excluded runs:",
        _list(_excluded_lines(frame)),
    ]
    return "\n\n".join(parts)


def _bars(points: list[ExpertsPoint]) -> str:
    if not all(np.isfinite(point.margin) for point in points):
        return "There are no intervals: no setting has two seeds."
    return (
        "Bars are 95 % intervals: Student's t, with one variance between seeds for all settings "
        "and sizes of the budget."
    )


def _point_line(p: ExpertsPoint) -> str:
    margin = f" +- {p.margin:.4f}" if np.isfinite(p.margin) else ""
    return (
        f"- N {p.num_experts:,}, h {p.num_heads}, k {p.experts_per_head}, query norm "
        f"{p.query_norm}: {p.loss:.4f}{margin}; {p.size} of {', '.join(p.sizes)}; "
        f"{p.num_seeds} run(s)"
    )


def usage_growth_caption(
    study: ExpertsStudy, budget: float, frame: pd.DataFrame, shown: Sequence[Growth]
) -> str:
    """Of the figure of the share of experts over validation tokens, in Markdown."""
    drawn = [growth.point for growth in shown]
    others = [p for p in study.points if p.budget == budget and p not in drawn]
    lines = [f"{_point_line(g.point)}, {g.num_runs} of them with its growth" for g in shown]
    parts = [
        "Share of the experts that any of the first so many validation tokens reads, at "
        f"{budget_label(budget)} training FLOPs. A line is one setting of the layer at the best of "
        "its trained sizes, the mean of its runs; the band is their range.",
        "Lines:",
        _list(lines),
        "Settings of the budget that are no lines, because they differ from these in more, or no "
        "run of them has its growth:",
        _list([_point_line(point) for point in others]),
        "Excluded runs:",
        _list(_excluded_lines(frame)),
    ]
    return "\n\n".join(parts)


def refusal_lines(fit: IsoflopFit) -> list[str]:
    """A line per curve without a minimum."""
    return [
        f"- {p.variant} at {budget_label(p.budget)}: {p.status} ({p.num_sizes} sizes, lowest "
        f"{p.best_loss:.4f} at {p.best_size}): {p.reason}"
        for p in fit.profiles
        if not p.ok
    ]


def exclusion_lines(frame: pd.DataFrame, fit: IsoflopFit) -> list[str]:
    """A line per run that is excluded, or not in the fit of its curve."""
    left_out = [far for profile in fit.profiles for far in profile.left_out]
    return _excluded_lines(frame) + [f"- {far.run}: {far.reason}" for far in left_out]


def _excluded_lines(frame: pd.DataFrame) -> list[str]:
    left = excluded(frame)
    return [f"- {run}: {why}" for run, why in zip(left["run_id"], left["excluded"], strict=True)]


def held_out_text(law: PowerLaw) -> str:
    """The errors of a law at budgets that it was not fitted to."""
    if np.isnan(law.left_out_error):
        return "held-out error: needs >= 3 budgets"
    return (
        f"error by leaving out one budget {100 * law.left_out_error:.2f} %, at the largest from "
        f"the others {100 * law.largest_error:+.2f} %"
    )


def isoflop_data(fit: IsoflopFit, frame: pd.DataFrame) -> pd.DataFrame:
    """Every point of the figure, of `kind` run, excluded, left out, curve or minimum; `low` and
    `high` are the interval of N*, `reason` says why a point does not count.
    """
    seen = frame["variant"].isin(fit.variants) & frame["budget"].isin(fit.budgets)
    runs = frame.loc[seen & frame["loss"].notna()]
    rows = [
        {
            "kind": "run" if why is None else "excluded",
            "variant": variant,
            "budget": C,
            "run_id": run,
            "num_params": N,
            "loss": L,
            "reason": why,
        }
        for variant, C, run, N, L, why in runs[
            ["variant", "budget", "run_id", fit.axis, "loss", "excluded"]
        ].itertuples(index=False)
    ]
    for p in fit.profiles:
        cell = {"variant": p.variant, "budget": p.budget}
        curve = zip(p.curve_num_params, p.curve_loss, strict=True)
        rows += [{**cell, "kind": "curve", "num_params": N, "loss": L} for N, L in curve]
        rows += [
            {
                **cell,
                "kind": "left out",
                "run_id": far.run,
                "num_params": far.num_params,
                "loss": far.loss,
                "reason": far.reason,
            }
            for far in p.left_out
        ]
        if p.ok:
            ends = {"low": p.num_params_low, "high": p.num_params_high}
            star = {"kind": "minimum", "num_params": p.num_params, "loss": p.loss}
            rows.append({**cell, **star, **ends})
    return pd.DataFrame(rows, columns=DRAWN)


def scaling_data(fit: IsoflopFit) -> pd.DataFrame:
    """Every point of the figure: minima, and the laws at the same budgets."""
    rows = []
    for variant in fit.variants:
        optima = fit.optima(variant)
        for p in optima:
            values = {"N": p.num_params, "D": p.tokens, "L": p.loss}
            cell = {"kind": "minimum", "variant": variant, "budget": p.budget}
            for of, value in values.items():
                low, high = interval(p, of)
                rows.append({**cell, "of": of, "value": value, "low": low, "high": high})
        C = np.array([p.budget for p in optima])
        for law in (law for law in fit.laws if law.variant == variant):
            line = power_law(law.log_coefficient, law.exponent, C)
            cell = {"kind": "law", "variant": variant, "of": law.of}
            rows += [{**cell, "budget": c, "value": y} for c, y in zip(C, line, strict=True)]
    return pd.DataFrame(rows, columns=SCALING)


def _budgets(fit: IsoflopFit) -> str:
    return ", ".join(budget_label(C) for C in fit.budgets)


def _list(lines: list[str]) -> str:
    return "\n".join(lines) or "None."
