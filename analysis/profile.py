"""One isoFLOP profile: what is known of its minimum, or why nothing is, and what to do next.

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from analysis.fitting import student_quantile
from analysis.shapes import Shape


class ProfileStatus(StrEnum):
    """What became of a profile."""

    OK = "ok"
    TOO_FEW = "too few sizes"
    """Fewer than `refusals.MIN_SIZES`, or too few for any curve: nothing is located."""
    CONCAVE = "concave"
    """The parabola opens downwards, beyond the noise: no minimum."""
    FLAT = "flat"
    """Its curvature cannot be told from zero, or the minimum could be anywhere within a factor of 4
    or more."""
    EDGE = "edge"
    """The lowest size is at an end of the ladder, or the interval of the minimum reaches one: the
    minimum is not bracketed."""
    UNSTABLE = "unstable"
    """The minimum hangs on a single size, or is lost in repetitions with other noise."""


class Noise(StrEnum):
    """Where the interval comes from."""

    SEEDS = "seeds"
    """The pooled spread of the seeds within each size."""
    SCATTER = "scatter"
    """That of the sizes around the curve: there is one seed, or they scatter more than seeds do."""


@dataclass(frozen=True)
class LeftOut:
    """A run that is not in the fit."""

    run: str
    num_params: float
    loss: float
    reason: str


@dataclass(frozen=True, eq=False)
class Profile:
    """One isoFLOP curve; what concerns the minimum is NaN unless ok."""

    variant: str
    budget: float
    status: ProfileStatus
    reason: str
    """Why there is no minimum and what to run next; empty if ok."""
    shape: Shape | None
    """Of the curve; None if nothing was fitted."""
    curve_num_params: np.ndarray
    """Points of the curve over the trained sizes, for drawing; empty if nothing was fitted."""
    curve_loss: np.ndarray
    num_params: float
    """N*."""
    num_params_low: float
    num_params_high: float
    """Interval of N* at `level`."""
    num_params_log_stderr: float
    """Standard error of ln N*."""
    tokens: float
    """D*, interpolated between the trained sizes."""
    tokens_log_stderr: float
    """Of ln D*, from that of N*."""
    loss: float
    """L*, nats per token, at the average of the seeds."""
    loss_stderr: float
    """Standard error of L* for these seeds: what they share, their data, is not in it, and cancels
    between variants that were trained on the same seeds."""
    dof: float
    """Degrees of freedom of the standard errors."""
    level_stderr: float
    """Standard error of L* from what the runs of a seed share; 0 with one seed, which cannot say
    it."""
    level_dof: int
    noise: Noise | None
    noise_stderr: float
    """Standard deviation of one run's noise, nats."""
    level: float
    """Of the intervals."""
    near_best: tuple[str, ...]
    """Trained sizes whose loss is within one standard error (its own and that of L*) of L*."""
    left_out: tuple[LeftOut, ...]
    """Runs that are not in the fit."""
    best_size: str
    """The trained backbone with the lowest mean loss over seeds."""
    best_num_params: float
    best_loss: float
    """Its loss."""
    smallest: float
    largest: float
    """The range of N that is fitted."""
    num_sizes: int
    num_runs: int
    """In the fit."""

    @property
    def ok(self) -> bool:
        """Whether the minimum is an answer."""
        return self.status is ProfileStatus.OK

    @property
    def loss_margin(self) -> float:
        """Half width of the 95 % interval of L*, with the error that the runs of a seed share.

        Degrees of freedom by Welch and Satterthwaite.
        """
        own, shared = self.loss_stderr**2, self.level_stderr**2
        if not (self.ok and shared):
            return student_quantile(self.dof) * self.loss_stderr
        dof = (own + shared) ** 2 / (own**2 / self.dof + shared**2 / self.level_dof)
        return student_quantile(dof) * float(np.sqrt(own + shared))
