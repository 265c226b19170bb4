"""Training: one planned run to its record, and the command `peer-train`.

Read the loop in `train`; one update is `step.py`, one batch `data.py`, the model `model.py`.
"""

import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from omegaconf import DictConfig

from peer_scaling import machine
from peer_scaling.checkpoint import save_weights, state_digest
from peer_scaling.cli import run_command
from peer_scaling.config import run_from
from peer_scaling.data import TrainingBatches, Windows
from peer_scaling.display import PLAN_COLUMNS, Progress, plan_row, result_line, table_text
from peer_scaling.errors import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_FAILED,
    traceback_text,
    without_secrets,
)
from peer_scaling.estimate import Estimator
from peer_scaling.history import Course, History
from peer_scaling.launcher import LocalLauncher
from peer_scaling.optim import lr_factor, make_optimizer
from peer_scaling.planned import PlannedRun, plan_run
from peer_scaling.preflight import check_run
from peer_scaling.prepare import find_prepared, prepare
from peer_scaling.record import (
    HISTORY,
    RECORD,
    TERMINAL,
    RunRecord,
    budget_label,
    find_record,
    write_record,
)
from peer_scaling.step import (
    DivergedError,
    Stepper,
    pick_device,
    product_dtype,
    read_results,
    torch_settings,
)
from peer_scaling.sweeper import IsoflopSweeper
from peer_scaling.track import RunLabels, Tracker, start_tracker


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
        planned = plan_run(run, find_prepared(run.data))
        record = find_record(planned.closed_folder())
        state = record.status if record else "missing"
        row = plan_row(planned, state, Estimator().seconds(planned))
        print(table_text(PLAN_COLUMNS, [row]))
        return EXIT_DONE
    record = run_once(plan_run(run, prepare(run.data, planned.plan.tokens)))
    return {"done": EXIT_DONE, "diverged": EXIT_DIVERGED}.get(record.status, EXIT_FAILED)


def run_once(planned: PlannedRun) -> RunRecord:
    """Train a run unless its record says that it has ended; the record in either case.

    Raises:
        UserError: a link at or in the run's folder leads out of the folder of runs.
    """
    earlier = find_record(planned.closed_folder())
    if earlier and earlier.status in TERMINAL:
        print(f"{earlier.status} before, not trained again: {planned.folder / RECORD}")
        return earlier
    record = _attempt(planned, 1 + (earlier.attempts if earlier else 0))
    print(result_line(record), flush=True)
    return record


def train(planned: PlannedRun, tracker: Tracker, course: Course) -> dict[str, Any]:
    """Train the model of a planned run and evaluate it.

    Args:
        planned: what to train.
        tracker: mirror of the history.
        course: kept up to date, line by line of the history.

    Returns:
        The fields of the record that only training determines.

    Raises:
        DivergedError: loss or gradient norm is not finite.
    """
    run, plan = planned.run, planned.plan
    device = pick_device(run.settings.device)
    machine.reset_peak_memory(device)
    corpus = prepare(run.data, plan.tokens)
    windows = Windows(corpus, "train", run.data.context)
    batches = TrainingBatches(windows, run.settings.batch_size, run.data.seed, run.data.order)
    model = run.model().to(device)
    optimizer = make_optimizer(run.optim, model.optim_groups(), run.lr)
    stepper = Stepper(run, model, optimizer, device)
    log_every = max(1, plan.steps // run.settings.log_lines)
    eval_every = max(1, round(run.eval.every * plan.steps)) if run.eval.every else plan.steps
    with (
        (planned.folder / HISTORY).open("w", encoding="utf-8") as file,
        Progress(planned.run_id, plan, run.settings.progress) as progress,
    ):
        history = History(planned, file, tracker, progress)
        for steps in intervals(plan.steps, log_every, eval_every):
            began = time.perf_counter()
            factors = [lr_factor(run.optim, step, plan.steps) for step in steps]
            # The device is not waited for between the steps of an interval.
            results = [
                stepper.step(batches.batch(s), f) for s, f in zip(steps, factors, strict=True)
            ]
            updates = read_results(results)
            course.add(updates, time.perf_counter() - began)
            if course.step % log_every == 0 or course.step == plan.steps:
                history.training(course, updates[-1].norm, factors[-1] * run.lr)
            if course.step % eval_every == 0 and course.step < plan.steps:
                history.evaluation(course, stepper.evaluate(corpus))
        evaluation = stepper.evaluate(corpus)
        history.evaluation(course, evaluation)
    if run.settings.save_model:
        save_weights(model, planned.folder)
    return {
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte(corpus.validation_bytes(evaluation.tokens)),
        "val_tokens": evaluation.tokens,
        "expert_usage": evaluation.expert_usage,
        "expert_unevenness": evaluation.expert_unevenness,
        "state_digest": state_digest(model, optimizer),
        "peak_memory_bytes": machine.peak_memory_bytes(device),
    }


def intervals(steps: int, *every: int) -> Iterator[range]:
    """Consecutive ranges of the first `steps` steps, that end after each multiple of `every`."""
    ends = sorted({steps}.union(*(range(n, steps, n) for n in every)))
    for start, end in pairwise([0, *ends]):
        yield range(start, end)


def _attempt(planned: PlannedRun, attempts: int) -> RunRecord:
    """Train, and write a record in every outcome but an interruption."""
    started, course = time.perf_counter(), Course()
    planned.folder.mkdir(parents=True, exist_ok=True)
    tracker = start_tracker(planned.run.tracker, _labels(planned), planned.folder)
    results: dict[str, Any] = {}
    status, reason = "done", None
    try:
        with torch_settings(planned.run):
            device = pick_device(planned.run.settings.device)
            results["environment"] = machine.environment(device)
            dtype = product_dtype(planned.run.settings.precision)
            results["matmul_peak_flops_per_second"] = machine.matmul_peak(device, dtype)
            results |= train(planned, tracker, course)
    except DivergedError as error:
        status, reason = "diverged", f"after step {course.step}: {error}"
    except Exception as error:  # whatever it is, the record says so and a study goes on
        status, reason = "failed", f"{type(error).__name__}: {without_secrets(str(error))}"
        text = traceback_text(error)
        (planned.folder / "error.txt").write_text(text)
        print(text, end="", file=sys.stderr)
    except BaseException:  # interrupted: no record, the next start runs it again
        tracker.finish("interrupted", {})
        raise
    record = RunRecord(
        **_measured(planned, course, results.get("matmul_peak_flops_per_second")),
        **results,
        status=status,
        reason=reason,
        attempts=attempts,
        wall_seconds=time.perf_counter() - started,
    )
    write_record(record, planned.folder)
    tracker.finish(status, {"loss": record.loss, "perplexity": record.perplexity})
    return record


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
