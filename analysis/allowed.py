"""Curves that the sizes of a profile allow, with known minima: the truths of its replicates.

Legend: x is ln N less its mean over the sizes; z is x less the parabola's vertex; L loss in nats
per token. Shape legend: I sizes, J sizes that are not at an end, K coefficients, R replicates.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import numpy as np

from analysis.noise import SizeMeans
from analysis.shapes import CURVES, Minima, Polynomial, Shape

SKEW = 0.2
"""Expected size of beta - alpha, which is L'''/L'' at the minimum of E + A / N^alpha + B / D^beta
along an isoFLOP curve. Published: -0.06 (Hoffmann et al. 2022), 0.02 (Besiroglu et al. 2024), 0.18
to 0.42 (Gemstones, 2502.06857)."""
BULGE = 0.1
"""Expected alpha^2 - alpha beta + beta^2, which is L''''/L'' there, and how far off that may be:
0.10 (Hoffmann et al.), 0.13 (Besiroglu et al.), 0.16 to 0.38 (Gemstones)."""
POWERS = 5
"""Coefficients of a quartic."""
NEIGHBOURS = 1.94
"""Variance of an interpolant's error at a size that it leaves out, over that of a size: 1 + the
squares of the weights -1/6, 2/3, 2/3, -1/6 of the cubic through four neighbours (equal steps)."""


@dataclass(frozen=True, eq=False)
class Points:
    """One loss per size, by size."""

    x_I: np.ndarray
    means: SizeMeans

    @property
    def loss_I(self) -> np.ndarray:
        """Nats per token."""
        return self.means.loss_I

    @property
    def weight_I(self) -> np.ndarray:
        """Inverse variances, relative."""
        return self.means.weight_I

    @property
    def has_seeds(self) -> bool:
        """Whether seeds say how large the noise is."""
        return self.means.dof > 0


@dataclass(frozen=True, eq=False)
class Allowed(ABC):
    """A family of curves, and what the sizes scatter around it."""

    residual_I: np.ndarray
    """As large as the noise."""
    variance: float
    """Of one run's noise, from the residuals."""
    dof: float
    """Of that; at least 1."""

    @abstractmethod
    def draw(self, noise_R: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Minima]:
        """Curves that noise of these standard deviations allows: L at the sizes, (R, I), and where
        each is lowest.
        """


@final
@dataclass(frozen=True, eq=False)
class Quartics(Allowed):
    """Quartics not far from the curves of known laws."""

    z_I: np.ndarray
    centre: float
    """Of z, in x."""
    theta_K: np.ndarray
    """Coefficients, the constant first."""
    root_KK: np.ndarray
    """Of their covariance over the variance of the noise."""

    def draw(self, noise_R: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Minima]:
        """Normal around the coefficients."""
        normal_RK = rng.standard_normal((len(noise_R), POWERS))
        theta_RK = self.theta_K + noise_R[:, None] * (normal_RK @ self.root_KK.T)
        return theta_RK @ _powers(self.z_I).T, _minima(theta_RK, self.centre)


@final
@dataclass(frozen=True, eq=False)
class Interpolant(Allowed):
    """The Akima interpolant alone, where no cubic predicts the sizes half as well."""

    points: Points

    def draw(self, noise_R: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Minima]:
        """The same curve for all."""
        points, akima = self.points, CURVES[Shape.AKIMA]
        loss_RI = np.tile(points.loss_I, (len(noise_R), 1))
        return loss_RI, akima.minima(points.x_I, loss_RI, points.weight_I)


def quartics(points: Points, variance: float | None = None) -> Quartics:
    """By weighted least squares, with normal priors on the third and fourth power alone.

    Residuals are divided by sqrt(1 - leverage).

    Args:
        points: whose parabola is convex.
        variance: of a run's noise; None takes that of the residuals.
    """
    if variance is None:
        # The residuals of a cubic say which prior to take, those of the quartic which noise.
        variance = _ridge(points, _spread(points)).variance
    return _ridge(points, variance)


