"""What a pool does for a launcher: configurations, or cells of a study, which are tried again."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

from peer_scaling.claims import find_holder
from peer_scaling.errors import EXIT_FAILED, EXIT_REQUEUE
from peer_scaling.jobs import CellJob, CellResult
from peer_scaling.policy import FailurePolicy
from peer_scaling.pool import Work
from peer_scaling.publish import write_record
from peer_scaling.record import RunRecord, find_record
from peer_scaling.tally import Earlier, earlier_of


@final
class CallWork(Work):
    """Configurations of which nothing is known: every end is final."""

    def ended(self, number: int, exit_code: int, error: str, hung: bool) -> None:
        """Keeps the exit code."""
        self.exit_codes[number] = exit_code


@final
class CellWork(Work):
    """Work of a pool: cells of a study, with their folders."""

    def __init__(
        self, jobs: Sequence[CellJob], calls: Sequence[Callable[[], int]], policy: FailurePolicy
    ) -> None:
        super().__init__(calls)
        self._jobs, self._policy = jobs, policy
        self._retries = [0] * len(jobs)
        self._known = [_attempts(find_record(job.folder)) for job in jobs]
        self._errors = [""] * len(jobs)
        self._over = [False] * len(jobs)
        """Whether it has ended for good."""
        self._failed = False
        self._killed = [False] * len(jobs)

    def results(self) -> list[CellResult]:
        """How each cell ended."""
        ends = zip(self._jobs, self.exit_codes, self._errors, self._over, strict=True)
        return [CellResult(*end) for end in ends]

    @property
    def stopped(self) -> bool:
        """Once a cell has failed for good, if the policy is to stop then."""
        return self._failed and self._policy.stops

    def name(self, number: int) -> str:
        """Variant, size, budget and seed."""
        return self._jobs[number].name

    def flops(self, number: int) -> float:
        """Training FLOPs."""
        return self._jobs[number].flops

    def earlier(self) -> Earlier:
        """The study's cells that are not launched."""
        return earlier_of(self._jobs[0].folder.parent, {job.run_id for job in self._jobs})

    def ready(self, number: int) -> bool:
        """Not while another launcher's process has the run."""
        holder = find_holder(self._jobs[number].folder)
        return not (holder and holder.is_live)

    def memory(self, number: int) -> int:
        """What the run needs at least."""
        return self._jobs[number].state_bytes

    def alone(self, number: int) -> bool:
        """After a kill that was not ours: most likely the kernel's, for want of memory."""
        return self._killed[number]

    def hangs(self, number: int, pid: int) -> bool:
        """A process that holds its run past its lease: its heartbeat follows its steps."""
        holder = find_holder(self._jobs[number].folder)
        return bool(holder and holder.pid == pid and holder.is_silent)

    def ended(self, number: int, exit_code: int, error: str, hung: bool) -> float | None:
        """Again, if the policy says so; every failure is a line on the screen."""
        job = self._jobs[number]
        self._errors[number] = error
        self._killed[number] = exit_code == -signal.SIGKILL and not hung
        record = find_record(job.folder)
        if record and record.is_final:
            return self._end(number, max(exit_code, 0))
        if exit_code == EXIT_REQUEUE and not self.ready(number):
            return 1.0  # another launcher's: not a failure, and looked at again
        if not error and _attempts(record) == self._known[number]:
            record = _crashed(job, self._known[number] + 1, exit_code, hung)
        self._known[number] = _attempts(find_record(job.folder))
        failure = "error" if error else record and record.failure
        delay = self._policy.delay(failure, self._retries[number])
        reason = error or (record and record.reason)
        if delay is None or self.stopped:
            print(f"{job.name}: failed, {reason}", flush=True)
            self._failed = True
            return self._end(number, exit_code or EXIT_FAILED)
        self._retries[number] += 1
        tries = f"{self._retries[number]} of {self._policy.retries}"
        print(f"{job.name}: failed, {reason}; retry {tries} in {delay:.0f} s", flush=True)
        return delay

    def _end(self, number: int, exit_code: int) -> None:
        self.exit_codes[number], self._over[number] = exit_code, True


def _attempts(record: RunRecord | None) -> int:
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
