"""What a sweeper hands to a launcher, and what it gets back: one cell of a study, to be run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from peer_scaling.errors import EXIT_FAILED, StudyIncompleteError, first_line
from peer_scaling.record import find_record


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


class CellLauncher(Launcher, ABC):
    """A launcher that knows cells, and not only their overrides."""

    @abstractmethod
    def launch_cells(self, jobs: Sequence[CellJob]) -> list[CellResult]:
        """Run all jobs; one result per job, in their order."""


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


def check_results(results: Sequence[CellResult]) -> None:
    """Make sure that every cell has a result.

    Raises:
        StudyIncompleteError: a line for each that has none: cause, last step, and the command that
            runs it again.
    """
    problems = []
    for result in results:
        job, record = result.job, find_record(result.job.folder)
        if record and record.is_final:
            continue
        cause = f"ended without a record ({result.error or f'exit code {result.exit_code}'})"
        if record:
            step = "" if record.last_step is None else f" after step {record.last_step}"
            cause = f"{record.status}{step}: {record.reason}"
        problems.append(f"{job.run_id} {cause}; again with: {job.command}")
    if problems:
        raise StudyIncompleteError(*problems)
