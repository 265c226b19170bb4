"""From the runs of one (variant, budget) to its `Profile`: checks, curve, minimum, interval.

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token. Shape legend: I sizes, P points of a curve, U runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from analysis.fitting import CONFIDENCE, percentiles, student_quantile
from analysis.ladder import Ladder, ladder_of
from analysis.minimum import choose, kinds_for, repeated, replicate
from analysis.profile import Noise, Profile, ProfileStatus
from analysis.shapes import CURVES, Polynomial, Shape

MIN_SIZES = 4
"""Sizes per profile: a parabola passes through any three points, whatever they say. Without a
second seed five, so that two degrees of freedom are left for the noise."""
FLATNESS = 0.01
"""Level of the test by which the curvature is told from zero."""
MAX_JUMP = float(np.log(2))
"""Of ln N* when one size is left out. Ladders step by factors of 1.3 to 2, so that a minimum that
moves by more hangs on that size alone; an octave off also costs as much loss as a budget that is a
few per cent smaller."""
MAX_WIDTH = float(np.log(4))
"""Of the 95 % interval of ln N*: an octave to each side."""
MAX_LOST = 0.1
"""Share of the repetitions with other noise that may have no minimum."""
NUM_POINTS = 200


@dataclass(frozen=True)
class Refusal:
    """Why a profile has no minimum."""

    status: ProfileStatus
    reason: str


def fit_profile(
    variant: str, budget: float, runs: pd.DataFrame, axis: str, level: float = CONFIDENCE
) -> Profile:
    """Fit one isoFLOP curve to the means over seeds, against ln N.

    Args:
        variant: its label.
        budget: C.
        runs: the usable ones of this variant and budget.
        axis: the column that N counts.
        level: of the interval of N*; it decides nothing.
    """
    ladder = ladder_of(runs, axis)
    best = int(np.argmin(ladder.loss_I))
    facts: dict[str, Any] = {
        "variant": variant,
        "budget": budget,
        "level": level,
        "left_out": ladder.left_out,
        "best_size": ladder.names[best],
        "best_num_params": float(ladder.num_params_I[best]),
        "best_loss": float(ladder.loss_I[best]),
        "smallest": float(ladder.num_params_I[0]),
        "largest": float(ladder.num_params_I[-1]),
        "num_sizes": len(ladder.names),
        "num_runs": ladder.num_runs,
        **_no_minimum(),
    }
    kinds = kinds_for(len(ladder.names), ladder.points.has_seeds)
    refusal = _too_few(ladder, kinds) or _no_valley(ladder, best)
    if refusal is not None:
        drawn = _curve(ladder, Shape.PARABOLA) if kinds else {}
        return Profile(**facts | drawn | vars(refusal))
    return Profile(**facts | _located(ladder, kinds, level))


def _too_few(ladder: Ladder, kinds: Sequence[Shape]) -> Refusal | None:
    num, need = len(ladder.names), MIN_SIZES if ladder.points.has_seeds else MIN_SIZES + 1
    if num >= MIN_SIZES and kinds:
        return None
    more = "" if need == MIN_SIZES or num < MIN_SIZES else ", or a second seed of these"
    reason = f"{num} sizes, {need} are needed: train {need - num} more{more}"
    return Refusal(ProfileStatus.TOO_FEW, reason)


def _no_valley(ladder: Ladder, best: int) -> Refusal | None:
    """Whether the parabola or the lowest size already says that there is no minimum."""
    curvature, curvature_margin, slope, slope_margin = _bend(ladder)
    if curvature < -curvature_margin:
        reason = (
            "the losses rise towards the middle of the ladder, which no known law does: look for "
            "runs that went wrong at the middle sizes, and train these again"
        )
        return Refusal(ProfileStatus.CONCAVE, reason)
    at_an_end = best in (0, len(ladder.names) - 1)
    bent = curvature > curvature_margin
    if at_an_end and (bent or abs(slope) > slope_margin):
        return _edge(ladder, low=best == 0)
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


def _edge(ladder: Ladder, low: bool) -> Refusal:
    end = 0 if low else -1
    side, beyond = ("below", 0.5) if low else ("above", 2.0)
    N = ladder.num_params_I[end]
    reason = (
        f"the minimum is not bracketed at the {'small' if low else 'large'} end: train two sizes "
        f"{side} {ladder.names[end]}, down to N = {beyond * N:.3g}"
        if low
        else f"the minimum is not bracketed at the large end: train two sizes {side} "
        f"{ladder.names[end]}, up to N = {beyond * N:.3g}"
    )
    return Refusal(ProfileStatus.EDGE, reason)


def _located(ladder: Ladder, kinds: Sequence[Shape], level: float) -> dict[str, Any]:
    points = ladder.points
    chosen = choose(points.x_I, ladder.loss_I[None], ladder.weight_I, kinds)
    x, loss = float(chosen.minima.x_R[0]), float(chosen.minima.loss_R[0])
    if np.isnan(x):
        drawn = _curve(ladder, Shape.PARABOLA)
        return drawn | vars(_edge(ladder, low=bool(drawn["curve_loss"].argmin() == 0)))
    shape = kinds[int(chosen.kind_R[0])]
    found = replicate(points, repeated(kinds, shape), np.random.default_rng(0))
    refusal = _unstable(ladder, shape, x, found.lost)
    if refusal is None:
        error_low, error_high = percentiles(found.x_R, CONFIDENCE)
        refusal = _reaches_an_end(ladder, x - error_high, x - error_low)
    if refusal is not None:
        return _curve(ladder, shape) | vars(refusal)
    quantile = student_quantile(found.dof)
    x_stderr = (error_high - error_low) / 2 / quantile
    loss_low, loss_high = percentiles(found.loss_R, CONFIDENCE)
    loss_stderr = (loss_high - loss_low) / 2 / quantile
    low, high = percentiles(found.x_R, level)
    log_N_I, log_D_I = np.log(ladder.num_params_I), np.log(ladder.tokens_I)
    at = x + ladder.centre
    steep = np.interp(at + x_stderr / 2, log_N_I, log_D_I) - np.interp(
        at - x_stderr / 2, log_N_I, log_D_I
    )
    return {
        **_curve(ladder, shape),
        "status": ProfileStatus.OK,
        "num_params": float(np.exp(at)),
        "num_params_low": float(np.exp(at - high)),
        "num_params_high": float(np.exp(at - low)),
        "num_params_log_stderr": x_stderr,
        "tokens": float(np.exp(np.interp(at, log_N_I, log_D_I))),
        "tokens_log_stderr": float(abs(steep)),
        "loss": loss,
        "loss_stderr": loss_stderr,
        "dof": found.dof,
        "level_stderr": points.means.level_stderr,
        "level_dof": points.means.level_dof,
        "noise": Noise.SEEDS if found.from_seeds else Noise.SCATTER,
        "noise_stderr": float(np.sqrt(found.variance)),
        "near_best": _near_best(ladder, loss, loss_stderr, found.variance),
    }


def _unstable(ladder: Ladder, shape: Shape, x: float, lost: float) -> Refusal | None:
    if lost > MAX_LOST:
        reason = (
            f"{100 * lost:.0f} % of repetitions with other noise have no minimum: train more seeds, "
            "or widen the ladder"
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


def _reaches_an_end(ladder: Ladder, low: float, high: float) -> Refusal | None:
    below, above = low <= ladder.points.x_I[0], high >= ladder.points.x_I[-1]
    if high - low > MAX_WIDTH or (below and above):
        reason = (
            f"the interval of the minimum spans a factor of {np.exp(high - low):.2g} of the ladder's "
            f"{np.exp(np.ptp(ladder.points.x_I)):.2g}: widen it at both ends, or train more seeds"
        )
        return Refusal(ProfileStatus.FLAT, reason)
    return _edge(ladder, low=bool(below)) if below or above else None


def _near_best(ladder: Ladder, loss: float, stderr: float, variance: float) -> tuple[str, ...]:
    own_I = variance / ladder.weight_I
    near_I = ladder.loss_I - loss <= np.sqrt(own_I + stderr**2)
    near_I[np.argmin(ladder.loss_I)] = True
    return tuple(name for name, near in zip(ladder.names, near_I, strict=True) if near)


def _curve(ladder: Ladder, shape: Shape) -> dict[str, Any]:
    x_P = np.linspace(ladder.points.x_I[0], ladder.points.x_I[-1], NUM_POINTS)
    loss_P = CURVES[shape].values(ladder.points.x_I, ladder.loss_I, ladder.weight_I, x_P)
    return {
        "shape": shape,
        "curve_num_params": np.exp(x_P + ladder.centre),
        "curve_loss": loss_P,
    }


def _no_minimum() -> dict[str, Any]:
    unknown = (
        "num_params", "num_params_low", "num_params_high", "num_params_log_stderr", "tokens",
        "tokens_log_stderr", "loss", "loss_stderr", "level_stderr", "noise_stderr",
    )  # fmt: skip
    nothing = {"shape": None, "curve_num_params": np.empty(0), "curve_loss": np.empty(0)}
    rest = {"reason": "", "dof": 0.0, "level_dof": 0, "noise": None, "near_best": ()}
    return {**dict.fromkeys(unknown, float("nan")), **nothing, **rest}
