"""A condition of a claim: whether it holds, by what evidence, and what would settle it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """Of a condition; only the first lets a claim pass."""

    MET = "met"
    NOT_MET = "not met"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Settle:
    """What would settle a condition."""

    what: str
    num_runs: int = 0
    flops: float = 0.0
    """Of those runs together."""
    command: str = ""

    @property
    def text(self) -> str:
        """On one line."""
        cost = ""
        if self.num_runs:
            plural = "s" if self.num_runs > 1 else ""
            cost = f"{self.num_runs} run{plural}, {self.flops:.2g} FLOPs"
        command = f"`{self.command}`" if self.command else ""
        return ": ".join(filter(None, (self.what, cost, command)))


@dataclass(frozen=True)
class Condition:
    """Whether one condition of a claim holds, by what evidence."""

    status: Status
    evidence: str
    settle: tuple[Settle, ...] = ()
    """What would settle it, if anything would; empty if it is met."""
    parts: tuple["Condition", ...] = ()
    """The same for each variant, where it is a condition on both."""

    @property
    def met(self) -> bool:
        """Whether it holds."""
        return self.status is Status.MET

    @property
    def lacking(self) -> tuple["Condition", ...]:
        """What keeps it from being met: itself, or its parts."""
        return tuple(part for part in self.parts or (self,) if not part.met)


def both(conditions: Iterable[Condition]) -> Condition:
    """A condition on each of several, as one: the worst status, all evidence."""
    found = list(conditions)
    order = (Status.NOT_MET, Status.UNKNOWN, Status.MET)
    worst = min((c.status for c in found), key=order.index)
    settle = dict.fromkeys(step for c in found if not c.met for step in c.settle)
    evidence = "; ".join(dict.fromkeys(c.evidence for c in found))
    return Condition(worst, evidence, tuple(settle), tuple(found))


def seeds(first: int, num: int) -> str:
    """The value of `seed=` for so many seeds, as Hydra and a shell read it."""
    end = first + num
    return ",".join(map(str, range(first, end))) if num <= 6 else f"'range({first},{end})'"


def command(study: str, /, **overrides: object) -> str:
    """The line that trains a part of a study."""
    words = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return " ".join(["peer-train", "--config-name", study, *words])
