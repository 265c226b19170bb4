"""The runs of one (variant, budget) that a curve is drawn through: one loss per size, by size.

Legend: N parameters. Shape legend: I sizes, U runs, V the runs that are kept.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.allowed import Points
from analysis.noise import size_means
from analysis.outliers import outliers
from analysis.profile import LeftOut
from peer_scaling.record import budget_label

REACH = float(np.log(4))
"""Of ln N to both sides of the lowest size. Farther away a curve bends as no cubic does: on the 15
studies of Porian et al. 2024 (ladders of up to 200 times) the exponents of N* were off by 0.017 on
average with all sizes, by 0.007 with these."""
NEAREST = 7
"""Sizes that are kept however far away they are."""
ROUNDING = 1e-9
FAR = "more than a factor of 4 from the lowest size, of which the nearest 7 are kept"
OUTLIER = "outlier: contradicted by the other sizes"


@dataclass(frozen=True, eq=False)
class Ladder:
    """The runs of a profile that are fitted, by size."""

    names: list[str]
    num_params_I: np.ndarray
    tokens_I: np.ndarray
    points: Points
    centre: float
    """Of ln N: x is ln N less this."""
    left_out: tuple[LeftOut, ...]
    num_runs: int

    def without(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(x, loss, weight) of the sizes but i; loss is (1, I - 1)."""
        others = np.arange(len(self.names)) != i
        points = self.points
        return points.x_I[others], points.loss_I[None, others], points.weight_I[others]


def ladder_of(runs: pd.DataFrame, axis: str) -> Ladder:
    """The sizes near the lowest one, without outliers.

    Args:
        runs: of one variant and budget.
        axis: the column that N counts.
    """
    N_U, tokens_U, loss_U = (runs[name].to_numpy() for name in (axis, "tokens", "loss"))
    names, size_U = _by_params(runs["size"].to_numpy(), N_U)
    seed_U = _seeds(runs["seed"].to_numpy())
    near_U = _near_lowest(size_U, N_U, loss_U)
    near = np.flatnonzero(near_U)
    contradicted = near[outliers(size_U[near], seed_U[near], np.log(N_U[near]), loss_U[near])]
    kept_U = near_U.copy()
    kept_U[contradicted] = False
    sizes, index_V = np.unique(size_U[kept_U], return_inverse=True)
    share_IV = (index_V == np.arange(len(sizes))[:, None]) / np.bincount(index_V)[:, None]
    num_params_I = share_IV @ N_U[kept_U]
    centre = float(np.log(num_params_I).mean())
    seed_V = np.unique(seed_U[kept_U], return_inverse=True)[1]
    means = size_means(index_V, seed_V, loss_U[kept_U])
    reasons = dict.fromkeys(np.flatnonzero(~near_U), FAR) | dict.fromkeys(contradicted, OUTLIER)
    return Ladder(
        names=[names[i] for i in sizes],
        num_params_I=num_params_I,
        tokens_I=share_IV @ tokens_U[kept_U],
        points=Points(np.log(num_params_I) - centre, means),
        centre=centre,
        left_out=tuple(_left_out(runs, axis, int(u), why) for u, why in reasons.items()),
        num_runs=int(kept_U.sum()),
    )


def _by_params(size_U: np.ndarray, N_U: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(sizes by N, every run's index among them, (U,)); shapes of equal N are one size, with the
    first one's name.
    """
    shapes, shape_U = np.unique(size_U.astype(str), return_inverse=True)
    mean_N = np.bincount(shape_U, N_U) / np.bincount(shape_U)
    counts, size_of = np.unique(mean_N, return_inverse=True)
    names = [str(shapes[size_of == i][0]) for i in range(len(counts))]
    return names, size_of[shape_U]


def _seeds(seed_U: np.ndarray) -> np.ndarray:
    """An index per seed; runs without one have a seed of their own."""
    labels = [f"seed {seed}" if pd.notna(seed) else f"run {u}" for u, seed in enumerate(seed_U)]
    return np.unique(labels, return_inverse=True)[1]


def _near_lowest(size_U: np.ndarray, N_U: np.ndarray, loss_U: np.ndarray) -> np.ndarray:
    """Which runs are of sizes that a curve can describe, (U,)."""
    runs_I = np.bincount(size_U)
    log_N_I, loss_I = (
        np.log(np.bincount(size_U, N_U) / runs_I),
        np.bincount(size_U, loss_U) / runs_I,
    )
    distance_I = np.abs(log_N_I - log_N_I[loss_I.argmin()])
    reach = max(REACH, np.sort(distance_I)[:NEAREST][-1])
    return (distance_I <= reach + ROUNDING)[size_U]


def _left_out(runs: pd.DataFrame, axis: str, u: int, reason: str) -> LeftOut:
    run, count = dict(runs.iloc[u]), float(runs[axis].to_numpy()[u])
    own = f"{run['variant']}-{run['size']}-{budget_label(run['budget'])}"
    return LeftOut(str(run["run_id"] or own), count, float(runs["loss"].to_numpy()[u]), reason)
