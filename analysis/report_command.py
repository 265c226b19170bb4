"""`peer-analyze report`: the page of a study."""

import argparse
import shlex
from pathlib import Path

from analysis.html_page import page
from analysis.isoflop import AXES
from analysis.load import AnalysisError
from analysis.study_report import study_report

NAME = "report.html"


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Load, fit, compare, write.

    Raises:
        AnalysisError: nothing that can be analysed, or the file cannot be written.
    """
    path = arguments.out or folder / NAME
    report = study_report(
        arguments.runs, arguments.study, arguments.axis, arguments.baseline, command(arguments)
    )
    text = page(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AnalysisError(f"--out {path}: {error.strerror or error}") from error
    print(f"written: {path} ({len(text.encode()) / 1e6:.2f} MB)")


def command(arguments: argparse.Namespace) -> str:
    """The line that writes the page again, wherever it goes."""
    words = ["peer-analyze", "report", arguments.runs]
    given = {"study": arguments.study, "baseline": arguments.baseline}
    if arguments.axis != AXES[0]:
        given["axis"] = arguments.axis
    words += [word for name, value in given.items() if value for word in (f"--{name}", value)]
    return shlex.join(words)
