"""The runs of one (variant, budget) that a curve is drawn through: one loss per size, by size.

Legend: N parameters. Shape legend: I sizes, U runs.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.minimum import Points
from analysis.noise import size_means
from analysis.outliers import outliers
from analysis.profile import LeftOut
from peer_scaling.record import budget_label

REACH = float(np.log(4))
"""Of ln N to both sides of the lowest size. Farther away a curve bends as no cubic does: on the 15
studies of Porian et al. 2024 (ladders of up to 200 times) the exponents of N* were off by 0.021 on
average with all sizes, by 0.009 with these."""
NEAREST = 7
"""Sizes that are kept however far away they are."""
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

    @property
    def loss_I(self) -> np.ndarray:
        """Mean over seeds, nats per token."""
        return self.points.means.loss_I

    @property
    def weight_I(self) -> np.ndarray:
        """Inverse variances, relative."""
        return self.points.means.weight_I

    def without(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(x, loss, weight) of the other sizes."""
        others = np.arange(len(self.names)) != i
        return self.points.x_I[others], self.loss_I[None, others], self.weight_I[others]


def ladder_of(runs: pd.DataFrame, axis: str) -> Ladder:
    """The sizes near the lowest one, without outliers.

    Args:
        runs: of one variant and budget.
        axis: the column that N counts.
    """
    near = _near_lowest(runs, axis)
    far_off = [_left_out(run, axis, FAR) for _, run in runs.loc[~near].iterrows()]
    runs = runs.loc[near]
    names, size_U = _by_params(runs, axis)
    log_N_U = np.log(runs[axis].to_numpy())
    seed_U = pd.factorize(runs["seed"].where(runs["seed"].notna(), runs.index.to_series()))[0]
    loss_U = runs["loss"].to_numpy()
    contradicted = outliers(size_U, seed_U, log_N_U, loss_U)
    kept_U = np.ones(len(runs), dtype=bool)
    kept_U[contradicted] = False
    labels, index_U = np.unique(size_U[kept_U], return_inverse=True)
    of_size = runs.loc[kept_U].groupby(index_U)
    num_params_I = of_size[axis].mean().to_numpy()
    centre = float(np.log(num_params_I).mean())
    means = size_means(index_U, pd.factorize(seed_U[kept_U])[0], loss_U[kept_U])
    return Ladder(
        names=[names[i] for i in labels],
        num_params_I=num_params_I,
        tokens_I=of_size["tokens"].mean().to_numpy(),
        points=Points(np.log(num_params_I) - centre, means),
        centre=centre,
        left_out=(*far_off, *(_left_out(runs.iloc[i], axis, OUTLIER) for i in contradicted)),
        num_runs=int(kept_U.sum()),
    )


def _near_lowest(runs: pd.DataFrame, axis: str) -> pd.Series:
    """Which runs are of the sizes that a curve can describe."""
    sizes = runs.groupby("size").agg({axis: "mean", "loss": "mean"})
    distance = np.log(sizes[axis] / sizes.loc[sizes["loss"].idxmin(), axis]).abs()
    reach = max(REACH, distance.sort_values().iloc[: NEAREST].iloc[-1]) * (1 + 1e-9)
    return runs["size"].isin(distance.index[distance <= reach])


def _by_params(runs: pd.DataFrame, axis: str) -> tuple[list[str], np.ndarray]:
    """(sizes by N, every run's index among them, (U,))."""
    names = runs.groupby("size")[axis].mean().sort_values(kind="stable").index
    return [str(name) for name in names], names.get_indexer(runs["size"])


def _left_out(run: pd.Series, axis: str, reason: str) -> LeftOut:
    own = f"{run['variant']}-{run['size']}-{budget_label(run['budget'])}"
    return LeftOut(str(run["run_id"] or own), float(run[axis]), float(run["loss"]), reason)
