"""What a point of the curves says: the run behind it, or the minimum."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures import count_label, interval
from analysis.html_table import NOT_RECORDED
from analysis.profile import Profile
from analysis.study_report import StudyReport
from peer_scaling.record import budget_label

BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
SECOND_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def seconds_label(seconds: float) -> str:
    """2.46 s, 31.2 min, 42 h: a time to three digits."""
    if not np.isfinite(seconds):
        return NOT_RECORDED
    for unit, name in SECOND_UNITS:
        if seconds >= 10 * unit:  # few units, so that times can be compared at a glance
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"


def bytes_label(count: float) -> str:
    """411.8 MiB: bytes to a tenth of a unit."""
    if not np.isfinite(count):
        return NOT_RECORDED
    for unit, name in BYTE_UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.4g} B"


def excluded_why(report: StudyReport, row: Mapping[str, Any]) -> str:
    """Why a run does not count; empty if it does."""
    if isinstance(row["excluded"], str):
        return f"excluded: {row['excluded']}"
    profile = report.fit.profile(row["variant"], row["budget"])
    far = [run for run in profile.left_out if run.run == row["run_id"]] if profile else []
    return f"not in the fit: {far[0].reason}" if far else ""


def run_text(report: StudyReport, row: Mapping[str, Any], why: str) -> str:
    """Everything about a run, a line for each kind of thing."""
    total, active = row["num_params_total"], row["num_params_active"]
    folder = report.records.folders.get(row["run_id"], NOT_RECORDED)
    lines = [
        str(row["run_id"]),
        f"{row['variant']}, size {row['size']}, seed {_text(row['seed'])}, "
        f"{budget_label(row['budget'])} FLOPs",
        f"parameters: {_count(total)} total, {_count(active)} active",
        f"tokens: {_count(row['tokens'])}",
        f"loss: {row['loss']:.4f} nats per token, perplexity {_perplexity(row['loss'])}",
        f"learning rate: {_number(row['lr'])}",
        f"training {seconds_label(row['train_seconds'])}, "
        f"whole run {seconds_label(row['wall_seconds'])}",
        f"peak memory: {bytes_label(row['peak_memory_bytes'])}",
        f"folder: {folder}",
        why,
    ]
    return "\n".join(filter(None, lines))


def minimum_text(profile: Profile) -> str:
    """The minimum of a curve with its intervals."""
    low, high = interval(profile, "N")
    return "\n".join(
        [
            f"minimum of {profile.variant} at {budget_label(profile.budget)} FLOPs",
            f"N* {_count(profile.num_params)} ({100 * profile.level:g} %: {_count(low)} to "
            f"{_count(high)})",
            f"D* {_count(profile.tokens)} tokens",
            f"L* {profile.loss:.4f} +- {profile.loss_margin:.4f} nats per token, perplexity "
            f"{np.exp(profile.loss):.4g}",
            f"{profile.shape} through {profile.num_sizes} sizes, {profile.num_runs} runs",
        ]
    )


def _count(count: float) -> str:
    return count_label(count) if np.isfinite(count) else NOT_RECORDED


def _number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else NOT_RECORDED


def _perplexity(loss: float) -> str:
    return f"{np.exp(loss):.4g}"


def _text(value: object) -> str:
    return NOT_RECORDED if value is None or value is pd.NA or value != value else f"{value}"
