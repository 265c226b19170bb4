"""From record folders to one tidy frame, one row per run, nothing dropped.

A row that an analysis must not use keeps its place and says why in `excluded`; `usable` selects the
others. Counts and FLOPs are float64, because 6 N D overflows int64 at 9.2e18 without a warning.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peer_scaling.record import RecordError, RunRecord, find_records, read_record

NUMERIC = (
    "budget", "flops", "num_params_total", "num_params_active", "num_params_embedding",
    "num_params_lookup", "tokens", "steps", "epochs", "loss", "perplexity", "bits_per_byte",
    "val_tokens", "lr", "wall_seconds", "train_seconds", "tokens_per_second", "flops_per_second",
    "peak_memory_bytes", "bytes_per_token", "expert_usage", "expert_unevenness", "train_loss",
)  # fmt: skip
LABELS = (
    "run_id", "study", "variant", "ffw", "size", "seed", "status", "reason", "causal", "protocol",
    "finished_at",
)  # fmt: skip
NEEDED = ("variant", "budget", "num_params_total", "tokens", "loss")
MAX_LOSS = 700.0
"""Nats: above it, the perplexity is no finite number."""
MAX_VALUE = 1e60
"""FLOPs, tokens, parameters: above it, products of them are no finite numbers."""
CELL = ["variant", "size", "budget", "seed"]


class AnalysisError(ValueError):
    """No answer is possible; the message says with what value, why, and what to do next."""


def load_runs(source: str | Path) -> pd.DataFrame:
    """Every run below a folder.

    Args:
        source: a study's folder, a folder of studies, or one run's folder.

    Returns:
        One row per `record.json`: `LABELS` and `NUMERIC` as in `peer_scaling.record.RunRecord`, and
        `excluded`, None or the reason why the row must not be used. A file that is not a record is
        a row with a reason.

    Raises:
        AnalysisError: no such folder, or no record in it.
    """
    root = Path(source)
    if not root.is_dir():
        raise AnalysisError(
            f"{source}: no such folder; give a study's folder, as runs/isoflop_laptop"
        )
    rows = [_row(path) for path in find_records(root)]
    if not rows:
        raise AnalysisError(f"{source}: no record.json below it; train something first")
    frame = pd.DataFrame(rows, columns=[*LABELS, *NUMERIC, "ffw_settings", "excluded"])
    frame[list(NUMERIC)] = frame[list(NUMERIC)].astype("float64")
    for rule in (_other_protocol, _other_settings, _repeated):
        rule(frame)
    return frame.drop(columns="ffw_settings")


def usable(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that are not excluded."""
    return frame.loc[frame["excluded"].isna()]


def excluded(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that are, with run and reason."""
    return frame.loc[frame["excluded"].notna(), ["run_id", "variant", "size", "budget", "excluded"]]


def not_causal(frame: pd.DataFrame) -> set[str]:
    """The variants whose loss is that of a layer that sees later tokens."""
    return set(frame.loc[frame["causal"].isin([False]), "variant"])


def _row(path: Path) -> dict[str, Any]:
    try:
        record = read_record(path)
    except RecordError as error:
        return {"run_id": path.parent.name, "excluded": str(error)}
    row = {name: value for name, value in asdict(record).items() if name in (*LABELS, *NUMERIC)}
    own = record.config.get("ffw")
    settings = repr(sorted(own.items()) if isinstance(own, Mapping) else own)
    return {**row, "ffw_settings": settings, "excluded": _own_reason(record)}


def _own_reason(record: RunRecord) -> str | None:
    if record.status != "done":
        return f"{record.status}: {record.reason}"
    missing = [
        n for n in ("loss", "flops", "tokens", "num_params_total") if getattr(record, n) is None
    ]
    if missing:
        return f"no {', '.join(missing)}"
    names = ("budget", "flops", "tokens", "num_params_total", "loss")
    values = {name: getattr(record, name) for name in names}
    wrong = [f"{name}={value:g}" for name, value in values.items() if not 0 < value < MAX_VALUE]
    if record.loss and record.loss > MAX_LOSS:
        wrong.append(f"loss={record.loss:g}")
    return f"impossible: {', '.join(wrong)}" if wrong else None


def _other_protocol(frame: pd.DataFrame) -> None:
    """Exclude runs with other data, optimiser or backbone choices than the latest of the study."""
    for study, group in usable(frame).groupby("study"):
        _keep_latest(frame, group, "protocol", f"other data, optimiser or backbone than {study}'s")


def _other_settings(frame: pd.DataFrame) -> None:
    """Exclude runs whose variant has other numbers than the latest of the same label."""
    for _, group in usable(frame).groupby(["study", "variant"]):
        variant = group["variant"].iloc[0]
        _keep_latest(frame, group, "ffw_settings", f"other settings of {variant} than its")


def _keep_latest(frame: pd.DataFrame, group: pd.DataFrame, column: str, what: str) -> None:
    latest = frame.loc[_latest(group)]
    others = group.index[group[column] != latest[column]]
    frame.loc[others, "excluded"] = (
        f"{what} latest run {latest['run_id']}: give them their own study"
    )


def _latest(group: pd.DataFrame) -> Any:
    """Index of the run that ended last."""
    return group.sort_values("finished_at", na_position="first").index[-1]


def _repeated(frame: pd.DataFrame) -> None:
    """Exclude all but the latest of several runs of one cell."""
    for _, group in usable(frame).groupby(["study", *CELL]):
        latest = _latest(group)
        older = group.index.drop(latest)
        frame.loc[older, "excluded"] = f"superseded by {frame.loc[latest, 'run_id']}"


def as_frame(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A frame like `load_runs`'s from runs that have no record files.

    Args:
        rows: with at least `variant`, `budget`, `num_params_total`, `tokens` and `loss`. Without
            `size`, runs of equal N are of one size; without `study`, all are of one.

    Raises:
        AnalysisError: one of those is missing.
    """
    frame = rows.copy() if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    missing = [name for name in NEEDED if name not in frame]
    if missing:
        raise AnalysisError(f"runs without {', '.join(missing)}: every run needs these columns")
    for name in (*LABELS, *NUMERIC, "excluded"):
        if name not in frame:
            frame[name] = None
    frame[list(NUMERIC)] = frame[list(NUMERIC)].astype("float64")
    by_count = frame["num_params_total"].map("{:.6g}".format)
    frame["size"] = frame["size"].where(frame["size"].notna(), by_count)
    frame["study"] = frame["study"].where(frame["study"].notna(), "unnamed")
    numbers = frame[list(NEEDED[1:])]
    wrong = ~(np.isfinite(numbers) & (numbers > 0)).all(axis=1) & frame["excluded"].isna()
    frame.loc[wrong, "excluded"] = f"not all of {', '.join(NEEDED[1:])} are positive numbers"
    return frame
