"""Runs from a CSV file, anybody's: `docs/data-format.md` says what its columns mean."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.schema import NAMES, NEEDED, AnalysisError, one_line, tidy

MAX_FILE_BYTES = 1 << 30
HINT = "docs/data-format.md lists them"


def csv_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The runs of a file, and the names of its columns that the schema does not know.

    `flops` stands for a missing column `budget` and the other way round. A row that cannot be used
    keeps its place, with its line's number in the reason; unknown columns are kept as texts.

    Raises:
        AnalysisError: no file, no UTF-8, no CSV, columns missing or repeated, or no row.
    """
    header, lines = read_table(path)
    known = set(header) | ({"budget", "flops"} if {"budget", "flops"} & set(header) else set())
    missing = ["budget or flops" if name == "budget" else name for name in NEEDED]
    missing = [name for name in missing if name.split(" or ")[0] not in known]
    if missing:
        raise AnalysisError(
            f"{path}: no column {', '.join(missing)}; {HINT}; found: "
            + one_line(", ".join(header), 200)
        )
    if not lines:
        raise AnalysisError(f"{path}: no row below the header; one run, one row")
    return [_row(header, *line) for line in lines], [n for n in header if n not in NAMES]


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame so that `csv_rows` reads the same: floats as the shortest text that is them.

    Raises:
        OSError: it cannot be written.
    """
    frame.to_csv(path, index=False, encoding="utf-8", compression=None)


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a CSV file, and its rows with the number of the line where each ends.

    Raises:
        AnalysisError: it is no regular file, not UTF-8, no CSV, or has no usable header.
    """
    if not path.is_file():
        raise AnalysisError(f"{path}: no such file")
    number = 0
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise AnalysisError(f"{path}: more than {MAX_FILE_BYTES >> 20} MiB; keep one row a run")
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Strict: a quote that is never closed would otherwise swallow the rest in silence.
            reader = csv.reader(file, strict=True)
            lines = []
            for cells in reader:
                number = reader.line_num
                if any(cell.strip() for cell in cells):
                    lines.append((number, [cell.strip() for cell in cells]))
    except UnicodeDecodeError as error:
        raise AnalysisError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8 CSV") from error
    except csv.Error as error:
        raise AnalysisError(f"{path}: line {number + 1}: no CSV ({error})") from error
    except OSError as error:
        raise AnalysisError(f"{path}: not readable ({error.strerror or error})") from error
    if not lines:
        raise AnalysisError(f"{path}: empty; its first line names the columns; {HINT}")
    header = [one_line(name) for name in lines[0][1]]
    problems = [f"column {n} has no name" for n, name in enumerate(header, 1) if not name]
    twice = dict.fromkeys(name for name in header if name and header.count(name) > 1)
    problems += [f"column {one_line(name, 60)} occurs twice" for name in twice]
    if problems:
        raise AnalysisError(f"{path}: {'; '.join(problems)}")
    return header, lines[1:]


def _row(header: Sequence[str], number: int, cells: Sequence[str]) -> dict[str, Any]:
    where = f"line {number}"
    values: dict[str, object] = dict(zip(header, cells, strict=False))
    if len(cells) != len(header):
        why = f"{where}: {len(cells)} cells under {len(header)} columns"
        return tidy({"run_id": where, "excluded": why})
    unknown = {name: one_line(value) or None for name, value in values.items() if name not in NAMES}
    values["run_id"] = values.get("run_id") or where
    return unknown | tidy(with_both_flops(values), where)


def with_both_flops(values: dict[str, object]) -> dict[str, object]:
    """Values of a run from elsewhere: whoever has one kind of FLOPs has met the budget exactly."""
    for name, other in (("budget", "flops"), ("flops", "budget")):
        if name not in values and other in values:
            values = {**values, name: values[other]}
    return values
