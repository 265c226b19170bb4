"""Why a profile has no minimum that can be trusted, each with the runs that would help.

Shape legend: I sizes, K coefficients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from analysis.ladder import Ladder
from analysis.profile import ProfileStatus
from analysis.shapes import CURVES, Polynomial, Shape

MIN_SIZES = 4
"""Sizes per profile: a parabola passes through any three points, whatever they say. Without a
second seed five, so that two degrees of freedom are left for the noise."""
FLATNESS = 0.01
"""Level of the test by which the curvature is told from zero."""
MAX_JUMP = float(np.log(2))
"""Of ln N* when one size is left out. Ladders step by factors of 1.3 to 2, so that a minimum that
moves by more hangs on that size alone. An octave off costs (ln 2)^2 / 2 (alpha + beta) of ln C: 14
% of the budget for the law of Hoffmann et al. 2022."""
MAX_WIDTH = float(np.log(4))
"""Of the 95 % interval of ln N*: an octave to each side."""
MAX_LOST = 0.1
"""Share of the repetitions with other noise that may have no minimum."""


@dataclass(frozen=True)
class Refusal:
    """Why a profile has no minimum."""

    status: ProfileStatus
    reason: str


def too_few(ladder: Ladder, kinds: Sequence[Shape]) -> Refusal | None:
    """Whether there are fewer sizes than any curve needs."""
    num, need = len(ladder.names), MIN_SIZES if ladder.points.has_seeds else MIN_SIZES + 1
    if num >= MIN_SIZES and kinds:
        return None
    more = "" if need == MIN_SIZES or num < MIN_SIZES else ", or a second seed of these"
    reason = f"{num} sizes, {need} are needed: train {need - num} more{more}"
    return Refusal(ProfileStatus.TOO_FEW, reason)


def no_valley(ladder: Ladder) -> Refusal | None:
    """Whether the parabola or the lowest size already says that there is no minimum."""
    curvature, curvature_margin, slope, slope_margin = _bend(ladder)
    if curvature < -curvature_margin:
        reason = (
            "the losses rise towards the middle of the ladder, which no known law does: look for "
            "runs that went wrong at the middle sizes, and train these again"
        )
        return Refusal(ProfileStatus.CONCAVE, reason)
    best = int(np.argmin(ladder.points.loss_I))
    at_an_end = best in (0, len(ladder.names) - 1)
    bent = curvature > curvature_margin
    if at_an_end and (bent or abs(slope) > slope_margin):
        return edge(ladder, low=best == 0)
    if not bent:
        reason = (
            f"the curvature, {curvature:.2g} nats per (ln N)^2, is within its margin of "
            f"{curvature_margin:.2g}: widen the ladder at both ends, or train more seeds"
        )
        return Refusal(ProfileStatus.FLAT, reason)
    return None


def _bend(ladder: Ladder) -> tuple[float, float, float, float]:
    """(second power, its margin, slope in the middle, its margin) of the parabola."""
    x_I, means = ladder.points.x_I, ladder.points.means
    solver_KI = Polynomial(2).solver(x_I, means.weight_I)
    theta_K = solver_KI @ means.loss_I
    residual_I = means.loss_I - np.vander(x_I, 3, increasing=True) @ theta_K
    dof, variance = len(x_I) - 3, float("nan")
    if dof:
        variance = float(means.weight_I @ residual_I**2) / dof
    if means.dof:
        dof, variance = means.dof, means.variance
    spread_K = np.sqrt(variance * np.diag(solver_KI / means.weight_I @ solver_KI.T))
    margin_K = float(stdtrit(dof, 1 - FLATNESS / 2)) * spread_K
    return float(theta_K[2]), float(margin_K[2]), float(theta_K[1]), float(margin_K[1])


def edge(ladder: Ladder, low: bool) -> Refusal:
    """A minimum that is not bracketed at an end of the ladder."""
    end, N = ("small", ladder.num_params_I[0]) if low else ("large", ladder.num_params_I[-1])
    sizes = f"below {ladder.names[0]}, down to" if low else f"above {ladder.names[-1]}, up to"
    reason = (
        f"the minimum is not bracketed at the {end} end of the ladder: train two sizes {sizes} "
        f"N = {N / 2 if low else 2 * N:.3g}"
    )
    return Refusal(ProfileStatus.EDGE, reason)


def unstable(ladder: Ladder, shape: Shape, x: float, lost: float) -> Refusal | None:
    """Whether the minimum at x, of that shape, is lost or moves when little is changed.

    Args:
        ladder: the sizes.
        shape: of the chosen curve.
        x: where it is lowest.
        lost: share of the replicates without a minimum.
    """
    if lost > MAX_LOST:
        reason = (
            f"{100 * lost:.0f} % of repetitions with other noise have no minimum: train more "
            "seeds, or widen the ladder"
        )
        return Refusal(ProfileStatus.UNSTABLE, reason)
    for i, name in enumerate(ladder.names[1:-1], start=1):
        other = float(CURVES[shape].minima(*ladder.without(i)).x_R[0])
        if not abs(other - x) <= MAX_JUMP:
            moves = (
                "is gone"
                if np.isnan(other)
                else f"moves by a factor of {np.exp(abs(other - x)):.2g}"
            )
            reason = (
                f"without {name} the minimum {moves}: train more seeds of {name} and its neighbours"
            )
            return Refusal(ProfileStatus.UNSTABLE, reason)
    return None


def reaches_an_end(ladder: Ladder, low: float, high: float) -> Refusal | None:
    """Whether the 95 % interval of the minimum, in x, is too wide or leaves the ladder."""
    below, above = low <= ladder.points.x_I[0], high >= ladder.points.x_I[-1]
    if high - low > MAX_WIDTH or (below and above):
        width, range_ = np.exp(high - low), np.exp(np.ptp(ladder.points.x_I))
        reason = (
            f"the interval of the minimum spans a factor of {width:.2g}, the ladder one of "
            f"{range_:.2g}: widen it at both ends, or train more seeds"
        )
        return Refusal(ProfileStatus.FLAT, reason)
    return edge(ladder, low=bool(below)) if below or above else None
