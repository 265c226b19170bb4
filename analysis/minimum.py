"""Where one isoFLOP profile is lowest, and how far off that may be.

The curve is chosen among a parabola, a cubic and an Akima interpolant: of those that are convex and
bracketed, the one that predicts left-out sizes best. The error of the whole procedure, choice
included, is measured by repeating it on curves that the data allow and whose minima are known.

Legend: x is ln N less its mean over the sizes; L loss in nats per token. Shape legend: I sizes, J
sizes that are not at an end, K coefficients (4), R replicates, S kinds of curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc

from analysis.noise import SizeMeans
from analysis.shapes import CURVES, Minima, Polynomial, Shape

SKEW = 0.2
"""Expected size of beta - alpha, which is L'''/L'' at the minimum of E + A / N^alpha + B / D^beta
along an isoFLOP curve. Published: -0.06 (Hoffmann et al. 2022), 0.02 (Besiroglu et al. 2024), 0.18
to 0.42 (Gemstones, 2502.06857)."""
BULGE = 0.1
"""Expected alpha^2 - alpha beta + beta^2, which is L''''/L'' there, and how far off that may be:
0.10 (Hoffmann et al.), 0.13 (Besiroglu et al.), 0.09 to 0.4 (Gemstones)."""
HANDICAP = {Shape.PARABOLA: 1.0, Shape.CUBIC: 1.0, Shape.AKIMA: 4.0}
"""Of the squared error at left-out sizes. An interpolant follows the noise: its minimum has about
ten times the variance of a cubic's (7 sizes), so it has to halve the others' error."""
SAME_ERROR = 1e-10
"""Nats: curves whose errors are this close are equally good; rounding would decide between them."""
LACK_OF_FIT = 0.05
"""Level of the F test by which the sizes scatter around the curve more than their seeds explain."""
NUM_REPLICATES = 800
POWERS = 5
"""Coefficients of a quartic."""


@dataclass(frozen=True, eq=False)
class Points:
    """One loss per size, by size."""

    x_I: np.ndarray
    means: SizeMeans

    @property
    def has_seeds(self) -> bool:
        """Whether seeds say how large the noise is."""
        return self.means.dof > 0


@dataclass(frozen=True, eq=False)
class Chosen:
    """The minimum of the chosen curve in every replicate; NaN if no curve has one."""

    kind_R: np.ndarray
    """Index into the kinds that were tried."""
    minima: Minima


def kinds_for(num_sizes: int, has_seeds: bool) -> tuple[Shape, ...]:
    """Curves that so many sizes support: one size more than coefficients (an interpolant counts as
    a cubic), and a second one where no seeds say how large the noise is.
    """
    spare = 1 if has_seeds else 2
    return tuple(kind for kind, curve in CURVES.items() if num_sizes >= curve.free + spare)


def choose(
    x_I: np.ndarray, loss_RI: np.ndarray, weight_I: np.ndarray, kinds: Sequence[Shape]
) -> Chosen:
    """The best curve of every replicate, and its minimum.

    A kind is as bad as the weighted mean of its squared errors at all sizes but the first and last,
    each predicted by the curve through the others, times its `HANDICAP`. Kinds that are not convex
    or not bracketed take no part. Of equals, the first.
    """
    share_J = weight_I[1:-1] / weight_I[1:-1].sum()
    minima = [CURVES[kind].minima(x_I, loss_RI, weight_I) for kind in kinds]
    x_SR = np.stack([found.x_R for found in minima])
    loss_SR = np.stack([found.loss_R for found in minima])
    error_SR = np.zeros_like(x_SR)
    for s, kind in enumerate(kinds if len(kinds) > 1 else ()):
        error_RJ = CURVES[kind].left_out(x_I, loss_RI, weight_I)
        error_SR[s] = np.sqrt(HANDICAP[kind] * (error_RJ**2 @ share_J))
    error_SR[np.isnan(x_SR)] = np.inf
    kind_R = np.argmax(error_SR <= error_SR.min(axis=0) + SAME_ERROR, axis=0)
    every_R = np.arange(len(loss_RI))
    return Chosen(kind_R, Minima(x_SR[kind_R, every_R], loss_SR[kind_R, every_R]))


def repeated(kinds: Sequence[Shape], chosen: Shape) -> tuple[Shape, ...]:
    """What replicates choose among: an interpolant alone if it was chosen for the data, none if it
    was not. On the smooth curves of the replicates it wins once in hundreds, and takes most of the
    time.
    """
    if chosen is Shape.AKIMA:
        return (chosen,)
    return tuple(kind for kind in kinds if kind is not Shape.AKIMA)


@dataclass(frozen=True, eq=False)
class Allowed:
    """The curves that the data allow: quartics not far from those of known laws."""

    centre: float
    """Of the powers, in x."""
    theta_K: np.ndarray
    """Coefficients, the constant first."""
    root_KK: np.ndarray
    """Of their covariance over the variance of the noise."""
    residual_I: np.ndarray
    """Of the sizes, divided by sqrt(1 - leverage): as large as the noise."""
    variance: float
    """Of a run's noise, from the residuals."""
    dof: float
    """Of that; at least 1."""

    def losses(self, theta_RK: np.ndarray, x_I: np.ndarray) -> np.ndarray:
        """L at the sizes, (R, I)."""
        return theta_RK @ np.vander(x_I - self.centre, POWERS, increasing=True).T

    def minima(self, theta_RK: np.ndarray) -> Minima:
        """By Newton's method from the parabola's vertex; NaN where that does not end."""
        slope_RK = theta_RK[:, 1:] * np.arange(1, POWERS)
        bend_RK = slope_RK[:, 1:] * np.arange(1, POWERS - 1)
        z_R = np.zeros(len(theta_RK))
        for _ in range(8):
            slope_R, bend_R = _horner(slope_RK, z_R), _horner(bend_RK, z_R)
            z_R = np.where(bend_R > 0, z_R - slope_R / bend_R, np.nan)
        done_R = np.abs(slope_R) <= 1e-6 * bend_R
        z_R = np.where(done_R, z_R, np.nan)
        return Minima(z_R + self.centre, _horner(theta_RK, z_R))


