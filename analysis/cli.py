"""The command `peer-analyze`."""

import argparse
import sys
from collections import Counter
from pathlib import Path

import pandas as pd

from analysis import diagnose_command, predict_command
from analysis.csv_runs import write_csv
from analysis.isoflop import AXES
from analysis.load import OFFLINE, ONLINE, AnalysisError, excluded, load_runs, usable

EXIT_USAGE = 2
RUNS = (
    "a study's folder, as runs/isoflop_laptop; a CSV file; wandb:ENTITY/PROJECT; "
    "wandb-offline:FOLDER (docs/data-format.md)"
)


def main() -> None:
    """The console script: 0 if the analysis was written, 2 with one line if it cannot be."""
    arguments = _parser().parse_args()
    try:
        VERBS[arguments.verb](arguments)
    except AnalysisError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _isoflop(arguments: argparse.Namespace) -> None:
    from analysis.report import analyse, summary, write  # matplotlib, which `load` does without

    report = analyse(arguments.runs, arguments.axis, arguments.study)
    folder = arguments.out or _default_folder(arguments.runs)
    try:
        paths = write(report, folder)
    except OSError as error:
        raise AnalysisError(f"--out {folder}: {error.strerror or error}") from error
    print(summary(report))
    print(f"\nwritten to {folder}: {', '.join(path.name for path in paths)}")


def _load(arguments: argparse.Namespace) -> None:
    frame = load_runs(arguments.runs, arguments.study)
    if arguments.csv:
        try:
            write_csv(frame, arguments.csv)
        except OSError as error:
            raise AnalysisError(f"--csv {arguments.csv}: {error.strerror or error}") from error
    print("\n".join(_lines(frame)))


def _compare(arguments: argparse.Namespace) -> None:
    from analysis.compare_command import run

    run(arguments, arguments.out or _default_folder(arguments.runs))


def _report(arguments: argparse.Namespace) -> None:
    from analysis.report_command import run

    run(arguments, _default_folder(arguments.runs))


def _paper(arguments: argparse.Namespace) -> None:
    from analysis.paper_command import run

    run(arguments, arguments.out or _default_folder(arguments.runs))


def _lines(frame: pd.DataFrame) -> list[str]:
    cells = Counter(usable(frame)["variant"])
    counts = ", ".join(f"{count} {variant}" for variant, count in sorted(cells.items()))
    left = excluded(frame)
    lines = [f"{len(usable(frame))} of {len(frame)} runs can be used{counts and ': '}{counts}"]
    return lines + [f"{run}: {why}" for run, why in left[["run_id", "excluded"]].itertuples(False)]


def _default_folder(runs: str) -> Path:
    path = Path(runs.removeprefix(OFFLINE))
    if runs.startswith(ONLINE):
        return Path(f"{Path(runs.removeprefix(ONLINE)).name}_analysis")
    return path / "analysis" if path.is_dir() else path.with_name(f"{path.stem}_analysis")


VERBS = {
    "isoflop": _isoflop,
    "load": _load,
    "compare": _compare,
    "report": _report,
    "tables": _paper,
    "figures": _paper,
    "predict": predict_command.run,
    "diagnose": diagnose_command.run,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peer-analyze", description="Analyse isoFLOP studies.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    isoflop = verbs.add_parser(
        "isoflop",
        help="isoFLOP curves, optima, perplexities, compute multipliers",
        description="Fit the isoFLOP curves of a study; write figures and tables, print a summary.",
    )
    isoflop.add_argument(
        "--out", type=Path, help="where to write (default: <runs>/analysis, <CSV>_analysis)"
    )
    load = verbs.add_parser(
        "load",
        help="what can be used of the runs, and why the rest cannot; all of them as CSV",
        description="Load runs, print what is excluded and why, and write them as a table.",
    )
    load.add_argument("--csv", type=Path, help="file to write; it loads back as the same runs")
    compare = verbs.add_parser(
        "compare",
        help="which variant beats which, at equal FLOPs, wall-clock and memory, and why not",
        description="Compare every two variants at every budget; write tables, print verdicts.",
    )
    compare.add_argument(
        "--out", type=Path, help="where to write (default: <runs>/analysis, <CSV>_analysis)"
    )
    report = verbs.add_parser(
        "report",
        help="all of a study on one page: verdicts, curves, tables, costs, reproducibility card",
        description="Write one HTML file that shows a study and loads nothing.",
    )
    report.add_argument(
        "--out", type=Path, help="file to write (default: <runs>/analysis/report.html)"
    )
    for verb in (isoflop, compare, report):
        verb.add_argument("--axis", choices=AXES, default=AXES[0], help="what N counts")
    for verb in (compare, report):
        verb.add_argument("--baseline", help="reference of its pairs (default: dense, if there)")
    predict = verbs.add_parser(
        "predict",
        help="size, tokens and loss at a budget that was not trained, with intervals",
        description="Predict N*, D* and L* at a budget; --check holds one against later runs.",
    )
    predict_command.add_arguments(predict)
    diagnose = verbs.add_parser(
        "diagnose",
        help="every law with its held-out errors, influence, covariance and certificate",
        description="Print what can be said against each law of a study; --out writes it.",
    )
    diagnose_command.add_arguments(diagnose)
    paper = [
        verbs.add_parser(verb, help=f"{what} of He 2024 from a study; what it lacks for the others")
        for verb, what in (("tables", "tables 1 and 2"), ("figures", "figures 1, 3a, 3b and 4"))
    ]
    for verb in paper:
        verb.add_argument(
            "--out", type=Path, help="where to write (default: <runs>/analysis, <CSV>_analysis)"
        )
    for verb in (isoflop, load, compare, report, predict, diagnose, *paper):
        verb.add_argument("runs", help=RUNS)
        verb.add_argument("--study", help="only this study's runs")
    return parser
