"""What a sweeper hands to a launcher, and what it gets back: one cell of a study, to be run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from peer_scaling.errors import EXIT_FAILED, StudyIncompleteError, first_line, shown
from peer_scaling.policy import FailurePolicy
from peer_scaling.record import RunRecord, find_record
from peer_scaling.text import aligned

COLUMNS = ("run", "state", "attempts", "last step", "cause", "again with")
"""Of the table of failures."""


@dataclass(frozen=True)
class CellJob:
    """A cell that is to be run."""

    overrides: tuple[str, ...]
    """What makes Hydra compose its configuration from the study's."""
    name: str
    """Variant, size, budget and seed, for people."""
    run_id: str
    folder: Path
    """Of the run: success means that it holds a record."""
    flops: float
    """Training FLOPs."""
    state_bytes: int
    """Memory for parameters, moments and gradients: what the run needs at least."""
    fields: Mapping[str, Any]
    """The fields of its record that are known before it runs."""
    command: str
    """Runs it again, alone."""


@dataclass(frozen=True)
class CellResult:
    """How the process of a cell ended; what became of the run is in its folder."""

    job: CellJob
    exit_code: int
    """Of `errors`; negative: the signal that ended the process."""
    error: str = ""
    """What ended it before the run had a record, as `ValueError: ...`."""
    started: bool = True
    """False: not even tried, because another cell had failed."""

    @property
    def record(self) -> RunRecord | None:
        """Of the run as it is now: the final one, else of the newest attempt."""
        return find_record(self.job.folder)

    @property
    def has_ended(self) -> bool:
        """Whether the run has its result, a divergence too."""
        record = self.record
        return record is not None and record.is_final

    @property
    def cause(self) -> str:
        """Why it has no result, or no good one, in one line."""
        record = self.record
        ended = f"ended without a record ({self.error or f'exit code {self.exit_code}'})"
        return shown(record.reason if record else ended)

    def row(self) -> tuple[str, ...]:
        """Of the table of failures, by `COLUMNS`."""
        record, job = self.record, self.job
        if record is None:
            return (job.run_id, "failed", "", "", self.cause, job.command)
        step = "" if record.last_step is None else str(record.last_step)
        attempts = str(record.attempts)
        return (job.run_id, record.status, attempts, step, self.cause, job.command)


class CellLauncher(Launcher, ABC):
    """A launcher that knows cells, and not only their overrides."""

    @abstractmethod
    def launch_cells(self, jobs: Sequence[CellJob], policy: FailurePolicy) -> list[CellResult]:
        """Run all jobs, again where the policy says so; one result per job, in their order."""


class CellSubmitter(Launcher, ABC):
    """A launcher that hands cells to somebody else's queue and does not wait for them."""

    @abstractmethod
    def submit_cells(self, jobs: Sequence[CellJob]) -> None:
        """Hand over all jobs that are not there already."""


def result_of(job: CellJob, returned: JobReturn) -> CellResult:
    """What another launcher returned for a cell."""
    error = error_of(returned)
    if error is None:
        return CellResult(job, int(returned.return_value))
    return CellResult(job, EXIT_FAILED, f"{type(error).__name__}: {first_line(error)}")


def error_of(returned: JobReturn) -> BaseException | None:
    """What ended the task of a job, if something did."""
    if returned.status is JobStatus.COMPLETED:
        return None
    return returned._return_value  # asking for `return_value` would raise it


def failure_table(results: Sequence[CellResult]) -> str:
    """Every cell that was started and is not done, in one table; empty if there is none."""
    failed = [r for r in results if r.started and (r.record is None or r.record.status != "done")]
    return "\n".join(aligned([COLUMNS, *(result.row() for result in failed)])) if failed else ""


def check_results(results: Sequence[CellResult]) -> None:
    """Make sure that every cell has a result.

    Raises:
        StudyIncompleteError: some have none; with the table of failures.
    """
    missing = [result for result in results if not result.has_ended]
    if missing:
        unstarted = sum(not result.started for result in missing)
        others = f", {unstarted} of them not started because another failed" if unstarted else ""
        raise StudyIncompleteError(
            f"{len(missing)} of {len(results)} cells have no result{others}; the same command "
            f"starts them again",
            details=failure_table(results),
        )
