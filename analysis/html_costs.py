"""What the runs cost, in FLOPs, in time and in memory, side by side."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from analysis.html_points import bytes_label, seconds_label
from analysis.html_results import budget_cell
from analysis.html_table import NOT_RECORDED, Cell, table
from analysis.load import display_name, usable
from analysis.markup import Html, paragraph, section
from analysis.profile import Profile
from analysis.study_report import StudyReport
from peer_scaling.record import budget_label

BEST = (
    "variant", "budget", "best size", "loss", "FLOPs", "training time", "whole run", "peak memory",
    "FLOPs per s", "device",
)  # fmt: skip
ALL = (
    "variant", "budget", "runs", "of them used", "FLOPs", "training time", "whole runs",
    "largest peak memory",
)  # fmt: skip
EXPLAINED = (
    "Means over the runs of the best trained size. FLOPs are those realised; training time is of "
    "the steps alone, the whole run includes building and evaluation; memory is the device's on a "
    "GPU and that of the process otherwise. Times and memory compare within one device."
)


def costs_section(report: StudyReport) -> Html:
    """Of the best trained size of every curve, and of all runs together."""
    best = [_best(report, p) for p in report.profiles]
    return section(
        "costs",
        "Costs side by side",
        table(BEST, best, "A run of the best trained size"),
        paragraph(EXPLAINED, "quiet"),
        table(ALL, _all(report), "All runs together"),
        paragraph(
            "Sums over all runs that record the number, excluded ones too; of memory the largest. "
            "FLOPs are those of runs that came to their end: what others spent is not recorded.",
            "quiet",
        ),
    )


def _best(report: StudyReport, profile: Profile) -> list[Cell | str]:
    rows = usable(report.frame)
    own = (rows["variant"] == profile.variant) & (rows["budget"] == profile.budget)
    rows = rows.loc[own & (rows["size"] == profile.best_size)]
    devices = sorted({str(device) for device in rows["device"] if pd.notna(device)})
    return [
        display_name(profile.variant, report.frame),
        budget_cell(profile.budget),
        profile.best_size,
        Cell(f"{profile.best_loss:.4f}", profile.best_loss),
        flops_cell(_mean(rows["flops"])),
        seconds_cell(_mean(rows["train_seconds"])),
        seconds_cell(_mean(rows["wall_seconds"])),
        bytes_cell(_mean(rows["peak_memory_bytes"])),
        flops_cell(_mean(rows["flops_per_second"])),
        "; ".join(devices) or NOT_RECORDED,
    ]


def _all(report: StudyReport) -> list[list[Cell | str]]:
    frame = report.frame
    rows = []
    for budget in sorted(set(frame["budget"].dropna())):
        for variant in report.variants:
            own = frame.loc[(frame["variant"] == variant) & (frame["budget"] == budget)]
            if len(own):
                rows.append(_together(report, variant, budget, own))
    return rows


def _together(
    report: StudyReport, variant: str, budget: float, own: pd.DataFrame
) -> list[Cell | str]:
    return [
        display_name(variant, report.frame),
        budget_cell(budget),
        Cell(str(len(own)), len(own)),
        Cell(str(len(usable(own))), len(usable(own))),
        _over(own["flops"].where(own["status"] == "done"), np.sum, flops_cell),
        _over(own["train_seconds"], np.sum, seconds_cell),
        _over(own["wall_seconds"], np.sum, seconds_cell),
        _over(own["peak_memory_bytes"], np.max, bytes_cell),
    ]


def _over(
    values: ArrayLike, of: Callable[[np.ndarray], float], cell: Callable[[float], Cell]
) -> Cell:
    """Of the runs that say, with the number of those that do not."""
    values = np.asarray(values, dtype=float)
    known = values[np.isfinite(values)]
    if not known.size:
        return Cell(NOT_RECORDED)
    found, missing = cell(float(of(known))), len(values) - len(known)
    return Cell(f"{found.content} ({missing} {NOT_RECORDED})", found.value) if missing else found


def _mean(values: ArrayLike) -> float:
    values = np.asarray(values, dtype=float)
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def flops_cell(flops: float) -> Cell:
    """FLOPs, or FLOPs per second, to four digits."""
    if not np.isfinite(flops):
        return Cell(NOT_RECORDED)
    return Cell(budget_label(float(f"{flops:.4g}")), float(flops))


def seconds_cell(seconds: float) -> Cell:
    """A time with its unit, sorted by seconds."""
    return Cell(seconds_label(seconds), float(seconds) if np.isfinite(seconds) else None)


def bytes_cell(count: float) -> Cell:
    """Memory with its unit, sorted by bytes."""
    return Cell(bytes_label(count), float(count) if np.isfinite(count) else None)
