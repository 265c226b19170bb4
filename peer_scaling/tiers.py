"""The curves of all variants at one budget: where their ladders begin, and steps of one run each.
Pure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from peer_scaling.candidates import Action, Adaptive, Candidate, Key, Observation
from peer_scaling.chooser import Choice, Curve, coarse_ladder, fitted
from peer_scaling.curves import MIN_SIZES, PUBLISHED, Shape
from peer_scaling.record import budget_label

TREND = 1.5
"""Weight of "the same tokens per parameter at every budget" (N* as C^0.5 if C = 6 N D) against a
trend through fitted minima: the squared ratio of their scatter, 0.15, and the trend's, 0.12."""

Step = list[tuple[Curve, Choice]]
"""One run for each variant."""


@dataclass(frozen=True)
class Tier:
    """What is known at one budget."""

    config: Adaptive
    budget: float
    curves: tuple[Curve, ...]
    """One per variant."""

    @cached_property
    def refusal(self) -> str | None:
        """Why the budget is left out, for all variants: they could not be compared there."""
        few = [c for c in self.curves if len(c.candidates) < MIN_SIZES]
        if not few:
            return None
        counts = ", ".join(f"{c.variant} {len(c.candidates)}" for c in few)
        return (
            f"sizes that can be trained at {budget_label(self.budget)}: {counts}; a curve needs "
            f"{MIN_SIZES}: left out for all variants; add sizes, or drop the budget"
        )

    @property
    def started(self) -> bool:
        """Whether the coarse ladders were run."""
        return any(curve.losses for curve in self.curves)

    @property
    def placed(self) -> bool:
        """Whether every minimum is bracketed, or cannot be."""
        return self.started and all(curve.bracketed or curve.ended for curve in self.curves)

    @property
    def excess(self) -> float:
        """The worst half width over its target."""
        return max(curve.excess for curve in self.curves)

    @property
    def num_start(self) -> int:
        """Sizes of the coarse ladder: as many for every variant."""
        return min(self.config.start, *(len(curve.candidates) for curve in self.curves))

    @property
    def coarse_flops(self) -> float:
        """What the coarse ladders cost at most."""
        runs = (max(c.flops for c in curve.candidates) for curve in self.curves)
        return self.num_start * sum(runs)

    def start(self, smaller: Sequence["Tier"]) -> list[Step]:
        """The coarse ladders, from the middle outwards."""
        columns = []
        for index, curve in enumerate(self.curves):
            log_N, why = _predicted(curve, [tier.curves[index] for tier in smaller])
            reason = f"coarse ladder around N {math.exp(log_N):.3g}, {why}"
            ladder = coarse_ladder(curve, log_N, self.num_start)
            columns.append([(curve, Choice(Action.START, size, reason)) for size in ladder])
        return [list(step) for step in zip(*columns, strict=True)]

    def step(self) -> Step | None:
        """One run for each variant; None if one of them has none left."""
        step = [(curve, choice) for curve in self.curves if (choice := curve.choose())]
        return step if len(step) == len(self.curves) else None

    def after(self, step: Step) -> "Tier":
        """As if the runs of a step had confirmed the curves."""
        return replace(self, curves=tuple(c.with_run(choice.candidate) for c, choice in step))


def step_flops(step: Step) -> float:
    """What a step costs."""
    return sum(choice.candidate.flops for _, choice in step)


def make_tiers(
    config: Adaptive, candidates: Sequence[Candidate], known: Mapping[Key, Observation]
) -> list[Tier]:
    """All tiers by budget, fitted; each curve's shape is known from smaller budgets."""
    shapes = dict.fromkeys((candidate.variant for candidate in candidates), PUBLISHED)
    tiers = []
    for budget in sorted({candidate.budget for candidate in candidates}):
        own = [c for c in candidates if c.budget == budget]
        curves = [_curve(config, own, known, *shape, budget) for shape in shapes.items()]
        tiers.append(Tier(config, budget, tuple(fitted(curves))))
        for curve in tiers[-1].curves:
            if curve.bracketed and curve.minimum:
                shapes[curve.variant] = curve.minimum.shape.drifted()
    return tiers


def _curve(
    config: Adaptive,
    candidates: Sequence[Candidate],
    known: Mapping[Key, Observation],
    variant: str,
    shape: Shape,
    budget: float,
) -> Curve:
    own = [c for c in candidates if c.variant == variant and not c.problem]
    own.sort(key=lambda candidate: candidate.num_params)
    losses: dict[str, tuple[float | None, ...]] = {}
    for candidate in own:
        keys = [(variant, budget, candidate.size, seed) for seed in range(config.max_seeds)]
        found = tuple(known[key].loss for key in keys if key in known)
        losses |= {candidate.size: found} if found else {}
    return Curve(config, variant, budget, tuple(own), losses, {}, shape)


def _predicted(curve: Curve, smaller: Sequence[Curve]) -> tuple[float, str]:
    """Ln N where the minimum is looked for first, and how that was found."""
    found = {c.budget: ratio for c in smaller if (ratio := _log_ratio(c)) is not None}
    if not found:
        ratio = math.log(curve.config.tokens_per_param)
        why = f"{curve.config.tokens_per_param:g} tokens per parameter"
    else:
        log_C, ratios = np.log(list(found)), np.array(list(found.values()))
        distance = log_C - log_C.mean()
        trend = distance @ ratios / (distance @ distance + TREND)
        ratio = float(ratios.mean() + trend * (math.log(curve.budget) - log_C.mean()))
        budgets = ", ".join(budget_label(budget) for budget in found)
        why = f"{math.exp(ratio):.3g} tokens per parameter as at the minima of {budgets}"
    return log_N_at(curve, ratio), why


def log_N_at(curve: Curve, log_ratio: float) -> float:
    """Ln N where the tokens per parameter are exp(`log_ratio`), between the sizes of a curve."""
    pairs = sorted((math.log(c.tokens_per_param), c.log_N) for c in curve.candidates)
    return float(np.interp(log_ratio, [x for x, _ in pairs], [y for _, y in pairs]))


def _log_ratio(curve: Curve) -> float | None:
    """Ln of the tokens per parameter at the minimum, or at the best size if that is at an end."""
    if curve.best is None:
        return None
    log_N = curve.minimum.log_N if curve.bracketed and curve.minimum else curve.best.log_N
    log_ratios = [math.log(c.tokens_per_param) for c in curve.candidates]
    return float(np.interp(log_N, [c.log_N for c in curve.candidates], log_ratios))
