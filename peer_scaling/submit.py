"""`hydra/launcher: slurm`: missing cells of a study as Slurm job arrays, through submitit, without
waiting for them.
"""

import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, final

from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from peer_scaling.cli import run_command
from peer_scaling.config import bind
from peer_scaling.errors import UserError, check, first_line, shown
from peer_scaling.jobs import CellJob, CellSubmitter
from peer_scaling.launcher import LocalLauncher
from peer_scaling.slurm import (
    SBATCH_RULE,
    SBATCH_TEXT,
    max_array_size,
    require_job_id,
    task_states,
)
from peer_scaling.slurm_job import CellJobCall
from peer_scaling.submissions import LOGS, Submission, read_submissions, write_submission
from peer_scaling.sweeper import IsoflopSweeper

OWN_OVERRIDES = ("hydra/launcher=", "hydra.mode=")


@dataclass(frozen=True)
class SlurmConfig:
    """What a job array asks of the cluster; keys as in Hydra's launcher for submitit."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    timeout_min: int = 60
    max_num_timeout: int = 3
    signal_delay_s: int = 120
    array_parallelism: int = 256
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int | None = None
    mem_gb: float | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}={shown(repr(value))} must be {SBATCH_RULE}"
            for name, value in asdict(self).items()
            if isinstance(value, str) and not SBATCH_TEXT.fullmatch(value)
        ]
        problems += [
            f"{name}={value} must be at least {least}"
            for name, least in {
                "timeout_min": 1, "max_num_timeout": 0, "signal_delay_s": 1,
                "array_parallelism": 1, "tasks_per_node": 1, "cpus_per_task": 1,
                "gpus_per_node": 0, "mem_gb": 0,
            }.items()
            if (value := getattr(self, name)) is not None and not value >= least
        ]  # fmt: skip
        if self.signal_delay_s >= 60 * self.timeout_min:
            problems.append(
                f"signal_delay_s={self.signal_delay_s} must be below the {60 * self.timeout_min} "
                f"seconds of timeout_min={self.timeout_min}: a run would be told to stop at once"
            )
        check(problems)

    def sbatch(self, job_name: str) -> dict[str, Any]:
        """Parameters of submitit's executor: sbatch's names."""
        values = asdict(self)
        values.pop("max_num_timeout")  # submitit's own, not sbatch's
        memory = values.pop("mem_gb")
        values |= {
            "job_name": job_name,
            "time": values.pop("timeout_min"),
            "ntasks_per_node": values.pop("tasks_per_node"),
            "mem": None if memory is None else f"{int(memory * 1024)}M",
            "additional_parameters": {"requeue": True},  # where a site's default is not to
        }
        return {name: value for name, value in values.items() if value is not None}


@final
class SlurmLauncher(CellSubmitter):
    """Hydra plugin: submits cells, writes down what was submitted, and is done."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before the launch.

        Raises:
            UserError: the options are none of a Slurm job.
        """
        del hydra_context, task_function
        problems: list[str] = []
        self._slurm = bind(SlurmConfig, self._values, "hydra.launcher.", problems)
        if problems:
            raise UserError(*problems)
        self._config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Refuse: jobs that nobody waits for return nothing."""
        raise UserError("peer-sweep submits studies only (hydra/sweeper=isoflop)")

    def submit_cells(self, jobs: Sequence[CellJob]) -> None:
        """Submit the cells that are not waiting or running already, in as few arrays as may be.

        Raises:
            UserError: Slurm does not answer, or does not accept them.
        """
        study = jobs[0].folder.parent
        waiting = active_runs(study)
        missing = [job for job in jobs if job.run_id not in waiting]
        if len(missing) < len(jobs):
            print(f"{len(jobs) - len(missing)} cells are in Slurm's queue already")
        # Long ones first, and cells of one length together.
        missing.sort(key=lambda job: -job.flops)
        for batch in batches(missing, max_array_size()):
            submission = self._submit(study, batch)
            print(f"{len(batch)} cells submitted as Slurm array {submission.job_id}", flush=True)
        print(f"how they are: peer-sweep status {study.name}")

    def _submit(self, study: Path, jobs: Sequence[CellJob]) -> Submission:
        logs = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
        try:
            # Made first: Slurm may start a job before submitit makes a folder named by its id.
            (study / LOGS / logs).mkdir(parents=True)
            executor = SlurmExecutor(study / LOGS / logs, self._slurm.max_num_timeout)
            executor.update_parameters(**self._slurm.sbatch(study.name))
            with executor.batch():
                tasks = [
                    executor.submit(CellJobCall(), job.run_id, *self._arguments(job))
                    for job in jobs
                ]
        except (FailedJobError, FailedSubmissionError, RuntimeError, OSError) as error:
            raise UserError(f"sbatch: {first_line(error)}") from error
        submission = Submission(
            job_id=require_job_id(tasks[0].job_id.split("_")[0]),
            job_name=study.name,
            config_name=str(self._config.hydra.job.config_name),
            config_dir=self._config_dir(),
            arguments=tuple(self._overrides()),
            run_ids=tuple(job.run_id for job in jobs),
            logs=logs,
            submitted_at=datetime.now(UTC).isoformat(),
        )
        write_submission(study, submission)
        return submission

    def _arguments(self, job: CellJob) -> list[str]:
        """Of `peer-train`, for this cell alone."""
        folder = self._config_dir()
        own = ["--config-dir", folder] if folder else []
        name = str(self._config.hydra.job.config_name)
        return [
            *own,
            "--config-name",
            name,
            "hydra.mode=RUN",
            "hydra/launcher=basic",
            *job.overrides,
        ]

    def _overrides(self) -> Iterator[str]:
        given = self._config.hydra.overrides
        for override in (*given.hydra, *given.task):
            if not str(override).startswith(OWN_OVERRIDES):
                yield str(override)

    def _config_dir(self) -> str | None:
        for source in self._config.hydra.runtime.config_sources:
            if source.provider == "command-line":
                return str(source.path)
        return None


def active_runs(study: Path) -> set[str]:
    """Run ids of the cells that wait or run in Slurm.

    Raises:
        UserError: Slurm's queue cannot be asked.
    """
    submissions, _ = read_submissions(study)
    states, problems = task_states({one.job_id: one.job_name for one in submissions})
    unasked = [problem for problem in problems if problem.startswith("squeue")]
    if unasked:
        raise UserError(*(f"{line}; what is queued already is not known" for line in unasked))
    return {
        run_id
        for one in submissions
        for index, run_id in enumerate(one.run_ids)
        if (state := states.get((one.job_id, index))) and state.active
    }


def batches(jobs: Sequence[CellJob], largest: int) -> Iterator[Sequence[CellJob]]:
    """The jobs in order, in parts of `largest` at most."""
    for start in range(0, len(jobs), largest):
        yield jobs[start : start + largest]


def submit_study(study: str, config_dir: str | None, overrides: Sequence[str]) -> NoReturn:
    """Plan a study as `peer-train` does and submit what is missing; ends the process.

    Args:
        study: name of its config.
        config_dir: a folder of further configs.
        overrides: as of `peer-train`.
    """
    own = ["--config-name", study, *(["--config-dir", config_dir] if config_dir else [])]
    sys.argv = ["peer-sweep", *own, "hydra/launcher=slurm", *overrides]
    run_command(_NoStudy(study), IsoflopSweeper, LocalLauncher, SlurmLauncher)


@final
class _NoStudy:
    """The task of a configuration that is one run: not to be trained where one submits."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, config: DictConfig) -> int:
        raise UserError(f"{self._name}: one run and no study; peer-sweep submits studies (sweeps/)")
