"""`peer-analyze compare`: verdicts at equal FLOPs, wall-clock and memory, each with its reasons."""

import argparse
from pathlib import Path

from analysis.compare_text import claims_table, comparison_table, report
from analysis.csv_runs import write_csv
from analysis.load import ONLINE, AnalysisError, load_runs
from analysis.verdicts import Comparison, compare_study


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Load, compare, write and print.

    Raises:
        AnalysisError: nothing to compare, or the folder cannot be written.
    """
    frame = load_runs(arguments.runs, arguments.study)
    # Runs at other learning rates are in studies of their own, beside this one.
    beside = arguments.study and not arguments.runs.startswith(ONLINE)
    tuning = load_runs(arguments.runs) if beside else frame
    comparison = compare_study(frame, arguments.axis, arguments.baseline, tuning)
    try:
        names = write(comparison, folder)
    except OSError as error:
        raise AnalysisError(f"--out {folder}: {error.strerror or error}") from error
    print(report(comparison))
    print(f"\nwritten to {folder}: {', '.join(names)}")


def write(comparison: Comparison, folder: Path) -> list[str]:
    """Write `compare.csv`, `claims.csv` and `compare.md`; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(comparison_table(comparison), folder / "compare.csv")
    write_csv(claims_table(comparison), folder / "claims.csv")
    (folder / "compare.md").write_text(report(comparison) + "\n")
    return ["compare.csv", "claims.csv", "compare.md"]
