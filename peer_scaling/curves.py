"""IsoFLOP curves while a study runs: the minimum, its interval, and what one more run would tell.

Around its minimum, with x = ln N - ln N*, a curve L = E + A / N^alpha + B / D^beta at fixed compute
is

    L = L* + c2 (x^2 + (beta - alpha) / 3 x^3 + (alpha^2 - alpha beta + beta^2) / 12 x^4 + ...).

A plain parabola leaves out the last two terms and so misplaces N*, the more the wider the ladder
(2603.22339). Here both are fitted, with priors relative to c2 that published exponents suggest, so
that four sizes are enough and the intervals know of the bias. What comes after them counts as an
error that grows with x: sizes far from the minimum weigh less.

Suffixes: P runs, one point each (seeds of a size are points of their own); S sizes; K the five
coefficients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.9
REST = 1e-3
"""Standard deviation of the terms from x^5 on, over c2 |x|^5."""
MIN_SIZES = 4
"""With a loss, per curve: a parabola passes through any three points, whatever they say."""
MIN_NOISE = 1e-4
"""Nats. Losses are not known better than this, however well four points lie on a curve."""
FIRST_NOISE = 0.01
"""Nats: where the estimate of the noise begins; it does not depend on it where it ends."""
NOISE_ROUNDS = 4
MAX_STEPS = 30
MAX_MOVE = 0.7
"""Of the vertex in one step of the fit, in ln N."""


@dataclass(frozen=True)
class Shape:
    """What is known of a curve's skew and width before its runs: normal priors."""

    cubic: float
    """Mean of c3 / c2."""
    cubic_spread: float
    """Its standard deviation."""
    quartic: float
    quartic_spread: float

    def drifted(self) -> "Shape":
        """The same at another budget: equal if C = 6 N D, and nearly so otherwise."""
        return Shape(
            self.cubic, math.hypot(self.cubic_spread, CUBIC_DRIFT),
            self.quartic, math.hypot(self.quartic_spread, QUARTIC_DRIFT),
        )  # fmt: skip


PUBLISHED = Shape(0.0, 0.05, 0.01, 0.005)
"""Exponents that differ by 0.15 (published: 0.03 to 0.31); both 0.35, and from 0.25 to 0.42."""
CUBIC_DRIFT, QUARTIC_DRIFT = 0.01, 0.001


@dataclass(frozen=True)
class Points:
    """The runs of one curve that have a loss."""

    log_N_P: np.ndarray
    loss_P: np.ndarray
    """Nats per token."""


