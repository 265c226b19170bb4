"""A study as a Hydra sweep: paired cells instead of a product, and only what is missing.

Used by the files in `sweeps/` as `hydra/sweeper: isoflop`. Each cell becomes a list of overrides,
so any Hydra launcher can run it. Success of a cell is its record, not a return value.
"""

import os
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peer_scaling.cells import StudyCell, plan_text, summary_line, write_plan
from peer_scaling.cli import CommandTask
from peer_scaling.config import bind, run_from
from peer_scaling.data import Corpus, DataConfig
from peer_scaling.display import run_name
from peer_scaling.errors import EXIT_DONE, StudyIncompleteError, UserError
from peer_scaling.explain import explain
from peer_scaling.finished import leave_stamp
from peer_scaling.jobs import (
    CellJob,
    CellLauncher,
    CellResult,
    CellSubmitter,
    check_results,
    result_of,
)
from peer_scaling.paths import closed_folder
from peer_scaling.plan import Cell, InfeasibleError, Study, enumerate_cells, restrict
from peer_scaling.planned import infeasible_record, plan_run
from peer_scaling.preflight import (
    check_disk,
    check_machine,
    check_micro_batch,
    problems_of,
    state_bytes,
)
from peer_scaling.prepare import find_prepared, prepare
from peer_scaling.publish import write_record
from peer_scaling.record import RECORD, find_record
from peer_scaling.run import Run

AXES = ("variant", "ffw", "size", "budget", "seed")


class IsoflopSweeper(Sweeper):
    """Hydra plugin: enumerates a study's cells, skips what is done, launches the rest."""

    def __init__(self, canary: bool = True, **study: Any) -> None:
        self._canary, self._values = canary, study

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `sweep`.

        Raises:
            UserError: the study is not one.
        """
        self._study = _study(self._values)
        self._config, self._loader, self._task = config, hydra_context.config_loader, task_function
        self._launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[int]:
        """Run the study, restricted and overridden by the command line's arguments.

        Returns:
            Exit codes of the launched cells.

        Raises:
            UserError: a cell's configuration is wrong; nothing was launched.
            StudyIncompleteError: a cell ended without a result.
        """
        parser = OverridesParser.create(config_loader=self._loader)
        axes, fixed = split_arguments(parser.parse_overrides(arguments))
        cells = enumerate_cells(restrict(self._study, axes))
        runs = self._runs(cells, fixed)
        settings = runs[0].settings
        closed_folder(Path(settings.runs_dir), settings.study)
        corpora = _corpora(runs, may_stream=not settings.dry_run)
        planned = [_plan(c, r, corpora[r.data]) for c, r in zip(cells, runs, strict=True)]
        _refuse_twins(planned)
        if settings.dry_run:
            print(plan_text(planned))
            return []
        self._check_disk(planned)
        _update_refusals(planned, corpora)
        write_plan(planned, runs[0].study_folder, keep_missing=bool(axes))
        print(summary_line(planned), flush=True)
        codes = self._launch(planned, fixed)
        leave_stamp(self._task, planned, corpora, keep_missing=bool(axes))
        return codes

    def _runs(self, cells: Sequence[Cell], fixed: list[str]) -> list[Run]:
        """The run of every cell; the problems of all of them in one error.

        Hydra takes 0.1 s to compose a configuration: cells that differ in budget and seed only
        share one, resolved anew for each.
        """
        composed: dict[tuple[str, str], DictConfig] = {}
        runs: list[Run] = []
        problems: list[str] = []
        refused: dict[str, tuple[Exception, list[str]]] = {}
        for cell in cells:
            model = (cell.variant, cell.size)
            if model not in composed:
                own = [*cell.overrides(), *fixed]
                try:
                    composed[model] = self._loader.load_sweep_config(self._config, own)
                except (HydraException, OmegaConfBaseException) as error:
                    refused.setdefault(str(error), (error, own))
                    continue
            config = composed[model]
            config.budget, config.seed = cell.budget, cell.seed
            problems += problems_of(lambda config=config: runs.append(run_from(config)))
        for error, own in refused.values():
            problems += self._explain(error, own)
        problems += [*check_machine(runs), *check_micro_batch(runs)]
        if problems:
            raise UserError(*dict.fromkeys(problems))
        return runs

    def _check_disk(self, cells: list[StudyCell]) -> None:
        missing = [cell.planned for cell in cells if cell.planned and cell.to_run]
        launcher = self._config.hydra.launcher
        together = launcher.get("workers") or launcher.get("array_parallelism") or os.cpu_count()
        if missing:
            check_disk(missing, int(together or 1))

    def _explain(self, error: Exception, overrides: list[str]) -> list[str]:
        """What Hydra did not accept of a cell."""
        name = self._config.hydra.job.config_name
        own = [*self._config.hydra.overrides.hydra, *overrides]
        return explain(error, self._loader, name, own)

    def _launch(self, cells: list[StudyCell], fixed: list[str]) -> list[int]:
        any_done = any(cell.state == "done" for cell in cells)
        missing = [cell for cell in cells if cell.to_run]
        if not missing:
            return []
        # Long runs first: the last ones to end are then short and leave no core idle.
        missing.sort(key=lambda cell: -cell.run.settings.budget)
        study = ["peer-train", "--config-name", str(self._config.hydra.job.config_name), *fixed]
        jobs = [_job(cell, fixed, shlex.join(study)) for cell in missing]
        if isinstance(self._launcher, CellSubmitter):
            self._launcher.submit_cells(jobs)
            return []
        results: list[CellResult] = []
        if self._canary and len(jobs) > 1 and not any_done:
            jobs.remove(canary := min(jobs, key=lambda job: (job.flops, job.state_bytes)))
            results += self._run_canary(canary)
        results += self._run_jobs(jobs)
        check_results(results)
        if isinstance(self._task, CommandTask):
            self._task.exit_code = EXIT_DONE  # every cell has its outcome, diverged ones too
        return [result.exit_code for result in results]

    def _run_canary(self, job: CellJob) -> list[CellResult]:
        """Run the smallest cell alone: what is wrong with all of them is seen before they start.

        Raises:
            StudyIncompleteError: it has no result; no other cell was started.
        """
        results = self._run_jobs([job])
        try:
            check_results(results)
        except StudyIncompleteError as error:
            others = "the smallest cell failed, so no other one was started"
            raise StudyIncompleteError(*error.problems, others) from error
        return results

    def _run_jobs(self, jobs: Sequence[CellJob]) -> list[CellResult]:
        """Through a launcher of ours, which knows cells, or any other, which knows overrides."""
        if isinstance(self._launcher, CellLauncher):
            return self._launcher.launch_cells(jobs)
        returns = self._launcher.launch([list(job.overrides) for job in jobs], initial_job_idx=0)
        return [result_of(job, returned) for job, returned in zip(jobs, returns, strict=True)]


def split_arguments(overrides: Iterable[Override]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Command-line overrides as (values per axis of the study, overrides for every cell).

    Raises:
        UserError: a sweep over something that is no axis.
    """
    axes: dict[str, tuple[str, ...]] = {}
    fixed: list[str] = []
    for override in overrides:
        key = override.get_key_element().lstrip("+")  # an axis however it is set
        if key in AXES:
            values = override.sweep_string_iterator() if override.is_sweep_override() else None
            axes[key] = tuple(values or (override.get_value_element_as_str(),))
        elif override.is_sweep_override():
            raise UserError(
                f"{key}: a study sweeps over {', '.join(AXES)} only; start one study per value, "
                f"each with its own study=<name>"
            )
        else:
            fixed.append(str(override.input_line))
    return axes, fixed


