"""`hydra/launcher: local`: cells of a study side by side, each in a worker process."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from tqdm import tqdm

from peer_scaling.cli import CommandTask, StudiesOnSearchPath, register_plugins
from peer_scaling.distributed import num_ranks
from peer_scaling.errors import EXIT_FAILED, EXIT_REQUEUE, UserError
from peer_scaling.stop import STOP_SIGNALS

MAX_WORKERS = 1024
GRACE_SECONDS = 120.0
"""For a worker whose launcher is gone: to save its run and close its tracker."""


class LocalLauncher(Launcher):
    """Hydra plugin: a pool of worker processes, one configuration at a time in each."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `launch`."""
        workers = 1 if self._workers is None else self._workers
        if type(workers) is not int or not 0 < workers < MAX_WORKERS:
            raise UserError(f"hydra.launcher.workers={self._workers} must be in 1 to {MAX_WORKERS}")
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
        """Run every list of overrides; what each returned, in the order given.

        A worker that dies takes the pool with it: jobs that had not ended then return failure, and
        the next launch of the study runs them.
        """
        context = get_context("spawn")  # threads of torch and W&B would not survive a fork
        alive, held = context.Pipe(duplex=False)
        with (
            _signals_interrupt(),
            ProcessPoolExecutor(self._num_workers(), context, _start_worker, (alive,)) as pool,
        ):
            jobs = {
                pool.submit(self._job, number, list(overrides)): number
                for number, overrides in enumerate(job_overrides, initial_job_idx)
            }
            try:
                finished = tqdm(as_completed(jobs), total=len(jobs), unit="cell", disable=None)
                done = [(jobs[job], _result(job)) for job in finished]
            except KeyboardInterrupt:
                held.close()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        results = [result for _, result in sorted(done, key=lambda pair: pair[0])]
        if isinstance(self._task, CommandTask):
            codes = [r.return_value for r in results if r.status is JobStatus.COMPLETED]
            self._task.exit_code = max([self._task.exit_code, *codes])
        return results

    def _num_workers(self) -> int:
        if self._workers:
            return self._workers
        return max(1, available_cores() // int(self._config.threads or 1))


class LocalJob:
    """What a worker needs to run a configuration; picklable."""

    def __init__(
        self, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._hydra_context = hydra_context
        self._task_function = task_function
        # Workers compose their own; the sweeper's part may hold types that cannot be sent.
        self._config = config.copy()
        with open_dict(self._config):
            self._config.hydra.sweeper = {}

    def __call__(self, number: int, overrides: list[str]) -> JobReturn:
        """Compose and run one configuration in this process, which ends if it is stopped."""
        try:
            return self._run(number, overrides)
        except KeyboardInterrupt:
            os._exit(EXIT_REQUEUE)  # not back to the pool, which has the next cell ready

    def _run(self, number: int, overrides: list[str]) -> JobReturn:
        register_plugins(StudiesOnSearchPath)
        setup_globals()
        loader = self._hydra_context.config_loader
        config = loader.load_sweep_config(self._config, overrides)
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
        result.hydra_cfg = None  # may hold types that cannot be sent back
        return result


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


def _start_worker(alive: Connection) -> None:
    """Make this worker end with its parent, however that ends, and quietly when interrupted."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_REQUEUE))
    threading.Thread(target=_follow, args=(alive,), daemon=True).start()


def _follow(alive: Connection) -> None:
    """End this process when the other end of the pipe is closed: a run saves first."""
    with suppress(EOFError):
        alive.recv_bytes()
    # Not SIGINT, which a terminal has sent already: the second one leaves a run at once.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(EXIT_REQUEUE)


def available_cores() -> int:
    """Cores that this process may use, in a container or job fewer than there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _result(job: "Future[JobReturn]") -> JobReturn:
    try:
        return job.result()
    except BrokenProcessPool:
        died = JobReturn(status=JobStatus.COMPLETED)
        died.return_value = EXIT_FAILED
        return died
