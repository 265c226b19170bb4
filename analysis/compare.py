"""Variants at equal compute: loss gaps, and what the baseline needs for equal loss.

Legend, as in the papers: C training FLOPs, L loss in nats per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.difference import Difference, Source
from analysis.fitting import student_quantile
from analysis.gaps import Gap, Pair
from analysis.isoflop import IsoflopFit
from analysis.profile import Profile


@dataclass(frozen=True)
class ComputeMultiplier:
    """A variant against the baseline at one budget."""

    variant: str
    baseline: str
    budget: float
    nats_below: float
    """Baseline's L* less the variant's: positive if the variant is better."""
    nats_margin: float
    """Half width of its 95 % interval, from the differences by seed or from the errors of both
    minima. With one seed it holds the scatter around the curves, not the spread between seeds."""
    multiplier: float
    """FLOPs that the baseline needs for the variant's L*, over the budget; NaN if unknown."""
    low: float
    high: float
    """Its 95 % interval, from the interval of the loss gap and the baseline's slope there."""
    extrapolated: bool
    """Whether the baseline's curve had to be continued beyond its budgets."""


def compute_multiplier(
    fit: IsoflopFit, baseline: str = "dense", gaps: Sequence[Gap] = ()
) -> list[ComputeMultiplier]:
    """Each other variant against the baseline at every budget where both have a minimum.

    The baseline's L*(C) is read off its own minima, L linear in ln C between them and beyond their
    ends (He 2024's table 1 gives 1.93 and 1.63 for PEER on C4 this way). Budgets where the baseline
    does not improve from one to the next, or a single budget, give no multiplier.

    Args:
        fit: with the minima.
        baseline: label of a variant.
        gaps: `gaps.find_gaps` of the same fit; where a gap is paired over seeds, it and its error
            are taken instead of the difference of the minima and theirs.
    """
    paired = {gap.pair: gap.difference for gap in gaps}
    base = fit.optima(baseline)
    return [
        _compare(profile, own, base, paired.get(Pair(variant, baseline, own.budget)))
        for variant in fit.variants
        if variant != baseline
        for profile in fit.optima(variant)
        for own in base
        if own.budget == profile.budget
    ]


def _compare(
    profile: Profile, own: Profile, base: list[Profile], paired: Difference | None
) -> ComputeMultiplier:
    gap = own.loss - profile.loss
    stderr = float(np.hypot(profile.loss_stderr, own.loss_stderr))
    margin = student_quantile(min(profile.dof, own.dof)) * stderr
    if paired and paired.source is Source.SEEDS:
        gap, margin = paired.nats, paired.margin
    log_ratio, slope, extrapolated = _log_compute_at(own.loss - gap, base)
    log_ratio -= np.log(profile.budget)
    spread = margin / -slope if slope < 0 else float("nan")
    return ComputeMultiplier(
        variant=profile.variant,
        baseline=own.variant,
        budget=profile.budget,
        nats_below=gap,
        nats_margin=margin,
        multiplier=float(np.exp(log_ratio)),
        low=float(np.exp(log_ratio - spread)),
        high=float(np.exp(log_ratio + spread)),
        extrapolated=extrapolated,
    )


def _log_compute_at(loss: float, base: list[Profile]) -> tuple[float, float, bool]:
    """(ln C, dL / d ln C, extrapolated) where the baseline's minima reach `loss`."""
    if len(base) < 2:
        return float("nan"), float("nan"), True
    log_C, L = np.log([p.budget for p in base]), np.array([p.loss for p in base])
    slopes = np.diff(L) / np.diff(log_C)
    # The first segment that ends below the loss; the last one if none does.
    below = np.nonzero(L[1:] <= loss)[0]
    segment = int(below[0]) if len(below) else len(slopes) - 1
    if slopes[segment] >= 0:
        return float("nan"), float("nan"), True
    found = log_C[segment] + (loss - L[segment]) / slopes[segment]
    return float(found), float(slopes[segment]), not log_C[0] <= found <= log_C[-1]
