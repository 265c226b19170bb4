"""Where one isoFLOP profile is lowest, and how far off that may be.

The curve is chosen among a parabola, a cubic and an Akima interpolant: of those that are convex and
bracketed, the one that predicts left-out sizes best. The error of the whole procedure, choice
included, is measured by repeating it on curves that the data allow and whose minima are known.

Legend: x is ln N less its mean over the sizes; L loss in nats per token. Shape legend: I sizes, J
sizes that are not at an end, R replicates, S kinds of curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc

from analysis.allowed import Allowed, Points, interpolant, quartics
from analysis.shapes import CURVES, Minima, Shape

HANDICAP = {Shape.PARABOLA: 1.0, Shape.CUBIC: 1.0, Shape.AKIMA: 4.0}
"""Of the squared error at left-out sizes. An interpolant follows the noise: its minimum has about
ten times the variance of a cubic's (7 sizes), so it has to halve the others' error."""
SAME_ERROR = 1e-10
"""Nats: curves whose errors are this close are equally good; rounding would decide between them."""
LACK_OF_FIT = 0.05
"""Level of the F test by which the sizes scatter around the curve more than their seeds explain."""
NUM_REPLICATES = 800


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

    Every replicate draws a curve that the data allow, adds noise, and chooses and locates as was
    done for the data. That a parabola is biased is thus part of its error: by how much, the third
    power decides, which few noisy sizes leave open.

    With seeds the noise is normal, of their pooled variance. Otherwise, or where the sizes scatter
    around the curve more than the seeds explain, it is a wild bootstrap: normal times a size's own
    residual, corrected for leverage, its square averaged with the mean of all, as one residual is a
    poor measure of a variance. The variance is drawn too, as few degrees of freedom leave it open:
    what a Student's t does for a mean.
    """
    means, weight_I, num = points.means, points.weight_I, NUM_REPLICATES
    interpolated = tuple(kinds) == (Shape.AKIMA,)
    known = means.variance if points.has_seeds else None
    curves = interpolant(points) if interpolated else quartics(points, known)
    from_seeds = points.has_seeds and not _scatters_more(curves, points)
    if points.has_seeds and not (from_seeds or interpolated):
        curves = quartics(points)
    variance, dof = (means.variance, means.dof) if from_seeds else (curves.variance, curves.dof)
    noise_RI = rng.standard_normal((num, len(points.x_I)))
    if from_seeds:
        noise_RI = np.sqrt(variance) * noise_RI @ np.linalg.cholesky(means.shape_II).T
    else:
        noise_RI *= np.sqrt((curves.residual_I**2 + variance / weight_I) / 2)
    ratio_R = np.sqrt(dof / rng.chisquare(dof, num))
    loss_RI, truth = curves.draw(np.sqrt(variance) * ratio_R, rng)
    found = choose(points.x_I, loss_RI + ratio_R[:, None] * noise_RI, weight_I, kinds).minima
    error_R = found.x_R - truth.x_R
    kept_R = np.isfinite(error_R)
    return Errors(
        x_R=error_R[kept_R],
        loss_R=(found.loss_R - truth.loss_R)[kept_R],
        lost=1 - float(kept_R.mean()),
        dof=float(dof),
        from_seeds=from_seeds,
        variance=variance,
    )


def _scatters_more(curves: Allowed, points: Points) -> bool:
    """Whether an F test says so; seeds without any spread say nothing."""
    if points.means.variance == 0:
        return True
    ratio = curves.variance / points.means.variance
    return curves.dof > 1 and bool(fdtrc(curves.dof, points.means.dof, ratio) < LACK_OF_FIT)
