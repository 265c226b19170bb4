"""One attempt to train a run: its record, whatever happens, unless it was stopped or taken away."""

import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from peer_scaling import machine
from peer_scaling.claims import Claim
from peer_scaling.distributed import World
from peer_scaling.errors import traceback_text, without_secrets
from peer_scaling.history import Course
from peer_scaling.loop import train
from peer_scaling.planned import PlannedRun
from peer_scaling.publish import PublishedError, write_record
from peer_scaling.record import RunRecord, budget_label
from peer_scaling.saver import NoDurableCheckpointError
from peer_scaling.step import DivergedError, pick_device, product_dtype, torch_settings
from peer_scaling.stop import LostRunError, StopFlag
from peer_scaling.track import NullTracker, RunLabels, Tracker, start_tracker


@dataclass(frozen=True)
class Attempt:
    """One try to train a run, by all ranks of `world`."""

    number: int
    """Counts from 1; those before it failed."""
    stop: StopFlag
    world: World
    own: Claim | None
    """On the first rank."""


def make_attempt(planned: PlannedRun, attempt: Attempt) -> RunRecord:
    """Train, and write a record in every outcome but an interruption."""
    stop, world = attempt.stop, attempt.world
    started, course = time.perf_counter(), Course()
    tracker: Tracker = NullTracker()
    if world.is_first:
        planned.folder.mkdir(parents=True, exist_ok=True)
        tracker = start_tracker(planned.run.tracker, _labels(planned), planned.folder)
    results: dict[str, Any] = {}
    status, reason, failure = "done", None, None
    try:
        with torch_settings(planned.run):
            device = world.place(pick_device(planned.run.settings.device))
            results["environment"] = machine.environment(device) | world.facts()
            dtype = product_dtype(planned.run.settings.precision)
            peak = world.size * machine.matmul_peak(device, dtype)
            results["matmul_peak_flops_per_second"] = peak
            results |= train(planned, tracker, course, stop, world)
        results["environment"] |= {"causality_gate": results.pop("causality_gate", None)}
        if leak := results.pop("leak", None):
            status, reason = "invalid", leak
    except LostRunError:
        tracker.finish(None)
        raise
    except DivergedError as error:
        status, reason = "diverged", f"after step {course.step}: {error}"
    except Exception as error:  # whatever it is, the record says so and a study goes on
        reason = f"{type(error).__name__}: {without_secrets(str(error))}"
        status, failure, text = "failed", _failure(error), traceback_text(error)
        world.report(failure, reason)
        if other := world.reported():
            failure = other[0] if failure == "error" else failure
            reason = f"{reason}; {other[1]}"
        print(text, end="", file=sys.stderr)
        if world.is_first:
            with suppress(OSError):  # a full disk, which the next lines say
                (planned.folder / "error.txt").write_text(text)
        traceback.clear_frames(error.__traceback__)  # they hold the model
    except BaseException:  # stopped: no record, the next start continues
        tracker.finish(None)
        raise
    record = RunRecord(
        **_measured(planned, course, results.get("matmul_peak_flops_per_second")),
        **results,
        status=status,
        reason=reason,
        failure=failure,
        attempts=attempt.number,
        wall_seconds=course.earlier_seconds + time.perf_counter() - started,
    )
    if world.is_first:
        record = _published(record, planned, attempt)
    tracker.finish(record)
    return record


def _published(record: RunRecord, planned: PlannedRun, attempt: Attempt) -> RunRecord:
    """The record, written if the run is still this process's.

    Raises:
        LostRunError: it is another one's, which has or will have a record of its own.
    """
    try:
        write_record(record, planned.folder, attempt.own.check if attempt.own else bool)
    except PublishedError as error:
        raise LostRunError(str(error)) from error
    except OSError as error:  # what is not written down has not happened
        if attempt.own:
            attempt.own.check()  # whoever took the run over deletes what is half written
        failure = "transient" if machine.is_transient(error) else "error"
        lost = {"status": "failed", "failure": failure, "reason": f"no record written: {error}"}
        return replace(record, **lost)
    return record


def attempt_smaller(planned: PlannedRun, failed: RunRecord, attempt: Attempt) -> RunRecord:
    """Once more after an attempt ran out of memory, with a smaller micro-batch.

    From the newest checkpoint or from step 0, never from what is in memory: the optimiser may have
    updated some parameters and not the others, and gradients may hold part of a batch.
    """
    machine.release_memory()
    print(
        f"{planned.run_id}: out of memory after step {failed.last_step}; once more, with "
        f"micro_batch={planned.run.forward_sequences}",
        flush=True,
    )
    return make_attempt(planned, replace(attempt, number=failed.attempts + 1))


def _failure(error: Exception) -> str:
    """Kind of a failure, one of `FAILURES`."""
    if machine.is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, NoDurableCheckpointError):
        return "no_durable_checkpoint"
    return "transient" if machine.is_transient(error) else "error"


def _measured(planned: PlannedRun, course: Course, peak: float | None) -> dict[str, Any]:
    """The fields of a record that are known however the run ended."""
    tokens = course.step * planned.plan.batch_tokens
    speed = tokens / course.train_seconds if course.train_seconds else None
    flops_per_second = speed and speed * planned.cost.flops_per_token
    return {
        **planned.record_fields(),
        "last_step": course.step,
        "train_loss": course.final_loss,
        "train_seconds": course.train_seconds,
        "tokens_per_second": speed,
        "flops_per_second": flops_per_second,
        "utilisation": flops_per_second and peak and flops_per_second / peak,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": machine.git_commit(),
    }


def _labels(planned: PlannedRun) -> RunLabels:
    run = planned.run
    tags = (run.variant, run.size, budget_label(planned.plan.budget))
    return RunLabels(planned.run_id, run.settings.study, tags, run.describe())
