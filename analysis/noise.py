"""How much the mean loss of a size of an isoFLOP profile may be off: from its seeds.

Runs of one seed see the same data in the same order at every size. What is common to them moves the
whole curve up or down and leaves its minimum where it is, so it is taken out: loss = size + seed +
noise, by least squares.

Shape legend: I sizes, S seeds, U runs.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class SizeMeans:
    """One loss per size, with what its seeds say of its error."""

    loss_I: np.ndarray
    """At the average of the study's seeds, nats per token."""
    shape_II: np.ndarray
    """Covariance of the losses over `variance`; 1 / number of seeds on the diagonal if every size
    has every seed."""
    variance: float
    """Of one run's noise; NaN if `dof` is 0."""
    dof: int
    level_stderr: float
    """Standard error of all losses together, from what is common to the runs of a seed; 0 if there
    is one seed, of which nothing can be said."""
    level_dof: int

    @property
    def weight_I(self) -> np.ndarray:
        """Inverse variances, relative."""
        return 1 / np.diag(self.shape_II)


def size_means(size_U: np.ndarray, seed_U: np.ndarray, loss_U: np.ndarray) -> SizeMeans:
    """Means over seeds.

    Args:
        size_U: index of every run's size, 0 to I - 1; each has a run.
        seed_U: index of every run's seed, 0 to S - 1; each has a run.
        loss_U: nats per token.
    """
    of_size_UI = np.eye(size_U.max() + 1)[size_U]
    of_seed_US = np.eye(seed_U.max() + 1)[seed_U]
    num_sizes, runs_S = of_size_UI.shape[1], of_seed_US.sum(axis=0)
    # Effects of seeds that average to zero over the runs.
    contrast_US = of_seed_US[:, :-1] - of_seed_US[:, -1:] * (runs_S[:-1] / runs_S[-1])
    design_UK = np.hstack([of_size_UI, contrast_US])
    rank = np.linalg.matrix_rank(design_UK)
    paired = rank == design_UK.shape[1]
    if not paired:  # seeds that share no size with the others: nothing can be taken out
        design_UK, rank = of_size_UI, num_sizes
    inverse_KK = np.linalg.inv(design_UK.T @ design_UK)
    solution_K = inverse_KK @ (design_UK.T @ loss_U)
    residual_U = loss_U - design_UK @ solution_K
    dof = len(loss_U) - rank
    variance = float(residual_U @ residual_U / dof) if dof else float("nan")
    level = 0.0
    if paired and dof and len(runs_S) > 1:
        of_seeds = slice(num_sizes, None)
        shape_SS = inverse_KK[of_seeds, of_seeds]
        level = _level_stderr(solution_K[of_seeds], shape_SS, runs_S, variance)
    return SizeMeans(
        loss_I=solution_K[:num_sizes],
        shape_II=inverse_KK[:num_sizes, :num_sizes],
        variance=variance,
        dof=dof,
        level_stderr=level,
        level_dof=len(runs_S) - 1 if paired else 0,
    )


def _level_stderr(
    effect_S: np.ndarray, shape_SS: np.ndarray, runs_S: np.ndarray, variance: float
) -> float:
    """Of the average effect of the seeds: their scatter beyond that of the noise."""
    share_S = runs_S / runs_S.sum()
    last = -(effect_S @ runs_S[:-1]) / runs_S[-1]
    scatter = float(np.append(effect_S, last).var(ddof=1))
    beyond = max(0.0, scatter - variance * float(np.mean(np.diag(shape_SS))))
    return float(np.sqrt(beyond * (share_S @ share_S)))