def _horner(coefficients_RK: np.ndarray, z_R: np.ndarray) -> np.ndarray:
    value_R = np.zeros_like(z_R)
    for power_R in coefficients_RK.T[::-1]:
        value_R = value_R * z_R + power_R
    return value_R


def allowed_curves(points: Points, variance: float | None = None) -> Allowed:
    """Quartics by weighted least squares, with normal priors on the third and fourth power alone.

    Args:
        points: whose parabola is convex.
        variance: of a run's noise; None takes that of the residuals, found by iteration.
    """
    weight_I, loss_I = points.means.weight_I, points.means.loss_I
    bent = Polynomial(2).solver(points.x_I, weight_I) @ loss_I
    centre = float(np.clip(-bent[1] / (2 * bent[2]), points.x_I[0], points.x_I[-1]))
    power_IK = np.vander(points.x_I - centre, POWERS, increasing=True)
    expected_K = np.array([0.0, 0.0, 0.0, 0.0, BULGE * bent[2] / 12])
    precision_K = np.array([0.0, 0.0, 0.0, (SKEW * bent[2] / 3) ** -2, (BULGE * bent[2] / 12) ** -2])
    rest_I = loss_I - power_IK @ expected_K
    # Without seeds, twice: the second time with the noise that the first found.
    found = _spread(points) if variance is None else variance
    for _ in range(2 if variance is None else 1):
        inverse_KK = _ridge_inverse(power_IK, weight_I, found * precision_K)
        solver_KI = inverse_KK @ (power_IK.T * weight_I)
        leverage_I = np.einsum("ik,ki->i", power_IK, solver_KI)
        residual_I = rest_I - power_IK @ (solver_KI @ rest_I)
        # Below one, the curve goes through all points, or nearly.
        dof = max(1.0, len(loss_I) - float(leverage_I.sum()))
        found = float(weight_I @ residual_I**2) / dof
    theta_K = expected_K + solver_KI @ rest_I
    spread_I = residual_I / np.sqrt(np.maximum(1 - leverage_I, 1e-6))
    return Allowed(centre, theta_K, np.linalg.cholesky(inverse_KK), spread_I, found, dof)


def _spread(points: Points) -> float:
    """Variance of the residuals of a cubic, of a parabola where a cubic leaves too few."""
    degree = 3 if len(points.x_I) > 5 else 2
    weight_I, loss_I = points.means.weight_I, points.means.loss_I
    theta_K = Polynomial(degree).solver(points.x_I, weight_I) @ loss_I
    residual_I = loss_I - np.vander(points.x_I, degree + 1, increasing=True) @ theta_K
    return float(weight_I @ residual_I**2) / max(1, len(loss_I) - degree - 1)


def _ridge_inverse(power_IK: np.ndarray, weight_I: np.ndarray, ridge_K: np.ndarray) -> np.ndarray:
    gram_KK = power_IK.T @ (power_IK * weight_I[:, None]) + np.diag(ridge_K)
    scale_K = np.sqrt(np.diag(gram_KK))
    return np.linalg.inv(gram_KK / np.outer(scale_K, scale_K)) / np.outer(scale_K, scale_K)


@dataclass(frozen=True, eq=False)
class Errors:
    """What the procedure finds less what is true, in the replicates that have a minimum."""

    x_R: np.ndarray
    loss_R: np.ndarray
    lost: float
    """Share of the replicates without a minimum."""
    dof: float
    """Degrees of freedom of the noise."""
    from_seeds: bool
    """Whether the noise is that of the seeds."""
    variance: float
    """Of one run's noise."""


def replicate(points: Points, kinds: Sequence[Shape], rng: np.random.Generator) -> Errors:
    """Repeat the procedure where the truth is known.

    Every replicate draws a curve that the data allow (a parabola's bias is part of its error: its
    minimum is off by a width that the third power decides, which a few noisy sizes leave open), adds
    noise, and chooses and locates as was done for the data. With seeds the noise is normal, of their
    pooled variance. Otherwise, or where the sizes scatter around the curve more than the seeds
    explain, it is a wild bootstrap: normal times a size's own residual, corrected for leverage, its
    square averaged with the mean of all, since one residual is a poor measure of a variance. The
    variance itself is drawn, as few degrees of freedom leave it open (a Student's t otherwise).
    """
    means, weight_I, num = points.means, points.means.weight_I, NUM_REPLICATES
    curves = allowed_curves(points, means.variance if points.has_seeds else None)
    from_seeds = points.has_seeds and not _scatters_more(curves, means)
    if points.has_seeds and not from_seeds:
        curves = allowed_curves(points)
    variance, dof = (
        (means.variance, float(means.dof)) if from_seeds else (curves.variance, curves.dof)
    )
    noise_RI = rng.standard_normal((num, len(points.x_I)))
    if from_seeds:
        noise_RI = np.sqrt(variance) * noise_RI @ np.linalg.cholesky(means.shape_II).T
    else:
        noise_RI *= np.sqrt((curves.residual_I**2 + variance / weight_I) / 2)
    ratio_R1 = np.sqrt(dof / rng.chisquare(dof, (num, 1)))
    drawn_RK = rng.standard_normal((num, POWERS)) @ curves.root_KK.T * np.sqrt(variance) * ratio_R1
    theta_RK = curves.theta_K + drawn_RK
    truth = curves.minima(theta_RK)
    loss_RI = curves.losses(theta_RK, points.x_I) + ratio_R1 * noise_RI
    found = choose(points.x_I, loss_RI, weight_I, kinds).minima
    error_R = found.x_R - truth.x_R
    kept_R = np.isfinite(error_R)
    loss_R = (found.loss_R - truth.loss_R)[kept_R]
    lost = 1 - float(kept_R.mean())
    return Errors(error_R[kept_R], loss_R, lost, dof, from_seeds, variance)


def _scatters_more(curves: Allowed, means: SizeMeans) -> bool:
    if curves.dof == 1 or means.variance == 0:
        return False
    return fdtrc(curves.dof, means.dof, curves.variance / means.variance) < LACK_OF_FIT
