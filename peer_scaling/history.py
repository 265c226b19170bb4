"""The course of a run: one line per logged step for the file, the tracker and the screen."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, final

from peer_scaling.display import Progress
from peer_scaling.distributed import ALONE, World
from peer_scaling.divergence import SUSTAINED_STEPS, sustained_spike
from peer_scaling.durable import write_atomically
from peer_scaling.errors import first_line
from peer_scaling.evaluate import Evaluation
from peer_scaling.planned import PlannedRun
from peer_scaling.record import HISTORY, REWOUND
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
    logged: int = 0
    """Losses that lines of the history stand for."""
    earlier_seconds: float = 0.0
    """Wall time of the attempts that this one continues."""

    def add(self, updates: Sequence[Update], seconds: float) -> None:
        """Count updates that took `seconds` together.

        Raises:
            DivergedError: one of them was not made, and those before it are counted; or the loss
                rose and stayed up (divergence.py).
        """
        bad = next((n for n, update in enumerate(updates) if not update.finite), None)
        made = updates[:bad]
        self.step += len(made)
        self.train_seconds += seconds * len(made) / len(updates)
        judged = len(self.losses) - SUSTAINED_STEPS + 1
        self.losses += [update.loss for update in made]
        if bad is not None:
            raise DivergedError(f"loss {updates[bad].loss}, gradient norm {updates[bad].norm}")
        spike = sustained_spike(self.losses, judged)
        if spike is not None:
            raise DivergedError(
                f"loss {self.losses[spike - 1]:.4g} at step {spike}, {self.losses[spike]:.4g} at "
                f"the next, and no better for {SUSTAINED_STEPS} steps"
            )

    def facts(self, wall_seconds: float) -> dict[str, Any]:
        """What a checkpoint keeps of it beside the losses."""
        return {
            "train_seconds": self.train_seconds,
            "logged": self.logged,
            "wall_seconds": self.earlier_seconds + wall_seconds,
        }

    def continue_from(self, losses: list[float], facts: Mapping[str, Any]) -> None:
        """Become what it was when `facts` were taken."""
        self.step, self.losses, self.logged = len(losses), losses, facts["logged"]
        self.train_seconds = facts["train_seconds"]
        self.earlier_seconds = facts["wall_seconds"]

    @property
    def final_loss(self) -> float | None:
        """Mean training loss over the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail) if tail else None


@final
class History:
    """Writes each line to `history.jsonl`, the tracker and the progress display."""

    def __init__(
        self,
        planned: PlannedRun,
        tracker: Tracker,
        progress: Progress,
        earlier: str,
        world: World = ALONE,
    ) -> None:
        """Begins with the lines `earlier`; what the file holds beyond them is set aside. Only the
        first rank of `world` has a file.
        """
        self._planned, self._tracker, self._progress = planned, tracker, progress
        path = planned.folder / HISTORY if world.is_first else Path(os.devnull)
        if world.is_first:
            rewind(path, earlier)
        self._lines, self._syncs = earlier, world.is_first
        self._file = path.open("ab", buffering=0)
        self._pending = b""  # what the disk did not take

    def __enter__(self) -> "History":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Raises OSError if the run ended well and the disk does not have all lines."""
        with self._file:
            if kind is None and self._syncs:
                self._flush()
                os.fsync(self._file.fileno())

    @property
    def lines(self) -> str:
        """All lines so far, on the disk or not: a checkpoint has its own copy."""
        return self._lines

    def training(self, course: Course, norm: float, lr: float) -> None:
        """Mean loss since the last line, gradient norm, learning rate and speed."""
        recent = course.losses[course.logged :]
        course.logged = len(course.losses)
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
        text = json.dumps(line) + "\n"
        self._lines += text
        self._write_down(text.encode())
        self._tracker.log(line)

    def _write_down(self, data: bytes) -> None:
        """Append to the file; what a full disk does not take waits for the next line."""
        waiting, self._pending = bool(self._pending), self._pending + data
        try:
            self._flush()
        except OSError as error:
            if not waiting:
                print(f"history NOT written: {first_line(error)}; training goes on", flush=True)

    def _flush(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]


def rewind(path: Path, kept: str) -> None:
    """Make a history hold the lines `kept`; further ones move to `history-rewound.jsonl`."""
    there = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    further = there.removeprefix(kept)
    if further:
        with path.with_name(REWOUND).open("a", encoding="utf-8") as file:
            file.write(further if further.endswith("\n") else further + "\n")
    # Always a new file: a process that lost the run has the old one open, and may write to it yet.
    write_atomically(path, kept, "history")
