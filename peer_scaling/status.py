"""The command `peer-status`: how far a study is, from its folder alone."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from peer_scaling.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, shown
from peer_scaling.plan_file import read_plan
from peer_scaling.record import (
    HISTORY,
    PLAN,
    RunRecord,
    budget_label,
    find_record,
)

RUNNING_SECONDS = 120.0
"""A run without a record whose history grew this recently counts as running."""


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands."""

    study: str
    counts: Mapping[str, int]
    """Cells per state: the statuses of records, `running`, `interrupted` and `missing`."""
    flops_left: float
    """Training FLOPs of the cells that have no final result."""
    seconds_left: float | None
    """Computing time for them at the mean speed of the study's runs; None if none is done."""
    problems: tuple[str, ...]
    """Cells that did not end as `done`, with their reasons."""
    plan_problems: tuple[str, ...]
    """Lines of the plan that are no cells: nothing is known of what they stood for."""

    @property
    def complete(self) -> bool:
        """Whether every cell has a final result."""
        return not self.flops_left and not self.plan_problems


def study_status(folder: Path) -> StudyStatus:
    """Compare the study's plan with the records beside it.

    Raises:
        FileNotFoundError: the folder holds no plan: no study was started there.
    """
    if not (folder / PLAN).is_file():
        raise FileNotFoundError(folder / PLAN)
    rows, plan_problems = read_plan(folder)
    records = {row["run_id"]: find_record(folder / row["run_id"]) for row in rows}
    states = {row["run_id"]: _state(folder / row["run_id"], records[row["run_id"]]) for row in rows}
    open_states = ("running", "interrupted", "missing", "failed")
    flops = sum(float(r["flops"] or 0) for r in rows if states[r["run_id"]] in open_states)
    done = [record for record in records.values() if record and record.status == "done"]
    speeds = [record.flops_per_second for record in done if record.flops_per_second]
    problems = [
        f"{name}: {record.status}: {shown(record.reason)}"
        for name, record in records.items()
        if record and record.status != "done"
    ]
    return StudyStatus(
        study=folder.name,
        counts=dict(Counter(states.values())),
        flops_left=flops,
        seconds_left=flops * len(speeds) / sum(speeds) if speeds else None,
        problems=tuple(problems),
        plan_problems=tuple(plan_problems),
    )


def main() -> None:
    """The console script: 0 if every cell has a result, 1 if not, 2 if there is no study."""
    arguments = _parser().parse_args()
    folder = Path(arguments.study)
    if not (folder / PLAN).is_file():
        folder = Path(arguments.runs_dir) / arguments.study
    try:
        status = study_status(folder)
    except OSError:
        print(
            f"error: {folder}: no {PLAN}; start it with peer-train --config-name {folder.name}",
            file=sys.stderr,
        )
        sys.exit(EXIT_USAGE)
    print(json.dumps(asdict(status)) if arguments.json else _text(status))
    sys.exit(EXIT_DONE if status.complete else EXIT_FAILED)


def _state(folder: Path, record: RunRecord | None) -> str:
    if record:
        return record.status
    history = folder / HISTORY
    if not history.exists():
        return "missing"
    idle = time.time() - history.stat().st_mtime
    return "running" if idle < RUNNING_SECONDS else "interrupted"


def _text(status: StudyStatus) -> str:
    total = sum(status.counts.values())
    counts = ", ".join(f"{count} {state}" for state, count in sorted(status.counts.items()))
    lines = [f"{status.study}: {total} cells: {counts}"]
    if status.flops_left:
        hours = (
            "" if status.seconds_left is None else f", {status.seconds_left / 60:.1f} core minutes"
        )
        lines.append(f"{budget_label(float(f'{status.flops_left:.3g}'))} FLOPs to go{hours}")
    return "\n".join([*lines, *status.plan_problems, *status.problems])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peer-status", description="How far a study is.")
    parser.add_argument("study", help="name of the study, or its folder")
    parser.add_argument("--runs-dir", default="runs", help="folder of all studies (default: runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser
