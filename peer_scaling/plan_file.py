"""`plan.csv` of a study, read as data that may come from anywhere."""

import csv
from math import inf
from pathlib import Path

from peer_scaling.errors import UserError, first_line
from peer_scaling.paths import inside
from peer_scaling.record import PLAN

PLAN_HEADER = ["run_id", "variant", "size", "budget", "seed", "flops", "epochs", "state", "reason"]


def read_plan(folder: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The cells of a study's plan by column, and a line for each that is none.

    A cell's `run_id` names a folder in the study's, and its `flops` are empty or a number. A folder
    without a plan has no cells.
    """
    rows: list[dict[str, str]] = []
    problems: list[str] = []
    try:
        path = inside(folder, PLAN)
    except UserError as error:
        return [], list(error.problems)
    if path.exists() and not path.is_file():
        return [], [f"{path}: not a regular file"]
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except FileNotFoundError:
        return [], []
    except (OSError, csv.Error) as error:
        return [], [f"{path}: not readable ({first_line(error)})"]
    if header != PLAN_HEADER:
        return [], [f"{path}: not the plan of a study"]
    for number, line in enumerate(lines, 2):
        problem = _problem(folder, line)
        if problem:
            problems.append(f"{path}: line {number} is no cell and left out: {problem}")
        else:
            rows.append(dict(zip(PLAN_HEADER, line, strict=True)))
    return rows, problems


def _problem(folder: Path, line: list[str]) -> str | None:
    if len(line) != len(PLAN_HEADER):
        return f"{len(line)} values"
    row = dict(zip(PLAN_HEADER, line, strict=True))
    try:
        inside(folder, row["run_id"])
        number = float(row["flops"] or 0)
    except (UserError, ValueError) as error:
        return first_line(error)
    return None if 0 <= number < inf else f"flops={row['flops']}"
