"""The training loop: one planned run from where it stands to its final evaluation.

A run that is killed anywhere and started again ends with the bits of one that never was: data and
schedule are functions of the step, and a checkpoint has the rest (snapshot.py).
"""

import time
from typing import Any, final

import torch

from peer_scaling import machine
from peer_scaling.data import Corpus, TrainingBatches, Windows
from peer_scaling.display import Progress, run_name
from peer_scaling.distributed import ALONE, World
from peer_scaling.evaluate import Evaluation
from peer_scaling.history import Course, History
from peer_scaling.optim import lr_factor, make_optimizer
from peer_scaling.parallel import spread
from peer_scaling.planned import PlannedRun
from peer_scaling.prepare import prepare
from peer_scaling.publish import save_weights
from peer_scaling.run import Run
from peer_scaling.saver import Saver
from peer_scaling.snapshot import TrainingState
from peer_scaling.step import Stepper, pick_device, read_results
from peer_scaling.stop import StopFlag, StoppedError
from peer_scaling.track import Tracker

READ_STEPS = 16
"""The device is waited for at least this often: a divergence is seen, and a save made, no later."""


def train(
    planned: PlannedRun,
    tracker: Tracker,
    course: Course,
    stop: StopFlag,
    world: World = ALONE,
) -> dict[str, Any]:
    """Train the model of a planned run, from its newest checkpoint if it has one; evaluate it, and
    probe what it sees.

    Args:
        planned: what to train.
        tracker: mirror of the history.
        course: kept up to date, line by line of the history.
        stop: asked after every step.
        world: the ranks that train it together.

    Returns:
        The fields of the record that only training determines; `causality_gate`, what the gate
        found in a word, and `leak`, why the numbers must not be used, or None.

    Raises:
        DivergedError: loss or gradient norm is not finite, or the loss rose and stayed up.
        StoppedError: a signal came; the run is saved.
        NoDurableCheckpointError: saves were due, and none could be written.
    """
    run, plan = planned.run, planned.plan
    device = world.place(pick_device(run.settings.device))
    machine.reset_peak_memory(device)
    corpus = prepare(run.data, plan.tokens)
    saver = Saver(planned, lambda: _fresh_state(run, world, device), world=world)
    earlier = _resume(planned, saver, course, world)
    state = saver.state
    stepper = Stepper(run, state.model, state.optimizer, device, state.parallel)
    shown = run.settings.progress if world.is_first else "off"
    with (
        Progress(planned.run_id, plan, shown) as progress,
        History(planned, tracker, progress, earlier, world) as history,
    ):
        loop = Loop(planned, corpus, stepper, saver, history, course, stop)
        evaluation, causal_losses, leak = loop.run()
    peak_memory = machine.peak_memory_bytes(device)
    if run.settings.save_model:
        save_weights(state.model, planned.folder, world)
    report = stepper.probe()
    digest = state.digest()
    world.check_same(digest)
    return {
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte(corpus.validation_bytes(evaluation.tokens)),
        "val_tokens": evaluation.tokens,
        "causal_losses": causal_losses,
        "expert_usage": evaluation.expert_usage,
        "expert_unevenness": evaluation.expert_unevenness,
        "expert_usage_growth": {str(n): u for n, u in evaluation.expert_usage_growth.items()},
        "state_digest": digest,
        "peak_memory_bytes": peak_memory,
        "causality_gate": report.outcome(run.ffw.causal),
        "leak": world.first(lambda: report.reason(run.ffw.causal) or leak),
    }


