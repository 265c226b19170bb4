"""`peer-analyze tables` and `peer-analyze figures`: the artefacts of He 2024 (2407.04153) that a
study has the runs for, and why the others are not there.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from analysis import captions, experts_figures, figures, paper_tables, tables
from analysis.evaluations import Evaluations, read_evaluations
from analysis.experts import ExpertsStudy, experts_study
from analysis.isoflop import IsoflopFit, fit_isoflop
from analysis.load import AnalysisError, load_runs
from analysis.paper_sets import sets_caption
from analysis.record_set import read_record_set
from analysis.refusals import MIN_SIZES
from analysis.usage_growth import growth_table, usage_growth
from peer_scaling.record import RunRecord, budget_label

Written = list[Path]
MIN_POINTS = 2
"""Of a line of figure 3a or 3b, and of the columns of table 2."""


def write_tables(source: str, study: str | None, folder: Path) -> list[str]:
    """Write tables 1 and 2 as .md, .tex and .csv; a line for each, written or not."""
    frame = load_runs(source, study)
    evaluations = read_evaluations(source)
    lines = [_said("table 1", lambda: _table1(frame, evaluations, folder)), *evaluations.lines()]
    lines += _of_experts("table 2", frame, lambda own, budget: _table2(own, budget, folder))
    return lines


def write_figures(source: str, study: str | None, folder: Path) -> list[str]:
    """Draw figures 1 (or 4), 3a, 3b, each with its caption, and the growth of usage; a line for
    each, drawn or not.
    """
    frame = load_runs(source, study)
    lines = [_said("figure 1, or 4", lambda: _figure1(frame, folder))]
    drawings = {"figure 3a": _figure3a, "figure 3b": _figure3b}
    for name, draw in drawings.items():
        lines += _of_experts(name, frame, lambda own, C, draw=draw: draw(own, C, frame, folder))
    records = cache(lambda: read_record_set(source, frame).used)
    lines += _of_experts(
        "usage growth", frame, lambda own, C: _growth(own, C, frame, records(), folder)
    )
    return lines


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """The verbs: print what was written and what is missing."""
    write = write_tables if arguments.verb == "tables" else write_figures
    try:
        lines = write(arguments.runs, arguments.study, folder)
    except OSError as error:
        raise AnalysisError(f"--out {folder}: {error.strerror or error}") from error
    print("\n".join(lines))


def _said(name: str, write: Callable[[], Written]) -> str:
    try:
        return f"{name}: {', '.join(str(path) for path in write())}"
    except AnalysisError as error:
        return f"{name}: not written: {error}"


def _of_experts(
    name: str, frame: pd.DataFrame, write: Callable[[ExpertsStudy, float], Written]
) -> list[str]:
    try:
        own = experts_study(frame)
    except AnalysisError as error:
        return [f"{name}: not written: {error}"]
    return [
        _said(f"{name} at {budget_label(budget)}", lambda budget=budget: write(own, budget))
        for budget in own.budgets()
    ]


def _fit(frame: pd.DataFrame) -> IsoflopFit:
    fit = fit_isoflop(frame)
    most = max(profile.num_sizes for profile in fit.profiles)
    if most < MIN_SIZES:
        raise AnalysisError(f"{most} size(s) per variant and budget; a curve needs {MIN_SIZES}")
    return fit


def _table1(frame: pd.DataFrame, evaluations: Evaluations, folder: Path) -> Written:
    ours = paper_tables.table1(_fit(frame), frame, evaluations)
    table = paper_tables.beside_published(ours, evaluations)
    bits = [name for name in table.columns if name.startswith(paper_tables.BITS)]
    paths = tables.write_table(table, folder, "table1", bits)
    paths += _caption(sets_caption(evaluations), folder, "table1")
    return paths + tables.write_table(paper_tables.published_table1(), folder, "table1_published")


def _table2(study: ExpertsStudy, budget: float, folder: Path) -> Written:
    table = paper_tables.table2(study, budget)
    if len(table.columns) < MIN_POINTS:
        raise AnalysisError(_few("numbers of experts or query norms"))
    paths = tables.write_table(table, folder, f"table2_{budget_label(budget)}")
    return paths + tables.write_table(tables.published_expert_use(), folder, "table2_published")


def _figure1(frame: pd.DataFrame, folder: Path) -> Written:
    fit = _fit(frame)
    drawn = figures.save(figures.plot_isoflop(fit, frame), folder, "figure1")
    return drawn + _caption(captions.isoflop_caption(fit, frame), folder, "figure1")


def _figure3a(study: ExpertsStudy, budget: float, frame: pd.DataFrame, folder: Path) -> Written:
    if max(len(study.with_experts(budget, n)) for n in experts_figures.NORMS) < MIN_POINTS:
        raise AnalysisError(_few("numbers of experts at one h and k"))
    name = f"figure3a_{budget_label(budget)}"
    drawn = figures.save(experts_figures.plot_num_experts(study, budget), folder, name)
    drawn += _caption(captions.num_experts_caption(study, budget, frame), folder, name)
    return drawn + _points(study, folder, name)


def _figure3b(study: ExpertsStudy, budget: float, frame: pd.DataFrame, folder: Path) -> Written:
    if max(map(len, study.with_heads(budget).values()), default=0) < MIN_POINTS:
        raise AnalysisError(_few("numbers of heads at one number of active experts"))
    name = f"figure3b_{budget_label(budget)}"
    drawn = figures.save(experts_figures.plot_num_heads(study, budget), folder, name)
    drawn += _caption(captions.num_heads_caption(study, budget, frame), folder, name)
    return drawn + _points(study, folder, name)


def _growth(
    study: ExpertsStudy,
    budget: float,
    frame: pd.DataFrame,
    records: Sequence[RunRecord],
    folder: Path,
) -> Written:
    growths = usage_growth(study, budget, records)
    compared = [point for norm in captions.NORMS for point in study.with_experts(budget, norm)]
    shown = [growth for growth in growths if growth.point in compared] or growths
    name = f"usage_growth_{budget_label(budget)}"
    drawn = figures.save(experts_figures.plot_usage_growth(shown, budget), folder, name)
    caption = captions.usage_growth_caption(study, budget, frame, shown)
    drawn += _caption(caption, folder, name)
    path = folder / f"{name}.csv"
    growth_table(growths).to_csv(path, index=False)
    return [*drawn, path]


def _caption(text: str, folder: Path, name: str) -> Written:
    path = folder / f"{name}.caption.md"
    path.write_text(text + "\n")
    return [path]


def _points(study: ExpertsStudy, folder: Path, name: str) -> Written:
    path = folder / f"{name}.csv"
    paper_tables.points_table(study).to_csv(path, index=False)
    return [path]


def _few(what: str) -> str:
    return (
        f"fewer than {MIN_POINTS} {what}; sweeps/laptop_* and sweeps/paper_* have studies of them"
    )