def interpolant(points: Points) -> Interpolant:
    """With the noise by which it misses the sizes that it leaves out."""
    error_J = CURVES[Shape.AKIMA].left_out(points.x_I, points.loss_I[None], points.weight_I)[0]
    weight_J = points.weight_I[1:-1] / NEIGHBOURS
    variance = float(np.mean(weight_J * error_J**2))
    inner_I = np.pad(error_J / np.sqrt(NEIGHBOURS), 1, constant_values=np.nan)
    residual_I = np.where(np.isnan(inner_I), np.sqrt(variance / points.weight_I), inner_I)
    # Neighbouring errors share sizes: about half of them are independent.
    return Interpolant(residual_I, variance, max(1.0, len(error_J) / 2), points)


def _ridge(points: Points, variance: float) -> Quartics:
    weight_I, loss_I = points.weight_I, points.loss_I
    parabola_K = Polynomial(2).solver(points.x_I, weight_I) @ loss_I
    bend = parabola_K[2]
    centre = float(np.clip(-parabola_K[1] / (2 * bend), points.x_I[0], points.x_I[-1]))
    z_I = points.x_I - centre
    power_IK = _powers(z_I)
    expected_K = np.array([0.0, 0.0, 0.0, 0.0, BULGE * bend / 12])
    prior_K = np.array([0.0, 0.0, 0.0, (SKEW * bend / 3) ** -2, (BULGE * bend / 12) ** -2])
    gram_KK = power_IK.T @ (power_IK * weight_I[:, None]) + np.diag(variance * prior_K)
    scale_K = np.sqrt(np.diag(gram_KK))
    inverse_KK = np.linalg.inv(gram_KK / np.outer(scale_K, scale_K)) / np.outer(scale_K, scale_K)
    solver_KI = inverse_KK @ (power_IK.T * weight_I)
    rest_I = loss_I - power_IK @ expected_K
    theta_K = solver_KI @ rest_I
    residual_I = rest_I - power_IK @ theta_K
    leverage_I = np.einsum("ik,ki->i", power_IK, solver_KI)
    # Below one, the curve goes through all points, or nearly.
    dof = max(1.0, len(loss_I) - float(leverage_I.sum()))
    return Quartics(
        residual_I=residual_I / np.sqrt(np.maximum(1 - leverage_I, 1e-6)),
        variance=float(weight_I @ residual_I**2) / dof,
        dof=dof,
        z_I=z_I,
        centre=centre,
        theta_K=expected_K + theta_K,
        root_KK=np.linalg.cholesky(inverse_KK),
    )


def _spread(points: Points) -> float:
    """Variance of the residuals of a cubic, of a parabola where a cubic leaves too few."""
    degree = 3 if len(points.x_I) > 5 else 2
    theta_K = Polynomial(degree).solver(points.x_I, points.weight_I) @ points.loss_I
    residual_I = points.loss_I - np.vander(points.x_I, degree + 1, increasing=True) @ theta_K
    return float(points.weight_I @ residual_I**2) / max(1, len(residual_I) - degree - 1)


def _powers(z_I: np.ndarray) -> np.ndarray:
    return np.vander(z_I, POWERS, increasing=True)


def _minima(theta_RK: np.ndarray, centre: float) -> Minima:
    """By Newton's method from the parabola's vertex; NaN where that does not end."""
    slope_RK = theta_RK[:, 1:] * np.arange(1, POWERS)
    bend_RK = slope_RK[:, 1:] * np.arange(1, POWERS - 1)
    z_R = step_R = np.zeros(len(theta_RK))
    for _ in range(8):
        bend_R = _horner(bend_RK, z_R)
        step_R = np.where(bend_R > 0, _horner(slope_RK, z_R) / bend_R, np.nan)
        z_R = z_R - step_R
    z_R = np.where(np.abs(step_R) <= 1e-6, z_R, np.nan)
    return Minima(z_R + centre, _horner(theta_RK, z_R))


def _horner(coefficients_RK: np.ndarray, z_R: np.ndarray) -> np.ndarray:
    value_R = np.zeros_like(z_R)
    for power_R in coefficients_RK.T[::-1]:
        value_R = value_R * z_R + power_R
    return value_R
