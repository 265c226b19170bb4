"""From wherever runs are to one tidy frame, one row per run, nothing dropped.

A row that an analysis must not use keeps its place and says why in `excluded`; `usable` selects the
others. `schema` has the columns; all numbers are float64.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparable import exclude_incomparable
from analysis.csv_runs import csv_rows
from analysis.records import SETTINGS, record_rows
from analysis.schema import (
    LABELS,
    NEEDED,
    NUMERIC,
    UNNAMED,
    AnalysisError,
    frame_of,
    validate,
)
from analysis.wandb_runs import LOGS, offline_rows, online_rows
from peer_scaling.record import budget_label

__all__ = [
    "AnalysisError",
    "as_frame",
    "display_name",
    "excluded",
    "load_runs",
    "not_causal",
    "routed_name",
    "routings",
    "usable",
]
ONLINE = "wandb:"
OFFLINE = "wandb-offline:"


def load_runs(source: str | Path, study: str | None = None) -> pd.DataFrame:
    """Every run of a source, finished or not.

    Args:
        source: a folder of records (a study's, one of studies, or one run's); a CSV file;
            `wandb:entity/project` for W&B's server; `wandb-offline:FOLDER`, or a folder without
            records, for W&B's offline runs.
        study: only runs of this one, and what cannot be told to be another's.

    Returns:
        One row per run: `schema.COLUMNS`, `excluded` being None or the reason why the row must not
        be used; then a CSV's own columns. What is no run is a row with a reason. The same study
        gives the same frame from each source, to the last digit.

    Raises:
        AnalysisError: nothing there, nothing that can be read, or columns missing.
    """
    rows, extra = _rows(str(source), study)
    frame = frame_of(rows, [SETTINGS, *extra])
    if study:
        frame = frame.loc[frame["study"].isin([study, None])].reset_index(drop=True)
        if frame.empty:
            raise AnalysisError(f"{source}: no run of study {study}")
    exclude_incomparable(frame)
    return frame.drop(columns=SETTINGS)


def _rows(source: str, study: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and the names of columns that are not the schema's."""
    if source.startswith(ONLINE):
        return online_rows(source.removeprefix(ONLINE), study), []
    path = Path(source.removeprefix(OFFLINE))
    if source.startswith(OFFLINE) and path.is_dir():
        return offline_rows(path), []
    if path.is_file():
        return csv_rows(path)
    if not path.is_dir():
        raise AnalysisError(
            f"{source}: no such folder or file; give a study's folder, as runs/isoflop_laptop, a "
            f"CSV file, {ONLINE}entity/project or {OFFLINE}FOLDER"
        )
    rows = record_rows(path)
    if not rows and any(path.rglob(LOGS)):
        rows = offline_rows(path)
    if not rows:
        raise AnalysisError(f"{source}: no record.json below it; train something first")
    return rows, []


def usable(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that are not excluded."""
    return frame.loc[frame["excluded"].isna()]


def excluded(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that are, with run and reason."""
    return frame.loc[frame["excluded"].notna(), ["run_id", "variant", "size", "budget", "excluded"]]


def not_causal(frame: pd.DataFrame) -> set[str]:
    """The variants whose loss is that of a layer that sees later tokens; by the runs that are used,
    if there are any.
    """
    counted = frame["excluded"].isna() | ~frame["variant"].isin(usable(frame)["variant"])
    return set(frame.loc[counted & frame["causal"].isin([False]), "variant"])


def routings(frame: pd.DataFrame) -> dict[str, str]:
    """By variant, of those that were trained with a routing that sees later tokens and are ranked
    by a causal one: which.
    """
    rows = usable(frame)
    rows = rows.loc[rows["routing"].notna()]
    return dict(zip(rows["variant"], rows["routing"], strict=True))


def display_name(variant: str, frame: pd.DataFrame) -> str:
    """The variant, marked if its loss is that of a layer that sees later tokens, or is not with the
    routing of its training.
    """
    return (
        f"{variant} (not causal)" if variant in not_causal(frame) else routed_name(variant, frame)
    )


def routed_name(variant: str, frame: pd.DataFrame) -> str:
    """The variant, marked if its loss is not with the routing of its training."""
    routing = routings(frame).get(variant)
    return f"{variant} ({routing} routing)" if routing else variant


def as_frame(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A frame like `load_runs`'s from runs that are in memory.

    Args:
        rows: with at least `variant`, `budget`, `num_params_total`, `tokens` and `loss`. Without
            `size`, runs of equal N are of one size; without `study`, all are of one.

    Raises:
        AnalysisError: what keeps it from being one, all at once.
    """
    frame = rows.copy() if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    for name in (*LABELS, *NUMERIC, "excluded"):
        if name not in frame and name not in NEEDED:
            frame[name] = None
    if frame.columns.is_unique:
        for name in NUMERIC:
            with suppress(TypeError, ValueError, OverflowError, KeyError):
                frame[name] = frame[name].astype("float64")
    problems = validate(frame)
    if problems:
        raise AnalysisError("\n".join(problems))
    by_count = frame["num_params_total"].map(budget_label)
    frame["size"] = frame["size"].where(frame["size"].notna(), by_count)
    frame["study"] = frame["study"].where(frame["study"].notna(), UNNAMED)
    ended = frame["status"].notna() & (frame["status"] != "done") & frame["excluded"].isna()
    frame.loc[ended, "excluded"] = frame.loc[ended, "status"]
    numbers = frame[list(NEEDED[1:])]
    wrong = ~(np.isfinite(numbers) & (numbers > 0)).all(axis=1) & frame["excluded"].isna()
    frame.loc[wrong, "excluded"] = f"not all of {', '.join(NEEDED[1:])} are positive numbers"
    return frame
