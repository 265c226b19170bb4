"""`hydra/launcher: local`: cells of a study side by side on this machine, a process for each."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from peer_scaling.board import make_board
from peer_scaling.cli import CommandTask, StudiesOnSearchPath, register_plugins
from peer_scaling.distributed import num_ranks
from peer_scaling.errors import EXIT_FAILED, UserError
from peer_scaling.jobs import CellJob, CellLauncher, CellResult
from peer_scaling.policy import FailurePolicy
from peer_scaling.pool import Pool, Work
from peer_scaling.slots import make_slots
from peer_scaling.stop import STOP_SIGNALS
from peer_scaling.work import CallWork, CellWork

MAX_WORKERS = 1024


class LocalLauncher(CellLauncher):
    """Hydra plugin: one process per configuration, as many at a time as there are GPUs or groups of
    cores.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `launch`."""
        workers = 1 if self._workers is None else self._workers
        if type(workers) is not int or not 1 <= workers < MAX_WORKERS:
            raise UserError(f"hydra.launcher.workers={workers} must be in 1 to {MAX_WORKERS}")
        if (size := num_ranks()) > 1:
            raise UserError(
                f"WORLD_SIZE={size}: torchrun trains one run on several devices; start a study "
                f"without it, one device for each run"
            )
        self._config, self._task = config, task_function
        self._job = LocalJob(hydra_context, task_function, config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run every list of overrides; what each returned, in the order given."""
        calls = [
            partial(self._job, number, list(overrides))
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        work = CallWork(calls)
        self._run(work)
        return [_returned(code) for code in work.exit_codes]

    def launch_cells(self, jobs: Sequence[CellJob], policy: FailurePolicy) -> list[CellResult]:
        """Run all cells, those that fail again by kind of failure; one result per job."""
        if not jobs:
            return []
        calls = [partial(self._job, n, job.overrides) for n, job in enumerate(jobs)]
        work = CellWork(jobs, calls, policy)
        self._run(work)
        return work.results()

    def _run(self, work: Work) -> None:
        threads = self._config.threads
        slots = make_slots(str(self._config.device), threads and int(threads), self._workers)
        with _signals_interrupt():
            Pool(slots).run(work, make_board)
        if isinstance(self._task, CommandTask):
            codes = (code if code >= 0 else EXIT_FAILED for code in work.exit_codes)
            self._task.exit_code = max([self._task.exit_code, *codes])


def _returned(exit_code: int) -> JobReturn:
    result = JobReturn(status=JobStatus.COMPLETED)
    result.return_value = exit_code if exit_code >= 0 else EXIT_FAILED
    return result


class LocalJob:
    """What a process needs to run a configuration; picklable."""

    def __init__(
        self, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._hydra_context = hydra_context
        self._task_function = task_function
        # Processes compose their own; the sweeper's part may hold types that cannot be sent.
        self._config = config.copy()
        with open_dict(self._config):
            self._config.hydra.sweeper = {}

    def __call__(self, number: int, overrides: Sequence[str]) -> int:
        """Compose and run one configuration in this process; its exit code."""
        register_plugins(StudiesOnSearchPath)
        setup_globals()
        loader = self._hydra_context.config_loader
        config = loader.load_sweep_config(self._config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        result = run_job(
            hydra_context=self._hydra_context,
            task_function=self._task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        return int(result.return_value)  # raises what the job raised


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Whatever asks the launcher to stop acts as an interrupt: it waits for its workers to save."""

    def interrupt(number: int, frame: object) -> None:
        del frame
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    others = [s for s in STOP_SIGNALS if s is not signal.SIGINT]
    previous = {number: signal.signal(number, interrupt) for number in others}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