@final
class Loop:
    """The training loop of one run: the same steps, losses and lines wherever it was cut."""

    def __init__(
        self,
        planned: PlannedRun,
        corpus: Corpus,
        stepper: Stepper,
        saver: Saver,
        history: History,
        course: Course,
        stop: StopFlag,
    ) -> None:
        self._run, self._plan, self._corpus = planned.run, planned.plan, corpus
        self._stepper, self._saver, self._history = stepper, saver, history
        self._course, self._stop = course, stop
        self._began = time.perf_counter()
        data, settings = self._run.data, self._run.settings
        windows = Windows(corpus, "train", data.context)
        own_B = stepper.world.own_sequences(settings.batch_size, self._run.forward_sequences)
        self._batches = TrainingBatches(windows, settings.batch_size, data.seed, data.order, own_B)
        steps, eval_every = self._plan.steps, self._run.eval.every
        self._log_every = max(1, steps // settings.log_lines)
        self._eval_every = max(1, round(eval_every * steps)) if eval_every else steps

    def run(self) -> tuple[Evaluation, dict[str, float], str | None]:
        """All steps that are left, and the final evaluation, of a layer that is not causal by each
        of its causal routes too, and what leaks in those; see `train` for what it raises.
        """
        course = self._course
        try:
            while course.step < self._plan.steps:
                # Before the steps, not after them: a run continued here evaluates here too.
                if course.step and course.step % self._eval_every == 0:
                    self._evaluate()
                self._interval(self._next_steps())
                self._stop.check()
                if self._saver.due(course.step):
                    self._save()
            evaluation = self._evaluate()
            check, steps = self._stop.check, self._plan.steps
            causal = self._stepper.causal_losses(self._corpus, self._batches, steps, check)
        except StoppedError as error:
            saved = self._save()
            where = f"saved after step {course.step}" if saved else "not saved"
            raise StoppedError(f"{error}, {where}") from None
        self._saver.check_durable(self._save)
        return evaluation, *causal

    def _evaluate(self) -> Evaluation:
        evaluation = self._stepper.evaluate(self._corpus, self._stop.check)
        self._history.evaluation(self._course, evaluation)
        return evaluation

    def _interval(self, steps: range) -> None:
        """Updates without waiting for the device, then a line of the history if one is due."""
        began = time.perf_counter()
        results, factor = [], 0.0
        for step in steps:
            factor = lr_factor(self._run.optim, step, self._plan.steps)
            results.append(self._stepper.step(self._batches.batch(step), factor))
            if self._stop.poll():
                break
        updates = read_results(results)
        self._course.add(updates, time.perf_counter() - began)
        step = self._course.step
        if step % self._log_every == 0 or step == self._plan.steps:
            self._history.training(self._course, updates[-1].norm, factor * self._run.lr)

    def _next_steps(self) -> range:
        every = (READ_STEPS, self._log_every, self._eval_every, self._saver.every_steps)
        return next_interval(self._course.step, self._plan.steps, *every)

    def _save(self) -> bool:
        facts = self._course.facts(time.perf_counter() - self._began)
        return self._saver.save(self._course.losses, self._history.lines, facts)


def next_interval(first: int, steps: int, *every: int | None) -> range:
    """Steps from `first` to the next multiple of any of `every`, or to the last of `steps`."""
    return range(first, min([steps, *(n * (first // n + 1) for n in every if n)]))


def _fresh_state(run: Run, world: World, device: torch.device) -> TrainingState:
    model = run.model().to(device)
    shape = (run.forward_sequences // world.size, run.data.context + 1)
    tokens_BT = torch.zeros(shape, dtype=torch.int64, device=device)
    parallel = spread(model, run.settings.parallel, world, tokens_BT)
    optimizer = make_optimizer(run.optim, model.optim_groups(), run.lr)
    return TrainingState(model, optimizer, parallel)


def _resume(planned: PlannedRun, saver: Saver, course: Course, world: World) -> str:
    """Continue where the newest checkpoint is, and say so first of all; its history."""
    resumed = saver.resume()
    if resumed is None:
        _say(f"{run_name(planned.run)}: fresh", world)
        return ""
    snapshot, losses = resumed
    course.continue_from(losses, snapshot.state)
    digest = snapshot.digest[:8]
    _say(f"{run_name(planned.run)}: resumed from step {course.step} (digest {digest})", world)
    return snapshot.history


def _say(line: str, world: World) -> None:
    if world.is_first:
        print(line, flush=True)
