"""When a run is saved, and what happens if that fails: training goes on, and it is tried again."""

import time
from collections.abc import Callable
from typing import Any, final

from safetensors import SafetensorError

from peer_scaling.checkpoint import (
    FORWARD_SEQUENCES,
    CheckpointError,
    Checkpoints,
    Snapshot,
)
from peer_scaling.distributed import ALONE, World
from peer_scaling.errors import first_line
from peer_scaling.machine import git_commit
from peer_scaling.planned import SEMANTICS, PlannedRun
from peer_scaling.snapshot import TrainingState, put_back, share_snapshot, take_snapshot

FIRST_RETRY_SECONDS = 10.0
"""After a save that failed; doubled each time, up to the interval between saves."""


class NoDurableCheckpointError(Exception):
    """Saves were due, and not one could be written."""


@final
class Saver:
    """Saves one run and finds what an earlier attempt saved. Of several ranks the first one reads,
    writes and has the clock, and the others do as it says.
    """

    def __init__(
        self,
        planned: PlannedRun,
        build: Callable[[], TrainingState],
        clock: Callable[[], float] = time.monotonic,
        world: World = ALONE,
    ) -> None:
        self.state = build()
        """Model and optimiser of the run."""
        self._build, self._clock, self._world = build, clock, world
        self._gathers = world.is_first or planned.run.settings.parallel == "fsdp"
        self._config, self._identity = planned.run.checkpoint, planned.identity
        self._facts = {
            "tokens_per_step": planned.plan.batch_tokens,
            FORWARD_SEQUENCES: planned.run.forward_sequences,
            "data_fingerprint": planned.fingerprint,
            "semantics": SEMANTICS,
            "git_commit": git_commit(),
        }
        self._store = Checkpoints(planned.folder, self._config.keep)
        self._last = clock()
        self._wait = self._config.every_seconds or 0.0
        self._failed_in_a_row = 0
        self._error: str | None = None
        self._saved_step: int | None = None
        tokens = self._config.every_tokens
        self.every_steps = tokens and max(1, round(tokens / planned.plan.batch_tokens))
        """Steps between saves by tokens; None if there are none."""

    def resume(self) -> tuple[Snapshot, list[float]] | None:
        """Put the newest good checkpoint back; it and the loss of every step so far."""
        while snapshot := self._newest():
            try:
                losses = put_back(snapshot, self.state)
            except CheckpointError as error:
                if self._world.is_first:
                    self._store.reject(snapshot.step, str(error))
                self.state = self._build()  # what was there may be half overwritten
                continue
            self._saved_step = snapshot.step
            return snapshot, losses
        return None

    def due(self, step: int) -> bool:
        """Whether to save after this step: by tokens, or by the time since the last save."""
        by_tokens = bool(self.every_steps) and step % self.every_steps == 0
        by_time = self._config.every_seconds is not None or self._failed_in_a_row > 0
        own = by_tokens or (by_time and self._clock() - self._last >= self._wait)
        return self._world.any(own and self._world.is_first)

    def save(self, losses: list[float], history: str, facts: dict[str, Any]) -> bool:
        """Save the run after one step per loss; whether that step is durable now.

        A failure is a line on the screen, and `due` again after a while.
        """
        if not self._config.enabled or not losses:
            return False
        if self._saved_step == len(losses):
            return True
        began = self._clock()
        if not self._world.any(self._write(losses, history, facts)):
            self._failed(len(losses))
            return False
        self._saved_step, self._failed_in_a_row = len(losses), 0
        self._last = self._clock()
        stretched = (self._last - began) / self._config.max_share
        self._wait = max(self._config.every_seconds or 0.0, stretched)
        return True

    def check_durable(self, save: Callable[[], bool]) -> None:
        """At the end of training: if saves were due and none succeeded, `save` once more.

        Raises:
            NoDurableCheckpointError: that failed too.
        """
        if self._error and self._saved_step is None and not save():
            raise NoDurableCheckpointError(f"no durable checkpoint: {self._error}")

    def _newest(self) -> Snapshot | None:
        found = self._store.newest(self._identity) if self._world.is_first else None
        return share_snapshot(found, self._world)

    def _write(self, losses: list[float], history: str, facts: dict[str, Any]) -> bool:
        """Whether this rank made the run durable; only the first one tries to."""
        if not self._gathers:
            return False
        facts = self._facts | facts
        snapshot = take_snapshot(self.state, self._identity, losses, history, facts)
        if not self._world.is_first:
            return False
        try:
            self._store.save(snapshot)
        except (OSError, SafetensorError) as error:
            self._error = first_line(error)
            return False
        return True

    def _failed(self, step: int) -> None:
        self._failed_in_a_row += 1
        self._error = self._error or "the first rank says why"
        self._last = self._clock()
        backoff = FIRST_RETRY_SECONDS * 2 ** (self._failed_in_a_row - 1)
        self._wait = min(backoff, self._config.every_seconds or backoff)
        if self._world.is_first:
            print(
                f"checkpoint after step {step} NOT saved: {self._error}; training goes on, next "
                f"try in {self._wait:.0f} s",
                flush=True,
            )
