"""How much of a study a launch has done, does and has to do."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from peer_scaling.display import seconds_text
from peer_scaling.errors import EXIT_DIVERGED, EXIT_DONE
from peer_scaling.record import TERMINAL, budget_label
from peer_scaling.standing import standings

OUTCOMES = {EXIT_DONE: "done", EXIT_DIVERGED: "diverged"}
"""By exit code; every other one is a failure."""


@dataclass(frozen=True)
class Earlier:
    """Cells of the study that are not the launch's."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """Per state, as in `standing`."""
    flops: float = 0.0
    """Of those that have their outcome."""
    flops_left: float = 0.0


def earlier_of(folder: Path, run_ids: Collection[str]) -> Earlier:
    """The cells in a study's folder but those of some runs."""
    cells = [cell for cell in standings(folder)[0] if cell.run_id not in run_ids]
    return Earlier(
        Counter(cell.state for cell in cells),
        sum(cell.flops for cell in cells if cell.is_final),
        sum(cell.flops for cell in cells if not cell.is_final),
    )


@final
class Tally:
    """Counts, FLOPs and times of the cells of a launch."""

    def __init__(
        self,
        names: Sequence[str],
        flops: Sequence[float],
        num_slots: int,
        earlier: Earlier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`flops`: of each cell; zeros if nothing is known of them."""
        self.names, self._flops, self._num_slots = names, flops, num_slots
        self._earlier = earlier or Earlier()
        self._clock = clock
        self._started: dict[int, float] = {}
        self._outcomes: dict[int, str] = {}
        self._worked = self._seconds = 0.0
        # Of each cell what the time left is reckoned from.
        self._weights = flops if any(flops) else [1.0] * len(names)

    def started(self, number: int) -> None:
        """A cell runs."""
        self._started[number] = self._clock()

    def ended(self, number: int, exit_code: int | None) -> None:
        """It no longer does; without an exit code it waits to be tried again."""
        seconds = self._clock() - self._started.pop(number)
        if exit_code is None:
            return
        self._outcomes[number] = OUTCOMES.get(exit_code, "failed")
        if exit_code == EXIT_DONE:
            self._worked += self._weights[number]
            self._seconds += seconds

    @property
    def ages(self) -> list[tuple[str, float]]:
        """Name of each running cell, and seconds since its start."""
        now = self._clock()
        return [(self.names[n], now - since) for n, since in self._started.items()]

    @property
    def seconds_left(self) -> float | None:
        """At the speed of what this launch has done; None before anything is."""
        if not self._seconds:
            return None
        speed, now = self._worked / self._seconds, self._clock()
        open_ = [n for n in range(len(self.names)) if n not in self._outcomes]
        left = sum(self._weights[n] for n in open_)
        for number, since in self._started.items():
            left -= min(speed * (now - since), self._weights[number])
        return left / speed / max(1, min(self._num_slots, len(open_)))

    @property
    def flops(self) -> tuple[float, float]:
        """Training FLOPs of the study's cells with an outcome, and of all others."""
        ended = sum(self._flops[n] for n, how in self._outcomes.items() if how in TERMINAL)
        left = sum(self._flops) - ended
        return self._earlier.flops + ended, self._earlier.flops_left + left

    @property
    def counts(self) -> dict[str, int]:
        """Cells of the study per state, `left` for those that wait."""
        counts = Counter(self._earlier.counts) + Counter(self._outcomes.values())
        waiting = len(self.names) - len(self._outcomes) - len(self._started)
        states = ("done", "running", "failed")
        known = {state: counts.pop(state, 0) for state in states}
        known["running"] += len(self._started)
        counts["left"] += waiting + counts.pop("missing", 0) + counts.pop("interrupted", 0)
        return {**known, **counts}

    def text(self) -> str:
        """One line."""
        counts = self.counts
        parts = [f"{count} {state}" for state, count in counts.items() if count or state == "done"]
        cells = f"{sum(counts.values())} cells: {', '.join(parts)}"
        done, left = self.flops
        flops = f"; {_flops(done)} FLOPs done, {_flops(left)} left" if done + left else ""
        seconds = self.seconds_left
        wait = f"; {seconds_text(seconds)} left" if seconds else ""
        return f"{cells}{flops}{wait}"


def _flops(flops: float) -> str:
    return budget_label(float(f"{flops:.3g}")) if flops else "0"
