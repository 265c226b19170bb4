"""The command `peer-sweep`: a study on a Slurm cluster, without a process that waits for it.

What was submitted is in files of the study's folder, so that any process on any machine that sees
it can say how it stands, cancel it, or submit again what is missing.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peer_scaling.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, UserError
from peer_scaling.plan_file import read_plan
from peer_scaling.record import PLAN, TERMINAL, find_record
from peer_scaling.slurm import SlurmError, TaskState, cancel, task_states
from peer_scaling.submissions import Submission, log_path, read_submissions
from peer_scaling.text import aligned

COLUMNS = ("cell", "run", "Slurm job", "state", "node", "reason")


@dataclass(frozen=True)
class CellStatus:
    """A cell of a study: what its folder says, and what Slurm says of its newest job."""

    run_id: str
    cell: str
    run: str
    """Status of its record; `missing` without one."""
    reason: str
    """Of the record; else of the job, for waiting."""
    job: TaskState | None
    log: str | None

    @property
    def ended(self) -> bool:
        """Whether no start of it would change anything."""
        return self.run in TERMINAL


def main() -> None:
    """The console script. Exit codes: 0 every cell has a result, or what was asked for is done; 1 a
    cell has none, or Slurm refused; 2 something to correct.
    """
    arguments, overrides = _parser().parse_known_args()
    try:
        sys.exit(arguments.run(arguments, overrides))
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(error.exit_code)


def submit(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`peer-sweep submit`: plan the study as `peer-train` does, and hand over what is missing."""
    try:
        # Only here: the other commands need neither submitit nor the seconds that PyTorch takes.
        from peer_scaling.submit import submit_study
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; pip install 'peer-scaling[slurm]'") from error
    submit_study(arguments.study, arguments.config_dir, overrides)
    return EXIT_DONE


def retry(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`peer-sweep retry`: every earlier submission again, which submits what is missing and neither
    waiting nor running; overrides given now come last.
    """
    submissions, problems = read_submissions(_folder(arguments))
    _warn(problems)
    if not submissions:
        raise UserError(f"{arguments.study}: nothing was submitted; start with peer-sweep submit")
    again = {(one.config_name, one.config_dir, one.arguments): None for one in submissions}
    codes = []
    for name, folder, own in again:
        config_dir = ("--config-dir", folder) if folder else ()
        # Hydra composes for one study in a process.
        command = ("-m", "peer_scaling.sweep_command", "submit", name, *config_dir, *own)
        codes.append(subprocess.run([sys.executable, *command, *overrides]).returncode)
    return max(codes)


def status(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`peer-sweep status`: the table, or JSON."""
    _no_more(overrides)
    cells, problems = study_cells(_folder(arguments))
    if arguments.json:
        print(json.dumps({"cells": [asdict(cell) for cell in cells], "problems": problems}))
    else:
        _warn(problems)
        print(_text(cells))
    return EXIT_DONE if all(cell.ended for cell in cells) else EXIT_FAILED


def cancel_study(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`peer-sweep cancel`: end what waits or runs. What has run so far is saved."""
    _no_more(overrides)
    cells, problems = study_cells(_folder(arguments))
    _warn(problems)
    active = [cell.job.job for cell in cells if cell.job and cell.job.active]
    try:
        cancel(active)
    except SlurmError as error:
        raise UserError(str(error)) from error
    print(f"{len(active)} jobs cancelled; peer-sweep retry {arguments.study} starts them again")
    return EXIT_FAILED if problems else EXIT_DONE


def study_cells(folder: Path) -> tuple[list[CellStatus], list[str]]:
    """Every cell of a study's plan, and a line for each thing that could not be read or asked."""
    rows, problems = read_plan(folder)
    submissions, unread = read_submissions(folder)
    states, unasked = task_states({one.job_id: one.job_name for one in submissions})
    newest: dict[str, tuple[Submission, int]] = {}
    for one in submissions:
        newest |= {run_id: (one, index) for index, run_id in enumerate(one.run_ids)}
    cells = []
    for row in rows:
        run_id = row["run_id"]
        record = find_record(folder / run_id)
        submission, index = newest.get(run_id, (None, 0))
        job = states.get((submission.job_id, index)) if submission else None
        reason = (record.reason if record else job and job.reason) or ""
        log = str(log_path(folder, submission, job.job)) if submission and job else None
        name = " ".join(row[axis] for axis in ("variant", "size", "budget", "seed"))
        run = record.status if record else "missing"
        cells.append(CellStatus(run_id, name, run, reason, job, log))
    return cells, [*problems, *unread, *unasked]


def _text(cells: Sequence[CellStatus]) -> str:
    open_cells = [cell for cell in cells if not cell.ended]
    runs = Counter(cell.run for cell in cells)
    jobs = Counter(cell.job.state for cell in open_cells if cell.job)
    counts = ", ".join(f"{n} {run}" for run, n in runs.items())
    others = ", ".join(f"{n} {state}" for state, n in jobs.items())
    lines = [
        *aligned([COLUMNS, *map(_row, cells)]),
        f"{len(cells)} cells: {counts}{f'; jobs of the others: {others}' if others else ''}",
    ]
    logs = [cell.log for cell in open_cells if cell.log and cell.job and not cell.job.active]
    return "\n".join([*lines, *(f"ended without a result: {log}" for log in logs)])


def _row(cell: CellStatus) -> tuple[str, ...]:
    job = cell.job
    if job is None:
        return (cell.cell, cell.run, "", "", "", cell.reason)
    state = job.state if job.exit_code in ("", "0:0") else f"{job.state} {job.exit_code}"
    return (cell.cell, cell.run, job.job, state, job.node, cell.reason)


def _folder(arguments: argparse.Namespace) -> Path:
    folder = Path(arguments.study)
    if not (folder / PLAN).is_file():
        folder = Path(arguments.runs_dir) / arguments.study
    if not (folder / PLAN).is_file():
        raise UserError(f"{folder}: no {PLAN}; start it with peer-sweep submit {folder.name}")
    return folder


def _warn(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)


def _no_more(arguments: Sequence[str]) -> None:
    if arguments:
        print(f"error: {' '.join(arguments)}: no such arguments", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peer-sweep", description="A study on a Slurm cluster.")
    commands = parser.add_subparsers(required=True, metavar="submit|status|cancel|retry")
    texts = {
        submit: "hand the missing cells to Slurm; overrides as for peer-train, "
        "hydra.launcher.partition=... among them",
        status: "what became of every cell, and of its job",
        cancel_study: "end the jobs that wait or run",
        retry: "submit again what is missing and neither waits nor runs",
    }
    for run, text in texts.items():
        own = commands.add_parser(run.__name__.split("_")[0], help=text, description=text)
        own.set_defaults(run=run)
        if run is submit:
            own.add_argument("study", help="name of its config")
            own.add_argument("--config-dir", help="folder of your own configs")
            continue
        own.add_argument("study", help="name of the study, or its folder")
        own.add_argument("--runs-dir", default="runs", help="folder of all studies (default: runs)")
        if run is status:
            own.add_argument("--json", action="store_true", help="one JSON object")
    return parser


if __name__ == "__main__":
    from peer_scaling.sweep_command import main as entry

    entry()
