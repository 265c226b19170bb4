"""`hydra/launcher: local`: cells of a study side by side on this machine, a process for each."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import final

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from tqdm import tqdm

from peer_scaling import machine
from peer_scaling.claims import find_holder
from peer_scaling.cli import CommandTask, StudiesOnSearchPath, register_plugins
from peer_scaling.distributed import num_ranks
from peer_scaling.errors import EXIT_FAILED, EXIT_REQUEUE, UserError
from peer_scaling.jobs import CellJob, CellLauncher, CellResult
from peer_scaling.policy import RetryPolicy
from peer_scaling.pool import Pool, Slot
from peer_scaling.publish import write_record
from peer_scaling.record import TERMINAL, RunRecord, find_record
from peer_scaling.stop import STOP_SIGNALS

MAX_WORKERS = 1024


class LocalLauncher(CellLauncher):
    """Hydra plugin: one process per configuration, as many at a time as there are GPUs or groups of
    cores.
    """

    def __init__(self, workers: int | None = None, retries: int = 3) -> None:
        self._workers, self._retries = workers, retries

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `launch`."""
        for name, value, least in (
            ("workers", self._workers or 1, 1), ("retries", self._retries, 0)
        ):  # fmt: skip
            if type(value) is not int or not least <= value < MAX_WORKERS or self._workers == 0:
                given = getattr(self, f"_{name}")
                raise UserError(
                    f"hydra.launcher.{name}={given} must be in {least} to {MAX_WORKERS}"
                )
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
        self._run(work, len(calls))
        return [_returned(code) for code in work.exit_codes]

    def launch_cells(self, jobs: Sequence[CellJob]) -> list[CellResult]:
        """Run all cells, those that fail again by kind of failure; one result per job."""
        calls = [partial(self._job, n, job.overrides) for n, job in enumerate(jobs)]
        work = CellWork(jobs, calls, RetryPolicy(self._retries))
        self._run(work, len(jobs))
        return work.results()

    def _run(self, work: "CallWork | CellWork", count: int) -> None:
        available = machine.available_bytes(torch.device("cpu"))
        with _signals_interrupt(), tqdm(total=count, unit="cell", disable=None) as bar:
            work.bar = bar
            Pool(self._slots(), available).run(work, count)
        if isinstance(self._task, CommandTask):
            codes = (code if code >= 0 else EXIT_FAILED for code in work.exit_codes)
            self._task.exit_code = max([self._task.exit_code, *codes])

    def _slots(self) -> list[Slot]:
        gpus = _gpus(str(self._config.device))
        cores = max(1, available_cores() // int(self._config.threads or 1))
        number = self._workers or len(gpus) or cores
        if not gpus:
            return [Slot()] * number
        return [Slot({"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]}) for n in range(number)]


class CallWork:
    """Work of a pool: configurations of which nothing is known."""

    def __init__(self, calls: Sequence[Callable[[], int]]) -> None:
        self._calls = calls
        self.exit_codes = [EXIT_FAILED] * len(calls)
        self.bar: tqdm | None = None  # pyright: ignore[reportMissingTypeArgument]

    def ready(self, number: int) -> bool:
        """See `pool.Work`, as for the others."""
        return True

    def call(self, number: int) -> Callable[[], int]:
        """One configuration."""
        return self._calls[number]

    def memory(self, number: int) -> int:
        """Nothing is known of it."""
        return 0

    def hangs(self, number: int, pid: int) -> bool:
        """Nothing is known of it."""
        return False

    def ended(self, number: int, exit_code: int, error: str, hung: bool) -> float | None:
        """Every end is final."""
        self.exit_codes[number] = exit_code
        if self.bar is not None:
            self.bar.update()
        return None


@final
class CellWork(CallWork):
    """Work of a pool: cells of a study, with their folders."""

    def __init__(
        self, jobs: Sequence[CellJob], calls: Sequence[Callable[[], int]], policy: RetryPolicy
    ) -> None:
        super().__init__(calls)
        self._jobs, self._policy = jobs, policy
        self._retries = [0] * len(jobs)
        self._known = [_attempts(job) for job in jobs]
        self._errors = [""] * len(jobs)

    def results(self) -> list[CellResult]:
        """How each cell ended."""
        ends = zip(self._jobs, self.exit_codes, self._errors, strict=True)
        return [CellResult(*end) for end in ends]

    def ready(self, number: int) -> bool:
        """Not while another launcher's process has the run."""
        holder = find_holder(self._jobs[number].folder)
        return not (holder and holder.is_live)

    def memory(self, number: int) -> int:
        """What the run needs at least."""
        return self._jobs[number].state_bytes

    def hangs(self, number: int, pid: int) -> bool:
        """A process that holds its run past its lease: its heartbeat follows its steps."""
        holder = find_holder(self._jobs[number].folder)
        return bool(holder and holder.pid == pid and holder.is_silent)

    def ended(self, number: int, exit_code: int, error: str, hung: bool) -> float | None:
        """Again, if the policy says so; every failure is a line on the screen."""
        job = self._jobs[number]
        self._errors[number] = error
        record = find_record(job.folder)
        if record and record.status in TERMINAL:
            return super().ended(number, exit_code if exit_code > 0 else 0, error, hung)
        if exit_code == EXIT_REQUEUE and not self.ready(number):
            return 1.0  # another launcher's: not a failure, and looked at again
        if not error and _attempts(job) == self._known[number]:
            record = _crashed(job, self._known[number] + 1, exit_code, hung)
        self._known[number] = _attempts(job)
        failure = "error" if error else record and record.failure
        delay = self._policy.delay(failure, self._retries[number])
        reason = error or (record and record.reason)
        if delay is None:
            print(f"{job.name}: failed, {reason}", flush=True)
            return super().ended(number, exit_code or EXIT_FAILED, error, hung)
        self._retries[number] += 1
        tries = f"{self._retries[number]} of {self._policy.retries}"
        print(f"{job.name}: failed, {reason}; retry {tries} in {delay:.0f} s", flush=True)
        return delay


def _attempts(job: CellJob) -> int:
    record = find_record(job.folder)
    return record.attempts if record else 0


def _crashed(job: CellJob, attempt: int, exit_code: int, hung: bool) -> RunRecord:
    """The record of an attempt whose process left none."""
    how = f"ended by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit {exit_code}"
    reason = "no sign of life, killed" if hung else f"process {how} without a record"
    record = RunRecord(
        **job.fields,
        status="failed",
        reason=reason,
        failure="hung" if hung else "crashed",
        attempts=attempt,
    )
    try:
        write_record(record, job.folder)
    except OSError as problem:
        return replace(record, reason=f"{reason}, and none can be written ({problem.strerror})")
    return record


def _returned(exit_code: int) -> JobReturn:
    result = JobReturn(status=JobStatus.COMPLETED)
    result.return_value = exit_code if exit_code >= 0 else EXIT_FAILED
    return result


def _gpus(device: str) -> list[str]:
    """Names of the GPUs that runs are spread over; none if they are to run elsewhere."""
    if device not in ("auto", "cuda") or not torch.cuda.device_count():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]


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


def available_cores() -> int:
    """Cores that this process may use, in a container or job fewer than there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
