"""From the runs of one (variant, budget) to its `Profile`: checks, curve, minimum, interval.

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token. Shape legend: I sizes, P points of a curve, U runs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.fitting import CONFIDENCE, percentiles, student_quantile
from analysis.ladder import Ladder, ladder_of
from analysis.minimum import choose, kinds_for, repeated, replicate
from analysis.profile import Noise, Profile, ProfileStatus
from analysis.refusals import edge, no_valley, reaches_an_end, too_few, unstable
from analysis.shapes import CURVES, Shape

NUM_POINTS = 200


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
    best = int(np.argmin(ladder.points.loss_I))
    facts: dict[str, Any] = {
        "variant": variant,
        "budget": budget,
        "level": level,
        "left_out": ladder.left_out,
        "best_size": ladder.names[best],
        "best_num_params": float(ladder.num_params_I[best]),
        "best_loss": float(ladder.points.loss_I[best]),
        "smallest": float(ladder.num_params_I[0]),
        "largest": float(ladder.num_params_I[-1]),
        "num_sizes": len(ladder.names),
        "num_runs": ladder.num_runs,
        **_no_minimum(),
    }
    kinds = kinds_for(len(ladder.names), ladder.points.has_seeds)
    refusal = too_few(ladder, kinds) or no_valley(ladder)
    if refusal is not None:
        drawn = _curve(ladder, Shape.PARABOLA) if kinds else {}
        return Profile(**facts | drawn | vars(refusal))
    return Profile(**facts | _located(ladder, kinds, level))


def _located(ladder: Ladder, kinds: Sequence[Shape], level: float) -> dict[str, Any]:
    """Curve, status and minimum."""
    points = ladder.points
    chosen = choose(points.x_I, points.loss_I[None], points.weight_I, kinds)
    x, loss = float(chosen.minima.x_R[0]), float(chosen.minima.loss_R[0])
    if np.isnan(x):
        drawn = _curve(ladder, Shape.PARABOLA)
        return drawn | vars(edge(ladder, low=bool(drawn["curve_loss"].argmin() == 0)))
    shape = kinds[int(chosen.kind_R[0])]
    found = replicate(points, repeated(kinds, shape), np.random.default_rng(0))
    refusal = unstable(ladder, shape, x, found.lost)
    if refusal is None:
        error_low, error_high = percentiles(found.x_R, CONFIDENCE)
        refusal = reaches_an_end(ladder, x - error_high, x - error_low)
    if refusal is not None:
        return _curve(ladder, shape) | vars(refusal)
    low, high = percentiles(found.x_R, level)
    return {
        **_curve(ladder, shape),
        **_position(ladder, x, _stderr(found.x_R, found.dof)),
        "status": ProfileStatus.OK,
        "num_params_low": float(np.exp(x + ladder.centre - high)),
        "num_params_high": float(np.exp(x + ladder.centre - low)),
        "loss": loss,
        "loss_stderr": _stderr(found.loss_R, found.dof),
        "dof": found.dof,
        "level_stderr": points.means.level_stderr,
        "level_dof": points.means.level_dof,
        "noise": Noise.SEEDS if found.from_seeds else Noise.SCATTER,
        "noise_stderr": float(np.sqrt(found.variance)),
        "near_best": _near_best(ladder, loss, _stderr(found.loss_R, found.dof), found.variance),
    }


def _stderr(error_R: np.ndarray, dof: float) -> float:
    """By which Student's t gives an interval as wide as that of the errors."""
    low, high = percentiles(error_R, CONFIDENCE)
    return (high - low) / 2 / student_quantile(dof)


def _position(ladder: Ladder, x: float, x_stderr: float) -> dict[str, float]:
    """N* and D*, between the trained sizes by straight lines in ln N and ln D."""
    log_N = x + ladder.centre
    log_N_I, log_D_I = np.log(ladder.num_params_I), np.log(ladder.tokens_I)
    around = log_N + np.array([-0.5, 0.0, 0.5]) * x_stderr
    low, log_D, high = (float(value) for value in np.interp(around, log_N_I, log_D_I))
    return {
        "num_params": float(np.exp(log_N)),
        "num_params_log_stderr": x_stderr,
        "tokens": float(np.exp(log_D)),
        "tokens_log_stderr": abs(high - low),
    }


def _near_best(ladder: Ladder, loss: float, stderr: float, variance: float) -> tuple[str, ...]:
    own_I = variance / ladder.points.weight_I
    near_I = ladder.points.loss_I - loss <= np.sqrt(own_I + stderr**2)
    near_I[np.argmin(ladder.points.loss_I)] = True
    return tuple(name for name, near in zip(ladder.names, near_I, strict=True) if near)


def _curve(ladder: Ladder, shape: Shape) -> dict[str, Any]:
    x_P = np.linspace(ladder.points.x_I[0], ladder.points.x_I[-1], NUM_POINTS)
    loss_P = CURVES[shape].values(
        ladder.points.x_I, ladder.points.loss_I, ladder.points.weight_I, x_P
    )
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
