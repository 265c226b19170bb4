"""Runs from W&B: from its server, or from folders of runs that were never uploaded.

Only configurations and summaries are read, never histories, which W&B samples. Our own runs have
their whole record in the summary (`peer_scaling.track.record_summary`); of others, `tidy` takes
what their summary and configuration call by the names in docs/data-format.md.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from analysis.csv_runs import with_both_flops
from analysis.records import record_row, refused_row
from analysis.schema import NAMES, AnalysisError, one_line, tidy
from peer_scaling.record import SUMMARY_KEY, RecordError, RunRecord, parse_record

LOGS = "*.wandb"
"""An offline run's transaction log, in its folder."""
INSPECT = ("-P", "-m", "wandb", "leet", "inspect", "--summary", "--json")
"""W&B's own reader of such a log, for Python: `wandb.sdk.internal.datastore` is gone since 0.30.
-P, so that no `wandb.py` of the current folder is run."""
INSPECT_SECONDS = 120.0
API_SECONDS = 20
DONE = {"finished": "done"}
"""W&B's states that mean a run's `done`."""


@dataclass(frozen=True)
class WandbRun:
    """What W&B knows of a run, from wherever it is stored."""

    run_id: str
    study: str | None
    state: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    where: str
    """For messages."""


def online_rows(path: str, study: str | None = None, api: Any = None) -> list[dict[str, Any]]:
    """The runs of a W&B project.

    Args:
        path: `entity/project`, or `project` of the user whose key it is.
        study: of this one only; the tracker files a study as a W&B group.
        api: like `wandb.Api`, which it is by default.

    Raises:
        AnalysisError: no key, no network, no such project, no run in it.
    """
    filters = {"group": study} if study else {}
    try:
        api = api or _api()
        # `lazy` runs would each ask for their configuration again.
        runs = [_online_run(run, path) for run in api.runs(path, filters=filters, lazy=False)]
    except AnalysisError:
        raise
    except Exception as error:  # W&B raises its own types, and those of what is below it
        raise AnalysisError(
            f"wandb:{path}: {_without_key(error)}; it needs a network and `wandb login` or "
            "WANDB_API_KEY, and reads offline runs with wandb-offline:FOLDER"
        ) from error
    if not runs:
        raise AnalysisError(f"wandb:{path}: no run{f' in group {study}' if study else ''}")
    return _rows(runs)


def offline_rows(root: Path) -> list[dict[str, Any]]:
    """The runs below a folder that W&B wrote offline.

    Raises:
        AnalysisError: no such run there, or W&B is missing or too old to read them.
    """
    logs = sorted(path for path in root.rglob(LOGS) if path.is_file() and not path.is_symlink())
    if not logs:
        raise AnalysisError(f"{root}: no {LOGS} below it; give a folder of offline W&B runs")
    if find_spec("wandb") is None:
        raise AnalysisError(f"{root}: W&B is needed to read its runs: pip install wandb")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(_inspect, logs))
    runs = [run for run in found if isinstance(run, WandbRun)]
    return _rows(runs) + [row for row in found if not isinstance(row, WandbRun)]


def _api() -> Any:
    import wandb

    return wandb.Api(timeout=API_SECONDS)


def _without_key(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    key = os.environ.get("WANDB_API_KEY")
    return one_line(text.replace(key, "***") if key else text, 300).rstrip(".")


def _online_run(run: Any, path: str) -> WandbRun:
    where = f"wandb:{path}/{run.id}"
    return WandbRun(run.id, run.group, run.state, run.config, run.summary_metrics, where)


def _inspect(log: Path) -> WandbRun | dict[str, Any]:
    """The run of one log; a row with a reason if it cannot be read."""
    name = log.parent.name
    try:
        result = subprocess.run(
            [sys.executable, *INSPECT, str(log.resolve())],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=INSPECT_SECONDS,
            env={**os.environ, "WANDB_ERROR_REPORTING": "false"},
        )
        found = json.loads(result.stdout) if result.returncode == 0 else None
    except (OSError, ValueError, RecursionError, subprocess.TimeoutExpired) as error:
        return refused_row(name, f"{log}: not readable ({one_line(error, 200)})")
    if "No such command" in result.stderr or "No such option" in result.stderr:
        raise AnalysisError("this W&B cannot read offline runs: pip install --upgrade wandb")
    if not isinstance(found, dict) or not found.get("run_id"):
        last = (result.stderr.strip().splitlines() or ["no run in it"])[-1]
        return refused_row(name, f"{log}: not readable ({one_line(last, 200)})")
    config, summary = found.get("config") or {}, found.get("summary") or {}
    study, state = config.get("study"), str(found.get("state"))
    return WandbRun(found["run_id"], study, state, config, summary, str(log))


def _rows(runs: Iterable[WandbRun]) -> list[dict[str, Any]]:
    """One row for each run, by study and id: one that was started again has a log of each start."""
    starts: dict[tuple[str, str], list[WandbRun]] = {}
    for run in runs:
        starts.setdefault((str(run.study), run.run_id), []).append(run)
    return [_row(starts[key]) for key in sorted(starts)]


def _row(starts: Sequence[WandbRun]) -> dict[str, Any]:
    records: list[RunRecord] = []
    problem = None
    for run in starts:
        text = run.summary.get(SUMMARY_KEY)
        if isinstance(text, str):
            try:
                records.append(parse_record(text, run.where))
            except RecordError as error:
                problem = error
    if records:
        return record_row(max(records, key=lambda record: (record.is_final, record.attempts)))
    if problem:
        return refused_row(starts[-1].run_id, problem)
    return _foreign_row(starts[-1])


def _foreign_row(run: WandbRun) -> dict[str, Any]:
    """A run without a record: another program's, or one of ours that has not ended."""
    found = {**run.config, **run.summary}
    values = {name: found[name] for name in NAMES if isinstance(found.get(name), str | int | float)}
    state = DONE.get(run.state, run.state)
    labels = {"run_id": run.run_id, "study": run.study or values.get("study")}
    return tidy(with_both_flops({"status": state, **values, **labels}))
