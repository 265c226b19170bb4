"""From data to places in a panel: a logarithmic axis below, a linear one beside it.

Places are in units of the panel's view box, y downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 440.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 58.0, 28.0, 46.0
PADDING = 0.05
"""Of an axis, beyond the outermost point."""
NUM_TICKS = 6
"""At most about so many."""


@dataclass(frozen=True)
class Axes:
    """The ranges of a panel."""

    log_low: float
    log_high: float
    """Of ln x."""
    low: float
    high: float
    """Of y."""

    def x(self, value: float) -> float:
        """The place of a positive x, at the frame where it is beyond it."""
        share = (np.log(value) - self.log_low) / (self.log_high - self.log_low)
        return round(float(LEFT + np.clip(share, 0, 1) * (WIDTH - LEFT - RIGHT)), 1)

    def y(self, value: float) -> float:
        """The place of a y, at the frame where it is beyond it."""
        share = (value - self.low) / (self.high - self.low)
        return round(float(HEIGHT - BOTTOM - np.clip(share, 0, 1) * (HEIGHT - TOP - BOTTOM)), 1)

    def ticks_x(self) -> list[float]:
        """1, 2 and 5 times powers of ten, or fewer of them."""
        first, last = int(np.floor(self.log_low / np.log(10))), int(self.log_high / np.log(10)) + 1
        for leads in ((1, 2, 5), (1, 3), (1,)):
            found = [lead * 10.0**k for k in range(first, last + 1) for lead in leads]
            found = [x for x in found if self.log_low <= np.log(x) <= self.log_high]
            if len(found) <= NUM_TICKS:
                break
        return found[:: -(-len(found) // NUM_TICKS)] if found else []

    def ticks_y(self) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten."""
        raw = (self.high - self.low) / NUM_TICKS
        power = 10.0 ** np.floor(np.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        first, last = int(np.ceil(self.low / step)), int(np.floor(self.high / step))
        return [float(f"{k * step:.10g}") for k in range(first, last + 1)]


def axes_over(x: Sequence[float], y: Sequence[float]) -> Axes:
    """The ranges that hold all points, and a margin."""
    log_x = np.log(np.asarray(x))
    return Axes(*_padded(log_x.min(), log_x.max(), 0.1), *_padded(min(y), max(y), 1e-3))


def _padded(low: float, high: float, least: float) -> tuple[float, float]:
    margin = max(PADDING * (high - low), least)
    return float(low - margin), float(high + margin)
