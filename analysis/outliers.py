"""Runs of one isoFLOP profile that the others contradict.

Shape legend: K coefficients, U runs.
"""

import numpy as np
from scipy.special import stdtr

LEVEL = 0.01
"""Chance that a profile without an outlier loses a run."""
DEGREE = 3
MIN_DOF = 2
"""Of what is left: with one, no run is far enough off to be told from the rest."""
MOST = 1 / 6
"""Of the runs: more are no outliers."""
ROUNDING = 1e-9
"""Of a loss: what is closer to the curve is on it."""


def outliers(
    size_U: np.ndarray, seed_U: np.ndarray, x_U: np.ndarray, loss_U: np.ndarray
) -> list[int]:
    """Indices of the runs that are left out, in the order in which they were found.

    One at a time, the run whose loss is farthest from what a cubic in ln N with an effect for every
    seed, fitted to the others, says of it: left out if its externally studentised residual is
    beyond `LEVEL`, divided by the number of runs (Bonferroni). Runs at the smallest and the largest
    size are kept: beyond them the cubic says little, and a steep end is no outlier.

    Args:
        size_U: index of every run's size.
        seed_U: index of its seed.
        x_U: ln N.
        loss_U: nats per token.
    """
    kept_U = np.ones(len(loss_U), dtype=bool)
    found: list[int] = []
    while len(found) < int(MOST * len(loss_U)):
        worst = _worst(size_U, seed_U, x_U, loss_U, kept_U)
        if worst is None:
            break
        kept_U[worst] = False
        found.append(worst)
    return found


def _worst(
    size_U: np.ndarray, seed_U: np.ndarray, x_U: np.ndarray, loss_U: np.ndarray, kept_U: np.ndarray
) -> int | None:
    rows = np.flatnonzero(kept_U)
    size, seed, loss = size_U[rows], seed_U[rows], loss_U[rows]
    design_UK = np.vander(x_U[rows] - x_U[rows].mean(), DEGREE + 1)
    own_seed = np.eye(seed_U.max() + 1)[seed]
    own_seed = own_seed[:, own_seed.any(axis=0)]
    if own_seed.sum(axis=0).max() > 1:  # without names of seeds, each run has its own
        design_UK = np.hstack([design_UK, own_seed[:, 1:]])
    hat_UU = design_UK @ np.linalg.pinv(design_UK)
    dof = len(rows) - round(float(np.trace(hat_UU))) - 1
    if dof < MIN_DOF:
        return None
    residual = loss - hat_UU @ loss
    spare = np.maximum(1 - np.diag(hat_UU), 1e-9)
    rest = np.maximum(residual @ residual - residual**2 / spare, (ROUNDING * loss) ** 2) / dof
    distance = np.abs(residual) / np.sqrt(rest * spare)
    inner = (size > size.min()) & (size < size.max()) & (spare > 1e-6)
    worst = int(np.argmax(np.where(inner, distance, 0.0)))
    chance = 2 * stdtr(dof, -distance[worst]) * len(rows)
    return int(rows[worst]) if inner[worst] and chance < LEVEL else None
