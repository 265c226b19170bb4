"""What a study that chooses its own sizes may train, has seen, and decides. Plain values."""

import json
import math
from dataclasses import asdict, dataclass
from enum import StrEnum

from peer_scaling.curves import MIN_SIZES
from peer_scaling.errors import check, repeated
from peer_scaling.paths import name_problems

Key = tuple[str, float, str, int]
"""Variant, budget, size, seed: one run of a study."""


@dataclass(frozen=True)
class Adaptive:
    """How a study chooses its sizes: `adaptive` in its file."""

    sizes: tuple[str, ...]
    """Names of backbones that may be trained, at any budget."""
    start: int = 4
    """Sizes of the coarse ladder, per variant and budget."""
    spacing: float = 4.0
    """Factor in N from one size of the coarse ladder to the next, and of an extension."""
    reach: float = 16.0
    """Factor in N around a minimum within which sizes are added: the farther, the more a run says
    of N*, as long as the curve is the sum of two power laws there."""
    tokens_per_param: float = 20.0
    """Training tokens per active parameter where the first minimum is looked for; later ones are
    looked for where those of smaller budgets were found."""
    target_size: float = 0.1
    """Half width of the 90 % interval of ln N* that is enough: 0.1 is 10 % of N*."""
    target_loss: float = 0.005
    """Half width of the 90 % interval of the minimum loss that is enough, nats."""
    allowance: float | None = None
    """Training FLOPs of all variants together."""
    ladders: float = 4.0
    """Without `allowance`: that many times what the coarse ladders of all budgets cost."""
    max_seeds: int = 8
    """Runs of one size at most."""
    runs_per_round: int = 2
    """Runs of each variant that a round may add at a budget, once all coarse ladders hold their
    minima: more rounds of fewer runs need less compute and more time."""

    def __post_init__(self) -> None:
        problems = [*repeated("size", self.sizes), *name_problems("size", self.sizes)]
        if len(set(self.sizes)) < MIN_SIZES:
            problems.append(f"sizes: {len(set(self.sizes))} given; a curve needs {MIN_SIZES}")
        for name, least in (("start", MIN_SIZES), ("max_seeds", 1), ("runs_per_round", 1)):
            if getattr(self, name) < least:
                problems.append(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("tokens_per_param", "target_size", "target_loss", "allowance"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                problems.append(f"{name}={value} must be a positive number")
        for name in ("spacing", "reach"):
            if not 1 < getattr(self, name) < math.inf:
                problems.append(f"{name}={getattr(self, name)} must be a factor above 1")
        if not 1 <= self.ladders < math.inf:
            problems.append(f"ladders={self.ladders} must be at least 1, the coarse ladder itself")
        check(problems)

    @property
    def log_reach(self) -> float:
        """`reach` in ln N."""
        return math.log(self.reach)


@dataclass(frozen=True)
class Candidate:
    """A variant at a size and a budget: what a run of it would be, whatever its seed."""

    variant: str
    budget: float
    size: str
    num_params: float
    """The N of the curve."""
    tokens_per_param: float
    """Training tokens per active parameter; falls along the ladder."""
    flops: float
    """Training FLOPs of one run."""
    problem: str | None = None
    """Why it cannot be trained; None if it can."""

    @property
    def log_N(self) -> float:
        """Where the candidate is on its curve."""
        return math.log(self.num_params)


@dataclass(frozen=True)
class Observation:
    """What became of a run that has ended for good."""

    variant: str
    budget: float
    size: str
    seed: int
    loss: float | None
    """Nats per token; None if the run diverged or failed."""

    def __post_init__(self) -> None:
        if self.loss is not None and not math.isfinite(self.loss):
            raise ValueError(f"{self.key}: loss={self.loss}: give None for a run that diverged")

    @property
    def key(self) -> Key:
        """The run."""
        return self.variant, self.budget, self.size, self.seed


class Action(StrEnum):
    """What a decision is about."""

    START = "start"
    """A run of the coarse ladder."""
    EXTEND = "extend"
    """A run of a size outside of what was tried, where the minimum may be."""
    REFINE = "refine"
    """A run of a size that was not tried, near the minimum."""
    REPEAT = "repeat"
    """A run of a size that was tried, with the next seed."""
    DROP = "drop"
    """Sizes, or a whole budget, are left out."""
    STOP = "stop"
    """Nothing more is run for a variant at a budget."""


@dataclass(frozen=True)
class Decision:
    """A line of `decisions.jsonl`; one with a seed asks for that run."""

    round: int
    """Counted from 1. A round's runs do not depend on one another."""
    action: Action
    variant: str
    budget: float
    size: str | None
    """None if the decision is not about one size."""
    seed: int | None
    reason: str

    @property
    def key(self) -> Key | None:
        """The run that is asked for, if one is."""
        if self.size is None or self.seed is None:
            return None
        return self.variant, self.budget, self.size, self.seed

    def line(self) -> str:
        """The decision as a line of JSON, with its end."""
        return json.dumps(asdict(self)) + "\n"