@dataclass(frozen=True)
class Minimum:
    """A fitted curve, in powers of x = ln N - `log_N`."""

    log_N: float
    """Ln N* at the vertex."""
    loss: float
    """L*, nats per token."""
    curvature: float
    """c2 above, nats; positive."""
    coefficients_K: np.ndarray
    information_KK: np.ndarray
    """Inverse of the coefficients' covariance, the priors of the last two included."""
    noise: float
    """Standard deviation of a run's loss that the fit was given, nats."""
    residual_squares: float
    """Of the runs, weighted by their shares; over `dof` it estimates the squared noise."""
    dof: float
    """Runs, each by its share of the weight of one at the vertex, less their leverage."""

    @property
    def shape(self) -> Shape:
        """What the runs and the prior say of it."""
        covariance_KK = np.linalg.inv(self.information_KK)
        found = []
        for power in (3, 4):
            ratio = self.coefficients_K[power] / self.curvature
            row_K = np.zeros(5)
            row_K[power], row_K[2] = 1, -ratio
            found += [float(ratio), math.sqrt(row_K @ covariance_KK @ row_K) / self.curvature]
        return Shape(*found)

    def after(self, log_N: float) -> "Minimum":
        """The same curve as if one more run at `log_N` had confirmed it."""
        (gain_KK,) = self._gains(np.array([log_N]))
        return replace(self, information_KK=self.information_KK + gain_KK)

    def deviations_after(self, log_N_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Standard deviations of ln N* and of L* (nats) after one more run at each of some sizes,
        by the delta method and for given noise.
        """
        return self._deviations(self._gains(log_N_S))

    def deviations_after_two(self, log_N_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same after one more run at each of two sizes, for all pairs."""
        gain_SKK = self._gains(log_N_S)
        return self._deviations(gain_SKK[:, None] + gain_SKK)

    def _deviations(self, gain_KK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        covariance_KK = np.linalg.inv(self.information_KK + gain_KK)
        slope, loss = covariance_KK[..., 1, 1], covariance_KK[..., 0, 0]
        return np.sqrt(slope) / (2 * self.curvature), np.sqrt(loss)

    def _gains(self, log_N_S: np.ndarray) -> np.ndarray:
        """Information that a run at each of some sizes adds."""
        x_S = log_N_S - self.log_N
        rows_SK = _powers(x_S)
        weight_S = _weights(x_S, self.noise, self.curvature)
        return weight_S[:, None, None] * rows_SK[:, :, None] * rows_SK[:, None, :]


@dataclass(frozen=True)
class Margins:
    """Half widths of the 90 % intervals of a minimum; infinite where the runs do not say."""

    log_N: float
    """Of ln N*: 0.1 is 10 % of N*."""
    loss: float
    """Of L*, nats."""


def fit_minimum(points: Points, noise: float, shape: Shape = PUBLISHED) -> Minimum | None:
    """The minimum of a curve, or None if the fit has none: it opens downwards, or stands still
    nowhere near the runs.

    Args:
        points: at least `MIN_SIZES` different sizes.
        noise: standard deviation of a run's loss, nats.
        shape: what is known of the curve besides its runs.
    """
    log_N_P, loss_P = points.log_N_P, points.loss_P
    centre = float(log_N_P[loss_P.argmin()])
    curvature = _parabola_curvature(log_N_P - centre, loss_P)
    for _ in range(MAX_STEPS):
        if not curvature > 0:
            return None
        x_P = log_N_P - centre
        weight_P = _weights(x_P, noise, curvature)
        rows_PK = _powers(x_P)
        information_KK = rows_PK.T @ (weight_P[:, None] * rows_PK)
        expected_K = rows_PK.T @ (weight_P * loss_P)
        priors = (shape.cubic, shape.cubic_spread), (shape.quartic, shape.quartic_spread)
        for power, (mean, spread) in enumerate(priors, 3):
            information_KK[power, power] += (spread * curvature) ** -2
            expected_K[power] += mean / spread**2 / curvature
        coefficients_K = np.linalg.solve(information_KK, expected_K)
        slope, curvature = float(coefficients_K[1]), float(coefficients_K[2])
        move = -slope / (2 * curvature) if curvature > 0 else 0.0
        if curvature > 0 and abs(move) < 1e-6:
            residual_P = loss_P - rows_PK @ coefficients_K
            squares, dof = _residuals(rows_PK, weight_P, information_KK, residual_P, noise)
            return Minimum(
                centre,
                float(coefficients_K[0]),
                curvature,
                coefficients_K,
                information_KK,
                noise,
                squares,
                dof,
            )
        centre += min(max(move, -MAX_MOVE), MAX_MOVE)
    return None


def fit_minima(
    curves: Sequence[Points], shapes: Sequence[Shape]
) -> tuple[list[Minimum | None], float]:
    """The minima of curves with the same noise, and the degrees of freedom of its estimate.

    The noise is estimated from residuals of all curves together, seeds included: squared residuals
    over degrees of freedom, again and again with the weights that follow from it.
    """
    noise, dof = FIRST_NOISE, 0.0
    minima: list[Minimum | None] = []
    for _ in range(NOISE_ROUNDS):
        minima = [
            fit_minimum(points, noise, shape) for points, shape in zip(curves, shapes, strict=True)
        ]
        found = [minimum for minimum in minima if minimum]
        dof = sum(minimum.dof for minimum in found)
        if dof < 0.5:
            return minima, 0.0
        squares = sum(minimum.residual_squares for minimum in found)
        noise = max(MIN_NOISE, math.sqrt(squares / dof))
    return minima, dof


def margins(minimum: Minimum | None, dof: float) -> Margins:
    """Half widths of the 90 % intervals, with Student's quantile for `dof` degrees of freedom.

    That of ln N*, a ratio of coefficients, by Fieller's theorem (1954): infinite if the curvature
    cannot be told from 0.
    """
    if minimum is None or dof < 0.5:
        return Margins(math.inf, math.inf)
    covariance_KK = np.linalg.inv(minimum.information_KK)
    t = float(stdtrit(dof, (1 + CONFIDENCE) / 2))
    slope, both, curvature = covariance_KK[1, 1], covariance_KK[1, 2], covariance_KK[2, 2]
    left = minimum.curvature**2 - t * t * curvature
    loss = t * math.sqrt(covariance_KK[0, 0])
    if left <= 0:
        return Margins(math.inf, loss)
    return Margins(t * math.sqrt((t * both) ** 2 + slope * left) / (2 * left), loss)


def _powers(x_P: np.ndarray) -> np.ndarray:
    return x_P[:, None] ** np.arange(5)


def _weights(x_P: np.ndarray, noise: float, curvature: float) -> np.ndarray:
    """One over the variance of a run around the polynomial: noise, and the terms it leaves out."""
    return 1 / (noise**2 + (REST * curvature * x_P**5) ** 2)


def _parabola_curvature(x_P: np.ndarray, loss_P: np.ndarray) -> float:
    rows_PK = _powers(x_P)[:, :3]
    return float(np.linalg.lstsq(rows_PK, loss_P, rcond=None)[0][2])


def _residuals(
    rows_PK: np.ndarray,
    weight_P: np.ndarray,
    information_KK: np.ndarray,
    residual_P: np.ndarray,
    noise: float,
) -> tuple[float, float]:
    """Weighted squares whose expectation is squared noise times the second: a run's share is its
    weight over that of a run at the vertex.
    """
    share_P = weight_P * noise**2
    leverage_P = weight_P * np.einsum(
        "pk,pk->p", rows_PK, np.linalg.solve(information_KK, rows_PK.T).T
    )
    return float((share_P**2) @ residual_P**2), float(share_P @ (1 - leverage_P))
