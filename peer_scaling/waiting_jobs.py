"""Hydra's own launcher for Slurm, with jobs that end as their cells do.

The plugin's jobs are COMPLETED to Slurm whatever became of them (Hydra's issue 1928), and one that
ended without a result would be an exception in place of the results of all.
"""

import atexit
import os
import sys
from collections.abc import Sequence
from typing import Any, final
from unittest.mock import patch

from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from submitit import JobEnvironment, SlurmJob
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

from peer_scaling.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_REQUEUE,
    UserError,
    first_line,
    traceback_text,
)
from peer_scaling.jobs import error_of
from peer_scaling.requeue import ask_for_requeue_when_stopped
from peer_scaling.slurm import SlurmError


@final
class SlurmJobsLauncher(SlurmLauncher):
    """Submits all jobs as one array and waits for them; the object itself is what a job calls."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run every list of overrides as a job; what each returned, in the order given.

        Raises:
            UserError: Slurm does not accept them.
        """
        try:
            with patch.object(SlurmJob, "results", _results):
                return super().launch(job_overrides, initial_job_idx)
        except (FailedJobError, FailedSubmissionError, RuntimeError, OSError) as error:
            raise UserError(f"Slurm: {first_line(error)}") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted, the jobs go on; scancel ends them") from None

    def __call__(self, *arguments: Any) -> JobReturn:
        """Run one in its job; the process ends with the exit code of the run."""
        ask_for_requeue_when_stopped(JobEnvironment())
        end = _End()
        atexit.register(end)  # now, to be called after those of what the run imports
        returned = super().__call__(*arguments)
        error = error_of(returned)
        if error:
            print(traceback_text(error), file=sys.stderr)
        code = EXIT_FAILED if error else int(returned.return_value)
        if code == EXIT_REQUEUE:
            sys.exit(code)  # without a result: it is to end another time, and to be waited for
        end.code = code
        return returned


@final
class _End:
    """Ends the process with another exit code than submitit's, which is 0 when it has a result."""

    def __init__(self) -> None:
        self.code = EXIT_DONE

    def __call__(self) -> None:
        if self.code != EXIT_DONE:
            os._exit(self.code)


_waited = SlurmJob.results


def _results(job: SlurmJob[JobReturn]) -> list[JobReturn]:
    """`SlurmJob.results`, with a failure for a job that left none: cancelled, killed, node lost."""
    try:
        return _waited(job)
    except (UncompletedJobError, FailedJobError):
        text = f"job {job.job_id} left no result: {job.state.lower()}; {job.paths.stderr}"
        failed = JobReturn(status=JobStatus.FAILED)
        failed.return_value = SlurmError(text)
        return [failed]
