"""The isoFLOP report of a study: figures, tables and a summary, in one folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import figures, tables
from analysis.captions import (
    exclusion_lines,
    held_out_text,
    isoflop_caption,
    isoflop_data,
    refusal_lines,
    scaling_caption,
    scaling_data,
)
from analysis.compare import ComputeMultiplier, compute_multiplier
from analysis.isoflop import IsoflopFit, PowerLaw, fit_isoflop
from analysis.leak import EXPLAINED, TITLE, find_leaks, leak_table
from analysis.load import AnalysisError, load_runs, not_causal, usable
from peer_scaling.record import budget_label

NOT_CAUSAL = (
    "(not causal): the layer compares a token with later ones, in training and in evaluation; its "
    "loss is not that of a language model and is shown for reference only."
)
COMPARE = (
    "Whether a gap is a win, every pair of variants, equal wall-clock and memory, and what is "
    "missing: `peer-analyze compare`."
)


@dataclass(frozen=True)
class IsoflopReport:
    """Everything that `peer-analyze isoflop` knows about a study."""

    frame: pd.DataFrame
    fit: IsoflopFit
    multipliers: tuple[ComputeMultiplier, ...]


def analyse(
    source: str | Path, axis: str = "num_params_total", study: str | None = None
) -> IsoflopReport:
    """Load and fit a study; `source` and `study` are `load_runs`'s.

    Raises:
        AnalysisError: nothing there that can be analysed.
    """
    frame = load_runs(source, study)
    if usable(frame).empty:
        why = frame["excluded"].iloc[0]
        raise AnalysisError(
            f"none of {len(frame)} runs is usable, the first because of {why}; "
            f"`peer-analyze load {source}` lists all"
        )
    fit = fit_isoflop(frame, axis)
    return IsoflopReport(frame, fit, tuple(compute_multiplier(fit)))


def write(report: IsoflopReport, folder: Path) -> list[Path]:
    """Write figures, tables, the runs behind them and the summary; the paths written."""
    fit, frame = report.fit, report.frame
    paths = figures.save(figures.plot_isoflop(fit, frame), folder, "isoflop")
    paths += figures.save(figures.plot_scaling(fit, frame), folder, "scaling")
    captions = {"isoflop": isoflop_caption(fit, frame), "scaling": scaling_caption(fit, frame)}
    for name, text in captions.items():
        paths.append(folder / f"{name}.caption.md")
        paths[-1].write_text(text + "\n")
    frames = {
        "isoflop": isoflop_data(fit, frame),
        "scaling": scaling_data(fit),
        "runs": frame,
        "optima": tables.with_causality(tables.optima_table(fit), frame),
        "power_laws": tables.with_causality(tables.laws_table(fit), frame),
        "multipliers": tables.with_causality(tables.multiplier_table(report.multipliers), frame),
    }
    leaks = find_leaks(frame)
    frames |= {"leak": pd.DataFrame(map(vars, leaks))} if leaks else {}
    for name, table in frames.items():
        paths.append(folder / f"{name}.csv")
        table.to_csv(paths[-1], index=False)
    paths += tables.write_table(tables.perplexity_table(fit, frame), folder, "perplexity")
    paths += tables.write_table(tables.expert_use_table(fit, frame), folder, "expert_use")
    paths.append(folder / "summary.md")
    paths[-1].write_text(summary(report) + "\n")
    return paths


def summary(report: IsoflopReport) -> str:
    """What the study shows, in Markdown."""
    fit, frame = report.fit, report.frame
    kept = usable(frame)
    seeds = max(len(set(group["seed"])) for _, group in kept.groupby(["variant", "size", "budget"]))
    parts = [
        f"# IsoFLOP study {', '.join(sorted(kept['study'].unique()))}",
        f"{len(kept)} of {len(frame)} runs used, {seeds} seed(s), N = {fit.axis}.",
        "## Perplexity of the compute-optimal models (minimum of the curve)",
        tables.to_markdown(tables.perplexity_table(fit, frame)),
        *([f"*{NOT_CAUSAL}*"] if not_causal(kept) else []),
        "## Nats below dense at equal FLOPs",
        tables.to_markdown(tables.nats_below_dense(fit, frame)),
        "He 2024, Table 1, C4 (other scale, data and vocabulary; the gap is what can be compared):",
        tables.to_markdown(tables.published_nats_below_dense()),
        *_leak_parts(frame),
        *_expert_use_parts(report),
        "## Compute multiplier (FLOPs that dense needs for the same loss, over the budget)",
        *(
            _multiplier_lines(report.multipliers, frame)
            or ["None: there is no budget at which dense and another variant have minima."]
        ),
        COMPARE,
        "## Power laws over budgets",
        *(_law_lines(fit.laws, frame) or ["None: no variant has minima at two budgets."]),
        "## Curves without a minimum",
        "\n".join(refusal_lines(fit)) or "None.",
        "## Excluded runs",
        "\n".join(exclusion_lines(frame, fit)) or "None.",
        _caveat(seeds, len(fit.budgets)),
    ]
    return "\n\n".join(parts)


def _leak_parts(frame: pd.DataFrame) -> list[str]:
    table = leak_table(frame)
    return [] if table.empty else [f"## {TITLE}", tables.to_markdown(table), EXPLAINED]


def _expert_use_parts(report: IsoflopReport) -> list[str]:
    table = tables.expert_use_table(report.fit, report.frame)
    if table.empty:
        return []
    return [
        "## Use of the experts at the best trained size",
        tables.to_markdown(table),
        "He 2024, Table 2, C4 (PEER, 6e18 FLOPs, 128 experts per token):",
        tables.to_markdown(tables.published_expert_use()),
    ]


def _multiplier_lines(multipliers: Sequence[ComputeMultiplier], frame: pd.DataFrame) -> list[str]:
    lines = []
    for m in multipliers:
        outside = ", extrapolated beyond dense's budgets" if m.extrapolated else ""
        gap = f"{m.nats_below:+.3f} +- {m.nats_margin:.3f} nats"
        times = f"{m.multiplier:.2f}x [{m.low:.2f}, {m.high:.2f}]{outside}"
        if np.isnan(m.multiplier):
            times = "no multiplier, dense's minima do not fall from budget to budget"
        name = tables.display_name(m.variant, frame)
        lines.append(f"- {name} at {budget_label(m.budget)}: {gap}, {times}")
    return ["\n".join(lines)] if lines else []


def _law_lines(laws: Sequence[PowerLaw], frame: pd.DataFrame) -> list[str]:
    lines = [
        f"- {tables.display_name(law.variant, frame)}: {law.of}* ~ C^{law.exponent:+.3f} +- "
        f"{law.exponent_margin:.3f} ({law.num_budgets} budgets); {held_out_text(law)}"
        for law in laws
    ]
    return ["\n".join(lines)] if lines else []


def _caveat(seeds: int, budgets: int) -> str:
    text = (
        "Intervals are 95 %, from the spread of the seeds, or from the scatter of the sizes around "
        "their curve where that is larger or there is one seed; those of power laws from the "
        "errors of the minima and their scatter around the line"
    )
    if seeds < 2:
        text += "; with one seed, gaps within the scatter are not evidence for either variant"
    if budgets < 3:
        text += f"; {budgets} budgets cannot test a power law"
    return text + "."
