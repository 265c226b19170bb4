"""A study as a Hydra sweep: paired cells instead of a product, and only what is missing.

Used by the files in `sweeps/` as `hydra/sweeper: isoflop`. Each cell becomes a list of overrides,
so any Hydra launcher can run it. Success of a cell is its record, not a return value.
"""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from peer_scaling.candidates import Adaptive
from peer_scaling.cells import StudyCell, plan_text, summary_line, write_plan
from peer_scaling.cli import CommandTask
from peer_scaling.config import bind
from peer_scaling.display import run_name
from peer_scaling.errors import EXIT_DONE, UserError
from peer_scaling.finished import leave_stamp
from peer_scaling.jobs import CellJob, CellResult, CellSubmitter, check_results, failure_table
from peer_scaling.launching import Launching
from peer_scaling.plan import Study, enumerate_cells, restrict
from peer_scaling.policy import FailurePolicy
from peer_scaling.preflight import check_disk, state_bytes
from peer_scaling.rounds import rounds
from peer_scaling.study_cells import CellPlanner, update_refusals

AXES = ("variant", "ffw", "size", "budget", "seed")


class IsoflopSweeper(Sweeper):
    """Hydra plugin: enumerates a study's cells or chooses them, skips what is done, launches the
    rest.
    """

    def __init__(
        self,
        canary: bool = True,
        retries: int = 3,
        on_failure: str = "continue",
        adaptive: Any = None,
        **study: Any,
    ) -> None:
        self._canary, self._adaptive_values, self._values = canary, adaptive, study
        self._policy_values = {"retries": retries, "on_failure": on_failure}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `sweep`.

        Raises:
            UserError: the study is not one.
        """
        problems: list[str] = []
        policy = bind(FailurePolicy, self._policy_values, "hydra.sweeper.", problems)
        chosen = _plain(self._adaptive_values)
        self._adaptive = _adaptive(chosen, problems)
        self._study = _study(self._values, chosen, problems)
        if problems:
            raise UserError(*problems)
        self._config, self._loader = config, hydra_context.config_loader
        self._task = task_function
        self._launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self._launching = Launching(self._launcher, policy, self._canary)

    def sweep(self, arguments: list[str]) -> list[int]:
        """Run the study, restricted and overridden by the command line's arguments.

        Returns:
            Exit codes of the launched cells.

        Raises:
            UserError: a cell's configuration is wrong; nothing was launched.
            StudyIncompleteError: a cell ended without a result.
        """
        parser = OverridesParser.create(config_loader=self._loader)
        axes, self._fixed = split_arguments(parser.parse_overrides(arguments))
        planner = CellPlanner(self._config, self._loader, self._fixed)
        if self._adaptive and "size" not in axes:
            results = self._sweep_in_rounds(self._adaptive, axes, planner)
        else:
            results = self._sweep_cells(restrict(self._study, axes), planner, bool(axes))
        check_results(results)
        if table := failure_table(results):
            print(table, flush=True)
        if results and isinstance(self._task, CommandTask):
            self._task.exit_code = EXIT_DONE  # every cell has its outcome, diverged ones too
        return [result.exit_code for result in results]

    def _sweep_cells(
        self, study: Study, planner: CellPlanner, keep_missing: bool
    ) -> list[CellResult]:
        cells = planner.plan(enumerate_cells(study))
        results = self._run(cells, keep_missing=keep_missing)
        if not cells[0].run.settings.dry_run:
            leave_stamp(self._task, cells, planner.corpora, keep_missing=keep_missing)
        return results

    def _sweep_in_rounds(
        self, adaptive: Adaptive, axes: Iterable[str], planner: CellPlanner
    ) -> list[CellResult]:
        """Round after round, until nothing more is chosen or one cannot be run to its end."""
        if axes:
            raise UserError(
                f"{', '.join(axes)}: this study chooses its cells, evenly over all its variants; "
                f"give size= as well to run certain cells, or change hydra.sweeper"
            )
        results: list[CellResult] = []
        present = None
        for present in rounds(adaptive, self._study, planner):
            if present.cells and not present.is_open:
                continue  # an earlier launch ran it
            if not (present.cells or present.earlier):
                raise UserError(*present.endings())
            print(present.text(), flush=True)
            if not present.dry_run:
                present.write_decisions()
            results += self._run([*present.earlier, *present.cells], keep_missing=True)
            if self._launching.halted or present.dry_run or self._hands_over:
                return results
        if present:  # the last one, which asks for nothing
            leave_stamp(self._task, present.earlier, planner.corpora, keep_missing=True)
        return results

    @property
    def _hands_over(self) -> bool:
        return isinstance(self._launcher, CellSubmitter)

    def _run(self, cells: Sequence[StudyCell], *, keep_missing: bool) -> list[CellResult]:
        """Show the plan; unless that is all that is asked for, write it and run what is missing."""
        if cells[0].run.settings.dry_run:
            print(plan_text(cells))
            return []
        missing = [cell for cell in cells if cell.to_run]
        self._check_disk(missing)
        update_refusals(cells)
        write_plan(cells, cells[0].run.study_folder, keep_missing=keep_missing)
        print(summary_line(cells), flush=True)
        study = ["peer-train", "--config-name", str(self._config.hydra.job.config_name)]
        command = shlex.join([*study, *self._fixed])
        jobs = [_job(cell, self._fixed, command) for cell in missing]
        if not jobs:
            return []
        if isinstance(self._launcher, CellSubmitter):
            self._launcher.submit_cells(jobs)
            return []
        return self._launching.run(jobs, any_done=any(cell.state == "done" for cell in cells))

    def _check_disk(self, cells: Sequence[StudyCell]) -> None:
        missing = [cell.planned for cell in cells if cell.planned]
        launcher = self._config.hydra.launcher
        together = launcher.get("workers") or launcher.get("array_parallelism") or os.cpu_count()
        if missing:
            check_disk(missing, int(together or 1))


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


def _adaptive(values: Any, problems: list[str]) -> Adaptive | None:
    if values is None:
        return None
    if not isinstance(values, Mapping):
        problems.append(f"hydra.sweeper.adaptive={values} must be keys with values, or null")
        return None
    return bind(Adaptive, values, "hydra.sweeper.adaptive.", problems)


def _study(values: Mapping[str, Any], chosen: Any, problems: list[str]) -> Study:
    """The study that `hydra.sweeper` describes: a variant without settings may be null there, and
    one that chooses its sizes says at which budgets only.
    """
    values = {name: _plain(value) for name, value in values.items()}
    variants = values.get("variants")
    if isinstance(variants, Mapping):
        own = {str(label): {} if given is None else given for label, given in variants.items()}
        values = {**values, "variants": own}
    if isinstance(chosen, Mapping) and isinstance(values.get("ladder"), list):
        values = _with_sizes(values, chosen.get("sizes"), problems)
    return bind(Study, values, "hydra.sweeper.", problems)


def _with_sizes(values: Mapping[str, Any], sizes: Any, problems: list[str]) -> dict[str, Any]:
    rungs = [rung for rung in values["ladder"] if isinstance(rung, Mapping)]
    if any("sizes" in rung for rung in rungs):
        problems.append("hydra.sweeper.ladder: sizes are chosen from adaptive.sizes; remove them")
    if values.get("seeds", [0]) != [0]:
        problems.append(f"hydra.sweeper.seeds={values['seeds']}: seeds are chosen; remove it")
    return {**values, "ladder": [{**rung, "sizes": sizes} for rung in rungs], "seeds": [0]}
