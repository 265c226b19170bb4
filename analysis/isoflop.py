"""IsoFLOP profiles: a parabola per (variant, budget), its minimum, and power laws over budgets.

Approach 2 of Hoffmann et al. 2022 (2203.15556). What cannot be answered is refused by name; every
answer has a standard error where the number of points allows one.

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd

from analysis.fitting import student_quantile
from analysis.laws import parabola_vertex
from analysis.load import AnalysisError, as_frame, usable
from analysis.powerlaw import fit_power_law

ORDER = ("dense", "moe", "pkm", "peer")
AXES = ("num_params_total", "num_params_active")
MIN_SIZES = 4
"""Sizes per profile: a parabola passes through any three points, whatever they say."""


class ProfileStatus(StrEnum):
    """What became of a profile."""

    OK = "ok"
    TOO_FEW = "too few sizes"
    """Fewer than `MIN_SIZES`: nothing is fitted."""
    CONCAVE = "concave"
    """The parabola opens downwards: no minimum."""
    FLAT = "flat"
    """Its curvature cannot be told from zero: no minimum can be located."""
    EDGE = "edge"
    """The lowest trained point or the vertex is at an end of the ladder or beyond: the minimum
    is not bracketed, add sizes on that side."""


@dataclass(frozen=True)
class Profile:
    """One isoFLOP curve; `num_params`, `tokens` and `loss` of the minimum are NaN unless ok."""

    variant: str
    budget: float
    status: ProfileStatus
    coefficients: tuple[float, float, float] | None
    """Of `laws.parabola` in ln N; None if nothing was fitted."""
    num_params: float
    """N* at the vertex."""
    num_params_low: float
    num_params_high: float
    """95 % interval of N*, from the residuals (delta method)."""
    tokens: float
    """D* at the vertex, interpolated between the trained sizes."""
    loss: float
    """L* at the vertex, nats per token."""
    loss_stderr: float
    """Standard error of L* from the residuals; NaN without a degree of freedom."""
    dof: int
    """Degrees of freedom of the residuals."""
    best_size: str
    """The trained backbone with the lowest mean loss over seeds."""
    best_num_params: float
    best_loss: float
    """Its loss."""
    smallest: float
    largest: float
    """The range of N that was trained."""
    num_sizes: int
    num_runs: int

    @property
    def ok(self) -> bool:
        """Whether the minimum is an answer."""
        return self.status is ProfileStatus.OK

    @property
    def loss_margin(self) -> float:
        """Half width of the 95 % interval of L*."""
        return student_quantile(self.dof) * self.loss_stderr


@dataclass(frozen=True)
class PowerLaw:
    """of = exp(log_coefficient) C^exponent through the ok minima of a variant."""

    variant: str
    of: str
    """`N`, `D` or `L`."""
    log_coefficient: float
    exponent: float
    exponent_stderr: float
    """NaN with two budgets, through which any power law passes."""
    num_budgets: int

    @property
    def exponent_margin(self) -> float:
        """Half width of the exponent's 95 % interval: 12.7 standard errors with three budgets."""
        return student_quantile(self.num_budgets - 2) * self.exponent_stderr


@dataclass(frozen=True)
class IsoflopFit:
    """All profiles of a study and the power laws over them."""

    axis: str
    """What N counts: a column of the frame."""
    profiles: tuple[Profile, ...]
    laws: tuple[PowerLaw, ...]

    def profile(self, variant: str, budget: float) -> Profile | None:
        """The profile of a variant at a budget."""
        found = (p for p in self.profiles if (p.variant, p.budget) == (variant, budget))
        return next(found, None)

    @property
    def variants(self) -> list[str]:
        """Labels of the variants: the paper's four in its order, then others by name."""
        found = {p.variant for p in self.profiles}
        return [v for v in ORDER if v in found] + sorted(found - set(ORDER))

    @property
    def budgets(self) -> list[float]:
        """Budgets, ascending."""
        return sorted({p.budget for p in self.profiles})

    def optima(self, variant: str) -> list[Profile]:
        """The variant's profiles with a minimum, by budget."""
        own = [p for p in self.profiles if p.variant == variant and p.ok]
        return sorted(own, key=lambda p: p.budget)


def fit_isoflop(frame: pd.DataFrame, axis: str = "num_params_total") -> IsoflopFit:
    """Fit every profile of a frame and the power laws over their minima.

    Args:
        frame: as `load_runs` returns it, or anything that `load.as_frame` takes; excluded rows
            are left out.
        axis: what N counts, one of `AXES`.

    Raises:
        AnalysisError: no usable row, or runs of several studies, which need not be comparable.
    """
    if axis not in AXES:
        raise AnalysisError(f"axis={axis!r}: choose one of {', '.join(AXES)}")
    rows = usable(as_frame(frame))
    if rows.empty:
        raise AnalysisError(f"none of {len(frame)} runs is usable; their reasons are in `excluded`")
    if not (np.isfinite(rows[axis]) & (rows[axis] > 0)).all():
        raise AnalysisError(f"axis={axis}: not every usable run has a positive {axis}")
    studies = sorted(set(rows["study"]))
    if len(studies) > 1:
        names = ", ".join(studies)
        raise AnalysisError(
            f"runs of several studies ({names}): analyse one study's folder at a time"
        )
    cells = sorted(set(zip(rows["variant"], rows["budget"], strict=True)))
    profiles = [
        fit_profile(v, C, rows.loc[(rows["variant"] == v) & (rows["budget"] == C)], axis)
        for v, C in cells
    ]
    profiles.sort(key=lambda p: p.budget)
    fit = IsoflopFit(axis, tuple(profiles), ())
    laws = [law for variant in fit.variants for law in _power_laws(variant, fit.optima(variant))]
    return IsoflopFit(axis, tuple(profiles), tuple(laws))


