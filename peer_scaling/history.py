"""The course of a run: one line per logged step for the file, the tracker and the screen."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from peer_scaling.display import Progress
from peer_scaling.evaluate import Evaluation
from peer_scaling.planned import PlannedRun
from peer_scaling.step import DivergedError, Update
from peer_scaling.track import Tracker


@dataclass
class Course:
    """How far a run got; mutable, so that a run that stops early can say so."""

    step: int = 0
    """Updates done."""
    train_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Training loss of every step, nats per token."""

    def add(self, updates: Sequence[Update], seconds: float) -> None:
        """Count updates that took `seconds` together.

        Raises:
            DivergedError: one of them was not made; those before it are counted.
        """
        bad = next((n for n, update in enumerate(updates) if not update.finite), None)
        made = updates[:bad]
        self.step += len(made)
        self.train_seconds += seconds * len(made) / len(updates)
        self.losses += [update.loss for update in made]
        if bad is not None:
            raise DivergedError(f"loss {updates[bad].loss}, gradient norm {updates[bad].norm}")

    @property
    def final_loss(self) -> float | None:
        """Mean training loss over the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail) if tail else None


class History:
    """Writes each line to `history.jsonl`, the tracker and the progress display."""

    def __init__(
        self, planned: PlannedRun, file: TextIO, tracker: Tracker, progress: Progress
    ) -> None:
        self._planned, self._file = planned, file
        self._tracker, self._progress = tracker, progress
        self._logged = 0

    def training(self, course: Course, norm: float, lr: float) -> None:
        """Mean loss since the last line, gradient norm, learning rate and speed."""
        recent = course.losses[self._logged :]
        self._logged = len(course.losses)
        speed = self._tokens(course) / course.train_seconds
        metrics = {"loss": sum(recent) / len(recent), "grad_norm": norm, "lr": lr}
        self._write("train", course, {**metrics, "tokens_per_second": speed})
        self._progress.update(course.step, metrics["loss"], speed)

    def evaluation(self, course: Course, evaluation: Evaluation) -> None:
        """Validation loss and perplexity."""
        metrics = {"loss": evaluation.loss, "perplexity": evaluation.perplexity}
        self._write("eval", course, metrics)

    def _tokens(self, course: Course) -> int:
        return course.step * self._planned.plan.batch_tokens

    def _write(self, kind: str, course: Course, metrics: Mapping[str, float]) -> None:
        tokens = self._tokens(course)
        flops = tokens * self._planned.cost.flops_per_token
        line = {"step": course.step, "tokens": tokens, "flops": flops}
        line |= {f"{kind}/{name}": value for name, value in metrics.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._tracker.log(line)
