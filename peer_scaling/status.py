"""The command `peer-status`: how far a study is, from its folder alone."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from peer_scaling.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, shown
from peer_scaling.record import PLAN, budget_label
from peer_scaling.standing import Standing, is_choosing, standings, steps_of


@dataclass(frozen=True)
class HeldRun:
    """A run that a process has."""

    run_id: str
    state: str
    """`running`, or `silent`: no sign of life for a lease, so that anybody may take it over."""
    host: str
    pid: int
    heartbeat_seconds: float
    """Since the last sign of life."""
    step: int | None
    steps: int | None
    """None before the first line of its history."""


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands."""

    study: str
    counts: Mapping[str, int]
    """Cells per state (`standing.Standing.state`)."""
    flops_left: float
    """Training FLOPs of the cells that have no final result."""
    seconds_left: float | None
    """Computing time for them at the mean speed of the study's runs; None if none is done."""
    held: tuple[HeldRun, ...]
    problems: tuple[str, ...]
    """Cells whose last attempt did not end as `done`, with their reasons."""
    plan_problems: tuple[str, ...]
    """Lines of the plan that are no cells: nothing is known of what they stood for."""
    choosing: bool
    """Whether the study chooses its sizes, and may choose more than is planned."""
    complete: bool
    """Whether every cell has a final result, and no more are to come."""


def study_status(folder: Path) -> StudyStatus:
    """Compare the study's plan with the folders beside it.

    Raises:
        FileNotFoundError: the folder holds no plan: no study was started there.
    """
    if not (folder / PLAN).is_file():
        raise FileNotFoundError(folder / PLAN)
    cells, plan_problems = standings(folder)
    choosing = is_choosing(folder)
    flops = sum(cell.flops for cell in cells if not cell.is_final)
    speeds = [
        cell.record.flops_per_second
        for cell in cells
        if cell.record and cell.state == "done" and cell.record.flops_per_second
    ]
    return StudyStatus(
        study=folder.name,
        counts=dict(Counter(cell.state for cell in cells)),
        flops_left=flops,
        seconds_left=flops * len(speeds) / sum(speeds) if speeds else None,
        held=tuple(_held(cell, folder) for cell in cells if cell.holder),
        problems=tuple(
            f"{cell.run_id}: {cell.record.status}: {shown(cell.record.reason)}"
            for cell in cells
            if cell.record and cell.record.status != "done"
        ),
        plan_problems=tuple(plan_problems),
        choosing=choosing,
        complete=all(cell.is_final for cell in cells) and not plan_problems and not choosing,
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


def _held(cell: Standing, folder: Path) -> HeldRun:
    assert cell.holder is not None
    step, steps = steps_of(cell, folder) or (None, None)
    holder = cell.holder
    return HeldRun(
        cell.run_id, cell.state, shown(holder.host), holder.pid, max(0.0, holder.age), step, steps
    )


def _text(status: StudyStatus) -> str:
    total = sum(status.counts.values())
    counts = ", ".join(f"{count} {state}" for state, count in sorted(status.counts.items()))
    lines = [f"{status.study}: {total} cells: {counts}"]
    if status.flops_left:
        hours = (
            "" if status.seconds_left is None else f", {status.seconds_left / 60:.1f} core minutes"
        )
        lines.append(f"{budget_label(float(f'{status.flops_left:.3g}'))} FLOPs to go{hours}")
    if status.choosing:
        lines.append("this study chooses its sizes: more rounds may come")
    held = map(_held_text, status.held)
    return "\n".join([*lines, *held, *status.plan_problems, *status.problems])


def _held_text(run: HeldRun) -> str:
    steps = "before its first line" if run.step is None else f"step {run.step} of {run.steps}"
    age = f"last sign of life {run.heartbeat_seconds:.0f} s ago"
    return f"{run.run_id}: {run.state}, {steps}, process {run.pid} on {run.host}, {age}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peer-status", description="How far a study is.")
    parser.add_argument("study", help="name of the study, or its folder")
    parser.add_argument("--runs-dir", default="runs", help="folder of all studies (default: runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser
