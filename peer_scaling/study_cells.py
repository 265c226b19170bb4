"""From the cells of a study to what each would train: composed by Hydra, planned, checked."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from peer_scaling.cells import StudyCell
from peer_scaling.config import run_from
from peer_scaling.data import Corpus, DataConfig
from peer_scaling.errors import UserError
from peer_scaling.explain import explain
from peer_scaling.paths import closed_folder
from peer_scaling.plan import Cell, InfeasibleError
from peer_scaling.planned import infeasible_record, plan_run, run_id
from peer_scaling.preflight import check_machine, check_micro_batch, problems_of
from peer_scaling.prepare import find_prepared, prepare
from peer_scaling.publish import write_record
from peer_scaling.record import RECORD, find_record
from peer_scaling.run import Run


@final
class CellPlanner:
    """Plans cells under the overrides of one command line."""

    def __init__(self, config: DictConfig, loader: ConfigLoader, fixed: Sequence[str]) -> None:
        """`fixed`: overrides for every cell."""
        self._config, self._loader, self._fixed = config, loader, list(fixed)
        self._composed: dict[tuple[str, str], DictConfig] = {}
        self.corpora: dict[DataConfig, Corpus | None] = {}
        """That the cells planned so far read."""

    def plan(self, cells: Sequence[Cell], *, may_stream: bool = True) -> list[StudyCell]:
        """What becomes of every cell.

        Without `may_stream`, and in a dry run, a corpus that has yet to come over a network is
        None.

        Raises:
            UserError: the configuration of some is wrong; two are the same run; or the folder of
                the study is not its own.
        """
        runs = self._runs(cells)
        settings = runs[0].settings
        closed_folder(Path(settings.runs_dir), settings.study)
        corpora = _corpora(runs, may_stream=may_stream and not settings.dry_run)
        self.corpora |= corpora
        planned = [_plan(c, r, corpora[r.data]) for c, r in zip(cells, runs, strict=True)]
        _refuse_twins(planned)
        return planned

    def _runs(self, cells: Sequence[Cell]) -> list[Run]:
        """The run of every cell; the problems of all of them in one error.

        Hydra takes 0.1 s to compose a configuration: cells that differ in budget and seed only
        share one, resolved anew for each.
        """
        runs: list[Run] = []
        problems: list[str] = []
        refused: dict[str, tuple[Exception, list[str]]] = {}
        for cell in cells:
            model = (cell.variant, cell.size)
            if model not in self._composed:
                own = [*cell.overrides(), *self._fixed]
                try:
                    self._composed[model] = self._loader.load_sweep_config(self._config, own)
                except (HydraException, OmegaConfBaseException) as error:
                    refused.setdefault(str(error), (error, own))
                    continue
            config = self._composed[model]
            config.budget, config.seed = cell.budget, cell.seed
            problems += problems_of(lambda config=config: runs.append(run_from(config)))
        for error, own in refused.values():
            problems += self._explain(error, own)
        problems += [*check_machine(runs), *check_micro_batch(runs)]
        if problems:
            raise UserError(*dict.fromkeys(problems))
        return runs

    def _explain(self, error: Exception, overrides: list[str]) -> list[str]:
        """What Hydra did not accept of a cell."""
        name = self._config.hydra.job.config_name
        own = [*self._config.hydra.overrides.hydra, *overrides]
        return explain(error, self._loader, name, own)


def update_refusals(cells: Sequence[StudyCell]) -> None:
    """Write the records of refused cells; remove those of cells that are refused no longer."""
    for cell in cells:
        folder = cell.run.study_folder / cell.refusal_id
        if cell.planned is None and cell.record:
            write_record(cell.record, folder)
        elif (folder / RECORD).exists():
            shutil.rmtree(folder)


def _corpora(runs: list[Run], *, may_stream: bool) -> Mapping[DataConfig, Corpus | None]:
    """The corpora that a study's runs read, each prepared once for the longest run."""
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


def _plan(cell: Cell, run: Run, corpus: Corpus | None) -> StudyCell:
    refusal_id = run_id(run, None, corpus and corpus.fingerprint(run.data.order))
    try:
        planned = plan_run(run, corpus)
    except InfeasibleError as error:
        record = infeasible_record(run, corpus, str(error))
        return StudyCell(cell, run, None, record, refusal_id)
    return StudyCell(cell, run, planned, find_record(planned.folder), refusal_id)


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
