"""When a run counts as diverged, from its training losses alone."""

from collections.abc import Sequence
from statistics import median

RISE_NATS = 1.0
"""A loss this far above the median of those before it is a spike: e times the perplexity, where
losses of neighbouring batches differ by 0.1 to 0.2 (docs/log.md)."""
WINDOW_STEPS = 100
"""Losses that the median is taken over."""
SUSTAINED_STEPS = 16
"""A spike of so many steps in a row is a divergence; a shorter one heals."""


def sustained_spike(losses: Sequence[float], first: int = 0) -> int | None:
    """0-based step at which a sustained spike begins; None if there is none.

    Args:
        losses: training loss of every step so far, nats per token.
        first: steps before this one are known to begin no sustained spike.

    The reference of a spike is the median of the `WINDOW_STEPS` losses before its first step. A
    rule on the numbers, and no setting: every run of every study is judged alike.
    """
    for step in range(max(1, first), len(losses) - SUSTAINED_STEPS + 1):
        limit = median(losses[max(0, step - WINDOW_STEPS) : step]) + RISE_NATS
        if losses[step] > limit and min(losses[step : step + SUSTAINED_STEPS]) > limit:
            return step
    return None