def _corpora(runs: list[Run], *, may_stream: bool) -> dict[DataConfig, Corpus | None]:
    """The corpora that a study's runs read, each prepared once for the longest run.

    Without `may_stream`, a corpus that has yet to come over a network is None.
    """
    tokens: dict[DataConfig, int] = {}
    for run in runs:
        try:
            needed = plan_run(run, None).plan.tokens
        except InfeasibleError:
            needed = 0
        tokens[run.data] = max(needed, tokens.get(run.data, 0))
    return {
        data: prepare(data, needed) if may_stream else find_prepared(data)
        for data, needed in tokens.items()
    }


def _update_refusals(cells: list[StudyCell], corpora: Mapping[DataConfig, Corpus | None]) -> None:
    """Write the records of refused cells; remove those of cells that are refused no longer."""
    for cell in cells:
        refusal = infeasible_record(cell.run, corpora[cell.run.data], "")
        folder = cell.run.study_folder / refusal.run_id
        if cell.planned is None and cell.record:
            write_record(cell.record, folder)
        elif (folder / RECORD).exists():
            shutil.rmtree(folder)


def _plan(cell: Cell, run: Run, corpus: Corpus | None) -> StudyCell:
    try:
        planned = plan_run(run, corpus)
    except InfeasibleError as error:
        return StudyCell(cell, run, None, infeasible_record(run, corpus, str(error)))
    return StudyCell(cell, run, planned, find_record(planned.folder))


def _refuse_twins(cells: list[StudyCell]) -> None:
    """Raise if two labels stand for one model: it would be trained twice, in one folder."""
    labels: dict[str, str] = {}
    problems = {}
    for cell in cells:
        if cell.planned:
            own = cell.cell.variant
            first = labels.setdefault(cell.planned.run_id, own)
            if first != own:
                problems[first, own] = f"variants {first} and {own} are the same model; drop one"
    if problems:
        raise UserError(*problems.values())


def _job(cell: StudyCell, fixed: list[str], study: str) -> CellJob:
    planned = cell.planned
    assert planned is not None
    return CellJob(
        # What the command line says comes last and so beats the study.
        overrides=(*cell.cell.overrides(), *fixed),
        name=run_name(cell.run),
        run_id=planned.run_id,
        folder=planned.folder,
        flops=planned.plan.flops,
        state_bytes=state_bytes(planned),
        fields=planned.record_fields(),
        command=f"{study} {' '.join(cell.cell.axes())}",
    )


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _study(values: Mapping[str, Any]) -> Study:
    """The study that `hydra.sweeper` describes: a variant without settings may be null there."""
    problems: list[str] = []
    values = {name: _plain(value) for name, value in values.items()}
    variants = values.get("variants")
    if isinstance(variants, Mapping):
        own = {str(label): {} if given is None else given for label, given in variants.items()}
        values = {**values, "variants": own}
    study = bind(Study, values, "hydra.sweeper.", problems)
    if problems:
        raise UserError(*problems)
    return study
