"""One curve of a study, a variant at a budget: whether its minimum is bracketed, and the run that
would tell most about it. Pure.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from peer_scaling.candidates import Action, Adaptive, Candidate
from peer_scaling.curves import (
    MIN_SIZES,
    PUBLISHED,
    Margins,
    Minimum,
    Points,
    Shape,
    fit_minima,
    margins,
)

MAX_FAILED = 2
"""Failed sizes beyond an end of a curve, after which it is not extended there."""
SIDES = {"smallest": -1.0, "largest": 1.0}


@dataclass(frozen=True)
class Choice:
    """The next run of a curve, and why."""

    action: Action
    candidate: Candidate
    reason: str


@dataclass(frozen=True)
class Curve:
    """What is known of a variant at a budget."""

    config: Adaptive
    variant: str
    budget: float
    candidates: tuple[Candidate, ...]
    """Those that can be trained, by N."""
    losses: Mapping[str, tuple[float | None, ...]]
    """Of the runs of each size, by seed from 0; None for a failed one."""
    asked: Mapping[str, int]
    """Runs of each size that the present round has asked for already."""
    shape: Shape = PUBLISHED
    """What is known of it from smaller budgets."""
    minimum: Minimum | None = None
    dof: float = 0.0
    """Degrees of freedom of the noise at this budget."""

    @cached_property
    def margins(self) -> Margins:
        """Half widths of the minimum's intervals."""
        return margins(self.minimum, self.dof)

    @cached_property
    def points(self) -> Points:
        """The runs with a loss."""
        pairs = [
            (candidate.log_N, loss)
            for candidate in self.candidates
            for loss in self.losses.get(candidate.size, ())
            if loss is not None
        ]
        log_N_P, loss_P = np.array(pairs, dtype=float).reshape(-1, 2).T
        return Points(log_N_P, loss_P)

    @cached_property
    def tried(self) -> tuple[Candidate, ...]:
        """Sizes with a loss, by N."""
        return tuple(c for c in self.candidates if self.mean_loss(c) is not None)

    @cached_property
    def best(self) -> Candidate | None:
        """The size with the lowest mean loss."""
        losses = {c: loss for c in self.candidates if (loss := self.mean_loss(c)) is not None}
        return min(losses, key=lambda c: losses[c], default=None)

    def mean_loss(self, candidate: Candidate) -> float | None:
        """Over the runs with a loss."""
        found = [loss for loss in self.losses.get(candidate.size, ()) if loss is not None]
        return sum(found) / len(found) if found else None

    def num_runs(self, candidate: Candidate) -> int:
        """Runs that ended or were asked for; the next seed."""
        return len(self.losses.get(candidate.size, ())) + self.asked.get(candidate.size, 0)

    def failed(self, candidate: Candidate) -> bool:
        """Whether a run of the size failed: it gets no other one."""
        return None in self.losses.get(candidate.size, ())

    @property
    def open(self) -> tuple[Candidate, ...]:
        """Sizes that may be run once more."""
        return tuple(
            c for c in self.candidates
            if not self.failed(c) and self.num_runs(c) < self.config.max_seeds
        )  # fmt: skip

    @cached_property
    def side(self) -> str | None:
        """The end of what was tried at or beyond which the minimum is, if it is not bracketed."""
        tried, best = self.tried, self.best
        if len(tried) < 2:
            return None
        if best in (tried[0], tried[-1]):
            return "smallest" if best is tried[0] else "largest"
        if self.minimum and self.minimum.log_N <= tried[0].log_N:
            return "smallest"
        if self.minimum and self.minimum.log_N >= tried[-1].log_N:
            return "largest"
        return None

    @property
    def bracketed(self) -> bool:
        """Whether enough sizes were tried on both sides of the minimum."""
        return len(self.tried) >= MIN_SIZES and self.side is None

    @property
    def ended(self) -> bool:
        """Whether the minimum is not bracketed and no size is left that could do it."""
        return not self.bracketed and self.extension() is None

    @property
    def excess(self) -> float:
        """The worse half width over its target; 0 for a curve that no run can help."""
        if self.ended or not self.open:
            return 0.0
        config, own = self.config, self.margins
        return max(own.log_N / config.target_size, own.loss / config.target_loss)

    def with_run(self, candidate: Candidate) -> "Curve":
        """The curve as if one more run of a size had been asked for, and had confirmed it."""
        asked = {**self.asked, candidate.size: self.asked.get(candidate.size, 0) + 1}
        minimum = self.minimum and self.minimum.after(candidate.log_N)
        return replace(self, asked=asked, minimum=minimum)

    def extension(self) -> Candidate | None:
        """The size that is to bracket the minimum, or to make the sizes enough to say."""
        untried = [c for c in self.candidates if not self.num_runs(c)]
        if self.side is None:
            run = self.tried or [c for c in self.candidates if self.num_runs(c)]
            middle = sum(c.log_N for c in run) / max(len(run), 1)
            return min(untried, key=lambda c: abs(c.log_N - middle), default=None)
        sign = SIDES[self.side]
        known = [c for c in self.candidates if c in self.tried or self.asked.get(c.size)]
        end = max(known, key=lambda c: sign * c.log_N)
        beyond = [c for c in self.candidates if sign * (c.log_N - end.log_N) > 0]
        if sum(self.failed(c) for c in beyond) >= MAX_FAILED:
            return None
        target = end.log_N + sign * math.log(self.config.spacing)
        left = [c for c in beyond if c in untried]
        return min(left, key=lambda c: abs(c.log_N - target), default=None)

    def choose(self) -> Choice | None:
        """The run that helps the curve most; None if there is none left."""
        if not self.bracketed and (candidate := self.extension()):
            return Choice(Action.EXTEND, candidate, self._why_extended())
        if not self.open:
            return None
        candidate = self._most_informative() if self.minimum else self._least_known()
        action = Action.REPEAT if self.num_runs(candidate) else Action.REFINE
        return Choice(action, candidate, self.summary())

    def summary(self) -> str:
        """The minimum with its intervals and targets, or why there is none."""
        if not self.bracketed:
            return self._why_extended()
        if not self.minimum:
            return "the curve opens downwards: no minimum yet"
        config, own = self.config, self.margins
        if math.isinf(own.loss):
            return f"N* {math.exp(self.minimum.log_N):.3g}, but the noise is not known yet"
        return (
            f"N* {math.exp(self.minimum.log_N):.3g} within {own.log_N:.1%} (target "
            f"{config.target_size:.1%}), loss {self.minimum.loss:.4f} within {own.loss:.4f} nats "
            f"(target {config.target_loss:.4f})"
        )

    def _why_extended(self) -> str:
        tried, best, side = self.tried, self.best, self.side
        if side is None or best is None:
            return f"{len(tried)} sizes with a loss, {MIN_SIZES} are needed"
        end = tried[0] if side == "smallest" else tried[-1]
        if best is end:
            return f"lowest loss, {self.mean_loss(best):.4f}, at the {side} size tried, {end.size}"
        assert self.minimum is not None
        at = f"{math.exp(self.minimum.log_N):.3g}"
        return f"the fitted minimum, N {at}, is beyond the {side} size tried, {end.size}"

    def _most_informative(self) -> Candidate:
        """Of the two sizes whose next runs together narrow both intervals most, relative to their
        targets, the one that does more alone. A far size alone says little: it takes one on the
        other side to tell the skew of the curve from its minimum.
        """
        minimum, config = self.minimum, self.config
        assert minimum is not None
        near = [c for c in self.open if abs(c.log_N - minimum.log_N) <= config.log_reach]
        near = near or list(self.open)
        log_N_S = np.array([candidate.log_N for candidate in near])
        size_SS, loss_SS = minimum.deviations_after_two(log_N_S)
        left_SS = (size_SS / config.target_size) ** 2 + (loss_SS / config.target_loss) ** 2
        pair = np.unravel_index(left_SS.argmin(), left_SS.shape)
        size_S, loss_S = minimum.deviations_after(log_N_S[list(pair)])
        alone_S = (size_S / config.target_size) ** 2 + (loss_S / config.target_loss) ** 2
        return near[pair[int(alone_S.argmin())]]

    def _least_known(self) -> Candidate:
        """Of the sizes with the fewest runs one near the best if the ladder ends there, or else one
        as far as may be, to see the curve bend.
        """
        centre = (self.best or self.open[0]).log_N
        sign = 1 if self.ended else -1
        near = [c for c in self.open if abs(c.log_N - centre) <= self.config.log_reach] or self.open
        return min(near, key=lambda c: (self.num_runs(c), sign * abs(c.log_N - centre)))


def fitted(curves: Sequence[Curve]) -> list[Curve]:
    """The curves of one budget with their minima; the noise is estimated from all together."""
    ready = [curve for curve in curves if len(curve.tried) >= MIN_SIZES]
    minima, dof = fit_minima([c.points for c in ready], [c.shape for c in ready])
    found: Iterator[Minimum | None] = iter(minima)
    return [
        replace(curve, minimum=next(found), dof=dof) if len(curve.tried) >= MIN_SIZES else curve
        for curve in curves
    ]


def coarse_ladder(curve: Curve, log_N: float, num_sizes: int) -> list[Candidate]:
    """Sizes at the study's spacing around `log_N`, from the middle outwards."""
    step = math.log(curve.config.spacing)
    offsets = sorted((i - (num_sizes - 1) / 2 for i in range(num_sizes)), key=abs)
    chosen: list[Candidate] = []
    for offset in offsets:
        left = [c for c in curve.candidates if c not in chosen]
        chosen.append(min(left, key=lambda c: abs(c.log_N - log_N - offset * step)))
    return chosen
