"""The missing cells of a study, through any launcher: the smallest one first, again by kind of
failure, and no further ones where that is asked for.
"""

import time
from collections.abc import Sequence
from typing import final

from hydra.plugins.launcher import Launcher

from peer_scaling.claims import find_holder
from peer_scaling.errors import EXIT_FAILED, EXIT_REQUEUE
from peer_scaling.jobs import CellJob, CellLauncher, CellResult, result_of
from peer_scaling.policy import FailurePolicy
from peer_scaling.record import find_record

HELD_SECONDS = 2.0
"""Between looks at runs that other launchers have."""


@final
class Launching:
    """One launch of a study."""

    def __init__(self, launcher: Launcher, policy: FailurePolicy, canary: bool) -> None:
        """`canary`: the first run of all is the smallest one, alone."""
        self._launcher, self._policy, self._canary = launcher, policy, canary
        self._halted = False

    @property
    def halted(self) -> bool:
        """Whether a failure forbids to start anything more."""
        return self._halted

    def run(self, jobs: Sequence[CellJob], *, any_done: bool) -> list[CellResult]:
        """Run all jobs, long ones first: the last ones to end are then short and leave no core
        idle. Those of a budget go as they are given, size by size: their FLOPs differ by rounding,
        and what a study has when it is stopped can be compared. One result per job, in any order.

        Args:
            jobs: cells without a result.
            any_done: whether the study has a result: a canary would tell nothing then.
        """
        jobs = sorted(jobs, key=lambda job: -job.fields["budget"])
        if not self._canary or any_done or len(jobs) < 2:
            results = self._run(jobs)
        else:
            results = self._run_canary_first(jobs)
        stops = self._policy.stops and not all(result.has_ended for result in results)
        self._halted = stops or not all(result.started for result in results)
        return results

    def _run_canary_first(self, jobs: Sequence[CellJob]) -> list[CellResult]:
        """What is wrong with all cells is seen in the smallest one, before the others start."""
        canary = min(jobs, key=lambda job: (job.flops, job.state_bytes))
        others = [job for job in jobs if job is not canary]
        (result,) = self._run([canary])
        rest = self._run(others) if result.has_ended else map(_unstarted, others)
        return [result, *rest]

    def _run(self, jobs: Sequence[CellJob]) -> list[CellResult]:
        if isinstance(self._launcher, CellLauncher):
            return self._launcher.launch_cells(jobs, self._policy)
        return self._run_in_rounds(jobs)

    def _run_in_rounds(self, jobs: Sequence[CellJob]) -> list[CellResult]:
        """Through a launcher that knows overrides only: a retry is a launch of its own."""
        results = {job.run_id: _unstarted(job) for job in jobs}
        waiting, retries = list(jobs), 0
        while waiting:
            attempts = {job.run_id: _attempts(job) for job in waiting}
            launched = self._launch(waiting)
            results |= {result.job.run_id: result for result in launched}
            delays = {}
            for result in (result for result in launched if not result.has_ended):
                run_id = result.job.run_id
                delay = self._delay(result, attempts[run_id], retries)
                delays |= {} if delay is None else {run_id: delay}
                again = "" if delay is None else f"; again in {delay:.0f} s"
                print(f"{result.job.name}: failed, {result.cause}{again}", flush=True)
                if delay is None and self._policy.stops:
                    return list(results.values())
            waiting = [job for job in waiting if job.run_id in delays]
            time.sleep(max(delays.values(), default=0.0))
            retries += 1
        return list(results.values())

    def _launch(self, jobs: Sequence[CellJob]) -> list[CellResult]:
        """Start every job; wait for those that another launcher has."""
        # Hydra's own launcher runs one after another, so it can stop in between.
        alone = self._policy.stops and _is_hydras_own(self._launcher)
        results: list[CellResult] = []
        for group in [[job] for job in jobs] if alone else [jobs]:
            overrides = [list(job.overrides) for job in group]
            returns = self._launcher.launch(overrides, initial_job_idx=len(results))
            results += map(result_of, group, returns)
            if alone and not results[-1].has_ended:
                break
        for job in (r.job for r in results if r.exit_code == EXIT_REQUEUE):
            while (holder := find_holder(job.folder)) and holder.is_live:
                time.sleep(HELD_SECONDS)
        return results

    def _delay(self, result: CellResult, attempts: int, retries: int) -> float | None:
        """Seconds until the next attempt; `attempts` are those before the present one."""
        record = result.record
        failure = record.failure if record and record.attempts > attempts else "error"
        # Left to another process, which has ended without a result, or stopped and saved.
        return self._policy.delay(
            "transient" if result.exit_code == EXIT_REQUEUE else failure, retries
        )


def _is_hydras_own(launcher: Launcher) -> bool:
    """By name: Hydra imports its plugins anew, so that there are two classes of each."""
    return any(kind.__name__ == "BasicLauncher" for kind in type(launcher).__mro__)


def _attempts(job: CellJob) -> int:
    record = find_record(job.folder)
    return record.attempts if record else 0


def _unstarted(job: CellJob) -> CellResult:
    return CellResult(job, EXIT_FAILED, started=False)
