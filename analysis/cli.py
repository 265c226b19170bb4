"""The command `peer-analyze`."""

import argparse
import sys
from pathlib import Path

from analysis.isoflop import AXES
from analysis.load import AnalysisError
from analysis.report import analyse, summary, write

EXIT_USAGE = 2


def main() -> None:
    """The console script: 0 if the analysis was written, 2 with one line if it cannot be."""
    arguments = _parser().parse_args()
    try:
        report = analyse(arguments.runs, arguments.axis)
    except AnalysisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    folder = arguments.out or Path(arguments.runs) / "analysis"
    try:
        paths = write(report, folder)
    except OSError as error:
        print(f"error: --out {folder}: {error.strerror or error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    print(summary(report))
    print(f"\nwritten to {folder}: {', '.join(path.name for path in paths)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peer-analyze", description="Analyse isoFLOP studies.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    isoflop = verbs.add_parser(
        "isoflop",
        help="isoFLOP curves, optima, perplexities, compute multipliers",
        description="Fit the isoFLOP curves of a study; write figures and tables, print a summary.",
    )
    isoflop.add_argument("runs", help="folder of the study, as runs/isoflop_laptop")
    isoflop.add_argument("--out", type=Path, help="where to write (default: <runs>/analysis)")
    isoflop.add_argument("--axis", choices=AXES, default=AXES[0], help="what N counts")
    return parser