def fit_profile(variant: str, budget: float, runs: pd.DataFrame, axis: str) -> Profile:
    """Fit one isoFLOP curve by least squares in ln N, all seeds as points of their own."""
    log_N, L = np.log(runs[axis].to_numpy()), runs["loss"].to_numpy()
    means = runs.groupby("size", sort=False).agg({axis: "first", "loss": "mean"}).sort_values(axis)
    best = means["loss"].idxmin()
    facts = {
        "variant": variant,
        "budget": budget,
        "best_size": str(best),
        "best_num_params": float(means.loc[best, axis]),
        "best_loss": float(means.loc[best, "loss"]),
        "smallest": float(means[axis].iloc[0]),
        "largest": float(means[axis].iloc[-1]),
        "num_sizes": len(means),
        "num_runs": len(runs),
    }
    if len(means) < MIN_SIZES:
        return Profile(status=ProfileStatus.TOO_FEW, coefficients=None, **_no_minimum(), **facts)
    fit = _least_squares(log_N, L)
    at_an_end = best in (means.index[0], means.index[-1])
    status = _status(fit, at_an_end, facts["smallest"], facts["largest"])
    if status is not ProfileStatus.OK:
        return Profile(status=status, coefficients=fit.coefficients, **_no_minimum(), **facts)
    return Profile(
        status=status, coefficients=fit.coefficients, **_minimum(fit, runs, axis), **facts
    )


@dataclass(frozen=True)
class _Parabola:
    coefficients: tuple[float, float, float]
    covariance: np.ndarray
    """Of the coefficients; NaN without a degree of freedom."""
    dof: int


def _least_squares(log_N: np.ndarray, L: np.ndarray) -> _Parabola:
    # Centred: the columns (ln N)^2, ln N, 1 are otherwise nearly parallel.
    centre = log_N.mean()
    design = np.vander(log_N - centre, 3)
    solution, *_ = np.linalg.lstsq(design, L, rcond=None)
    dof = len(L) - 3
    residuals = L - design @ solution
    variance = residuals @ residuals / dof if dof else np.nan
    a, b, c = solution
    # (x - m)^2 a + (x - m) b + c, expanded in x; `shift` is the Jacobian of that.
    shift = np.array([[1.0, 0.0, 0.0], [-2 * centre, 1.0, 0.0], [centre**2, -centre, 1.0]])
    covariance = shift @ (variance * np.linalg.inv(design.T @ design)) @ shift.T
    coefficients = (float(a), float(b - 2 * a * centre), float(c - b * centre + a * centre**2))
    return _Parabola(coefficients, covariance, dof)


def _status(fit: _Parabola, at_an_end: bool, smallest: float, largest: float) -> ProfileStatus:
    a = fit.coefficients[0]
    if a <= 0:
        return ProfileStatus.CONCAVE
    if fit.dof and a < student_quantile(fit.dof) * np.sqrt(fit.covariance[0, 0]):
        return ProfileStatus.FLAT
    log_N, _ = parabola_vertex(fit.coefficients)
    if at_an_end or not np.log(smallest) < log_N < np.log(largest):
        return ProfileStatus.EDGE
    return ProfileStatus.OK


def _minimum(fit: _Parabola, runs: pd.DataFrame, axis: str) -> dict[str, float]:
    """Vertex with standard errors by the delta method, and D there."""
    a, b, _ = fit.coefficients
    log_N, loss = parabola_vertex(fit.coefficients)
    loss_gradient = np.array([log_N**2, log_N, 1.0])  # envelope theorem: dL/dN* vanishes
    size_gradient = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
    loss_stderr = np.sqrt(loss_gradient @ fit.covariance @ loss_gradient)
    margin = student_quantile(fit.dof) * np.sqrt(size_gradient @ fit.covariance @ size_gradient)
    trained = runs.sort_values(axis)
    log_D = np.interp(log_N, np.log(trained[axis]), np.log(trained["tokens"]))
    return {
        "num_params": float(np.exp(log_N)),
        "num_params_low": float(np.exp(log_N - margin)),
        "num_params_high": float(np.exp(log_N + margin)),
        "tokens": float(np.exp(log_D)),
        "loss": float(loss),
        "loss_stderr": float(loss_stderr),
        "dof": fit.dof,
    }


def _no_minimum() -> dict[str, float]:
    names = ("num_params", "num_params_low", "num_params_high", "tokens", "loss", "loss_stderr")
    return {**dict.fromkeys(names, float("nan")), "dof": 0}


def _power_laws(variant: str, optima: Sequence[Profile]) -> list[PowerLaw]:
    """Ln N*, ln D* and ln L* against ln C by least squares; none from fewer than two budgets."""
    if len(optima) < 2:
        return []
    C = [p.budget for p in optima]
    values = {
        "N": [p.num_params for p in optima],
        "D": [p.tokens for p in optima],
        "L": [p.loss for p in optima],
    }
    return [_power_law(variant, of, C, y) for of, y in values.items()]


def _power_law(variant: str, of: str, C: Sequence[float], y: Sequence[float]) -> PowerLaw:
    fit = fit_power_law(np.array(C), np.array(y))
    return PowerLaw(variant, of, fit.log_coefficient, fit.exponent, fit.exponent_stderr, len(y))
