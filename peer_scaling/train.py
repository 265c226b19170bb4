"""The command `peer-train`: one planned run to its record.

The training loop is in `loop.py`, one update in `step.py`, one batch in `data.py`, the model in
`model.py`.
"""

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from omegaconf import DictConfig

from peer_scaling import machine, memory
from peer_scaling.checkpoint import remove_checkpoints
from peer_scaling.cli import run_command
from peer_scaling.config import run_from
from peer_scaling.display import PLAN_COLUMNS, plan_row, result_line, table_text
from peer_scaling.distributed import ALONE, World, joined
from peer_scaling.errors import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_OUT_OF_MEMORY,
    traceback_text,
    without_secrets,
)
from peer_scaling.estimate import Estimator
from peer_scaling.history import Course
from peer_scaling.launcher import LocalLauncher
from peer_scaling.loop import train
from peer_scaling.machine import is_out_of_memory
from peer_scaling.planned import PlannedRun, plan_run
from peer_scaling.preflight import check_disk, check_memory, check_run
from peer_scaling.prepare import find_prepared, prepare
from peer_scaling.publish import write_record
from peer_scaling.record import (
    RECORD,
    TERMINAL,
    RunRecord,
    budget_label,
    find_record,
    record_text,
)
from peer_scaling.saver import NoDurableCheckpointError
from peer_scaling.step import DivergedError, pick_device, product_dtype, torch_settings
from peer_scaling.stop import StopFlag, StoppedError
from peer_scaling.sweeper import IsoflopSweeper
from peer_scaling.track import NullTracker, RunLabels, Tracker, start_tracker


def main() -> None:
    """The console script `peer-train`."""
    run_command(task, IsoflopSweeper, LocalLauncher)


def task(config: DictConfig) -> int:
    """What Hydra runs for one configuration; returns the exit code.

    Raises:
        UserError: the configuration cannot be run; nothing has been written.
    """
    run = run_from(config)
    planned = check_run(run)
    if run.settings.dry_run:
        if os.environ.get("RANK", "0") != "0":
            return EXIT_DONE
        planned = plan_run(run, find_prepared(run.data))
        record = find_record(planned.closed_folder())
        state = record.status if record else "missing"
        row = plan_row(planned, state, Estimator().seconds(planned))
        print(table_text(PLAN_COLUMNS, [row]))
        return EXIT_DONE
    check_memory(planned)
    with joined(pick_device(run.settings.device), run.settings.rank_timeout_seconds) as world:
        corpus = world.once_per_machine(lambda: prepare(run.data, planned.plan.tokens))
        return exit_code(run_once(memory.settled(run, corpus), world))


def exit_code(record: RunRecord) -> int:
    """The exit code of a command that ended with this record."""
    if record.failure == "out_of_memory":
        return EXIT_OUT_OF_MEMORY
    return {"done": EXIT_DONE, "diverged": EXIT_DIVERGED}.get(record.status, EXIT_FAILED)


def run_once(planned: PlannedRun, world: World = ALONE) -> RunRecord:
    """Train a run unless its record says that it has ended; the record in either case. Called by
    all ranks of `world`; the first one writes and prints.

    Raises:
        StoppedError: a signal stopped it, and it is saved as far as it got.
        UserError: the disk has no room for its checkpoints, or a link at or in the run's folder
            leads out of the folder of runs; nothing was started.
    """
    earlier = _earlier_record(planned, world)
    if earlier and earlier.status in TERMINAL:
        if world.is_first:
            print(f"{earlier.status} before, not trained again: {planned.folder / RECORD}")
            remove_checkpoints(planned.folder)
        world.meet()
        return earlier
    world.first(lambda: check_disk([planned]))
    with StopFlag(world.largest) as stop:
        try:
            record = _attempt(planned, 1 + (earlier.attempts if earlier else 0), stop, world)
            if record.failure == "out_of_memory" and (run := memory.smaller(planned.run)):
                record = _attempt_smaller(replace(planned, run=run), record, stop)
        except StoppedError:
            world.meet()
            stop.chain()
            raise
        if world.is_first:
            if record.status in TERMINAL:
                remove_checkpoints(planned.folder)
            print(result_line(record), flush=True)
        if record.status in TERMINAL:
            world.meet()
    return record


def _earlier_record(planned: PlannedRun, world: World) -> RunRecord | None:
    def text() -> str | None:
        record = find_record(planned.closed_folder())
        return record and record_text(record)

    found = world.first(text)
    return RunRecord(**json.loads(found)) if found else None


def _attempt(planned: PlannedRun, attempts: int, stop: StopFlag, world: World) -> RunRecord:
    """Train, and write a record in every outcome but an interruption."""
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
        tracker.finish("interrupted", {})
        raise
    record = RunRecord(
        **_measured(planned, course, results.get("matmul_peak_flops_per_second")),
        **results,
        status=status,
        reason=reason,
        failure=failure,
        attempts=attempts,
        wall_seconds=course.earlier_seconds + time.perf_counter() - started,
    )
    if world.is_first:
        try:
            write_record(record, planned.folder)
        except OSError as error:  # what is not written down has not happened
            lost = {"status": "failed", "failure": "error", "reason": f"no record written: {error}"}
            record = replace(record, **lost)
    tracker.finish(record.status, {"loss": record.loss, "perplexity": record.perplexity})
    return record


def _attempt_smaller(planned: PlannedRun, failed: RunRecord, stop: StopFlag) -> RunRecord:
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
    return _attempt(planned, failed.attempts + 1, stop, ALONE)


def _failure(error: Exception) -> str:
    """Kind of a failure, one of `FAILURES`."""
    if is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, NoDurableCheckpointError):
        return "no_durable_checkpoint"
    return "error"


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


if __name__ == "__main__":
    # Under `python -m`, this file is `__main__`; workers must find `task` by its real name.
    from peer_scaling.train import main as entry

    entry()
