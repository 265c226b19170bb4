"""What happens after an attempt of a cell failed: by kind, never by count alone."""

from dataclasses import dataclass
from typing import Literal

from peer_scaling.errors import check

RETRIED = ("transient", "crashed", "hung", "no_durable_checkpoint")
"""Kinds of failure that the next attempt may not meet. Not out of memory, which the run itself
answers with a smaller micro-batch, and no error of the program, which comes again."""
MAX_RETRIES = 1000


@dataclass(frozen=True)
class FailurePolicy:
    """How often, and after how long, a cell is tried again in one launch, and what else is run."""

    retries: int = 3
    first_seconds: float = 5.0
    """Before the first retry; four times as long before each further one."""
    on_failure: Literal["continue", "stop"] = "continue"
    """Whether other cells are still started once one has failed for good."""

    def __post_init__(self) -> None:
        check(
            []
            if 0 <= self.retries <= MAX_RETRIES
            else [f"retries={self.retries} must be in 0 to {MAX_RETRIES}"]
        )

    @property
    def stops(self) -> bool:
        """Whether the first cell that fails for good is the last one to be started."""
        return self.on_failure == "stop"

    def delay(self, failure: str | None, retries: int) -> float | None:
        """Seconds to wait before the next attempt; None if there is to be none.

        Args:
            failure: kind of the failure, one of `record.FAILURES`.
            retries: that this launch has made of the cell.
        """
        if failure not in RETRIED or retries >= self.retries:
            return None
        return self.first_seconds * 4.0**retries
