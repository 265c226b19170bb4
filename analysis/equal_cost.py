"""The loss of two variants at equal measured cost: seconds, bytes, or FLOPs counted another way.

Legend: L loss in nats per token. A variant's curve is the falling part of the lower convex hull of
its cells in (ln cost, ln L), read by straight lines: what it reaches for a cost, sizes chosen
freely. Shape legend: U runs, V vertices, X cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd

from analysis.difference import MIN_SEEDS, Difference, Source, by_seed
from analysis.envelope import lower_envelope
from analysis.gaps import Pair
from analysis.isoflop import IsoflopFit
from analysis.load import usable

LEAST_RANGE = 2.0
"""Between the smallest and the largest peak memory of a comparison: below it, what is measured is
the process and its libraries rather than the models."""


class View(StrEnum):
    """What is equal in a comparison."""

    FLOPS = "equal FLOPs"
    SECONDS = "equal wall-clock"
    MEMORY = "equal memory"


COLUMNS = {View.SECONDS: ("train_seconds", "wall_seconds"), View.MEMORY: ("peak_memory_bytes",)}
"""Of the frame, the first that all runs have."""


@dataclass(frozen=True)
class EqualCost:
    """L(reference) less L(variant) where both cost the same."""

    pair: Pair
    column: str
    """Of the frame: the cost."""
    at: float
    """Cost at which they are compared; NaN if nothing is."""
    difference: Difference | None
    reason: str
    """Why there is none; empty otherwise."""


@dataclass(frozen=True, eq=False)
class CostCurve:
    """The lower envelope of a variant's cells."""

    log_cost_V: np.ndarray
    log_loss_V: np.ndarray

    def loss(self, cost: float) -> float:
        """L at a cost between the first vertex and the last."""
        return float(np.exp(np.interp(np.log(cost), self.log_cost_V, self.log_loss_V)))


def compare_measured(fit: IsoflopFit, frame: pd.DataFrame, pair: Pair, view: View) -> EqualCost:
    """At equal seconds over all budgets, or at equal peak memory among the runs of the budget.

    More training costs seconds and no memory: at equal memory only runs of one budget can be
    compared. There an envelope ends at the variant's minimum, so that the comparison is mostly at
    what the best size of the smaller one takes.

    Args:
        fit: of the frame; says which trained size is best.
        frame: as `load_runs` returns it.
        pair: of variants, at a budget.
        view: `SECONDS` or `MEMORY`.
    """
    rows = of_pair(frame, pair)
    if view is View.MEMORY:
        rows = rows.loc[rows["budget"] == pair.budget]
    column = next((name for name in COLUMNS[view] if not num_missing(rows, name)), None)
    if column is None:
        names = " or ".join(COLUMNS[view])
        why = f"{num_missing(rows, COLUMNS[view][0])} of {len(rows)} runs have no {names}"
        return EqualCost(pair, COLUMNS[view][0], float("nan"), None, why)
    why = _not_comparable(rows, column, view)
    if why:
        return EqualCost(pair, column, float("nan"), None, why)
    return compare_at_equal(fit, rows, pair, column)


def of_pair(frame: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    """The usable runs of both variants."""
    rows = usable(frame)
    return rows.loc[rows["variant"].isin([pair.variant, pair.reference])]


def num_missing(rows: pd.DataFrame, column: str) -> int:
    """Runs without a positive number there."""
    return int(np.count_nonzero(~(rows[column].to_numpy() > 0)))


def _not_comparable(rows: pd.DataFrame, column: str, view: View) -> str:
    known = [str(device) for device in rows["device"] if pd.notna(device)]
    devices = sorted(set(known))
    if len(known) < len(rows):
        lacking = len(rows) - len(known)
        return f"{lacking} of {len(rows)} runs do not say on which device {column} was measured"
    if len(devices) > 1:
        return f"{column} is from several devices: {'; '.join(devices)}"
    values_U = rows[column].to_numpy()
    least, most = float(values_U.min()), float(values_U.max())
    if view is View.MEMORY and most < LEAST_RANGE * least:
        return (
            f"{column} hardly depends on the model: {least:.4g} to {most:.4g}, less than "
            f"{LEAST_RANGE:g} times, on {devices[0]}"
        )
    return ""


def compare_at_equal(fit: IsoflopFit, rows: pd.DataFrame, pair: Pair, column: str) -> EqualCost:
    """At equal cost of any column, and at a cost that belongs to the pair's budget: one between
    what the best trained sizes of both cost there, as near to their geometric mean as the envelopes
    of both reach.

    With `difference.MIN_SEEDS` shared seeds and more there is an envelope per seed, and the
    difference is the mean of those by seed; with fewer, it is that of the envelopes of the means
    over seeds, and has no interval.

    Args:
        fit: says which trained size is best.
        rows: usable runs of both variants.
        pair: of variants, at a budget.
        column: of positive numbers.
    """
    names = (pair.variant, pair.reference)
    sides = [cost_cells(rows.loc[rows["variant"] == name], column) for name in names]
    seeds = sorted(sides[0].seeds & sides[1].seeds)
    chosen = seeds if len(seeds) >= MIN_SEEDS else [None]
    curves = [[side.curve(seed) for seed in chosen] for side in sides]
    costs = [
        _best_cost(fit, side, name, pair.budget) for side, name in zip(sides, names, strict=True)
    ]
    low, high = _covered([curve for side in curves for curve in side])
    low, high = max(low, min(costs)), min(high, max(costs))
    if low > high:
        spans = ", ".join(
            f"{name} {start:.4g} to {end:.4g}"
            for name, (start, end) in zip(names, map(_covered, curves), strict=True)
        )
        wanted = f"{min(costs):.4g} to {max(costs):.4g}"
        why = f"{column}: none of {wanted}, the costs at the budget, is covered by both ({spans})"
        return EqualCost(pair, column, float("nan"), None, why)
    at = float(np.clip(np.sqrt(costs[0] * costs[1]), low, high))
    own_S, base_S = (np.array([curve.loss(at) for curve in side]) for side in curves)
    return EqualCost(pair, column, at, _difference(base_S - own_S, len(seeds)), "")


def _difference(nats_S: np.ndarray, num_seeds: int) -> Difference:
    paired = by_seed(nats_S)
    if paired:
        return paired
    why = (
        f"{num_seeds} shared seeds, {MIN_SEEDS} are needed for an interval"
        if num_seeds < MIN_SEEDS
        else "the seeds are copies of one another"
    )
    return Difference(float(nats_S.mean()), float("nan"), 0.0, Source.NONE, num_seeds, why)


def _best_cost(fit: IsoflopFit, side: "CostCells", variant: str, budget: float) -> float:
    """Geometric mean over the runs of the best trained size at a budget."""
    profile = fit.profile(variant, budget)
    assert profile is not None
    best_U = side.cell_U == side.cells.index((budget, profile.best_size))
    return float(np.exp(side.log_cost_U[best_U].mean()))


def _covered(curves: Sequence[CostCurve]) -> tuple[float, float]:
    """The costs of which all curves say something; empty if the first is above the second."""
    low = max(curve.log_cost_V[0] for curve in curves)
    high = min(curve.log_cost_V[-1] for curve in curves)
    return float(np.exp(low)), float(np.exp(high))


@dataclass(frozen=True, eq=False)
class CostCells:
    """A variant's runs by cell."""

    cells: list[tuple[float, str]]
    """(budget, size)."""
    cell_U: np.ndarray
    """Every run's index among them."""
    seed_U: np.ndarray
    """NaN without one."""
    log_cost_U: np.ndarray
    loss_U: np.ndarray

    @property
    def seeds(self) -> set[int]:
        """That the runs name."""
        return {int(seed) for seed in self.seed_U if pd.notna(seed)}

    def curve(self, seed: int | None = None) -> CostCurve:
        """The lower envelope of one seed's runs; None: of the means over seeds of every cell."""
        own_U = self.seed_U == seed if seed is not None else np.ones(len(self.cell_U), dtype=bool)
        runs_X = np.bincount(self.cell_U[own_U], minlength=len(self.cells))
        there = runs_X > 0
        sums = [
            np.bincount(self.cell_U[own_U], values_U[own_U], len(self.cells))[there]
            for values_U in (self.log_cost_U, self.loss_U)
        ]
        cost, loss = np.exp(sums[0] / runs_X[there]), sums[1] / runs_X[there]
        hull_V = lower_envelope(cost, loss)
        return CostCurve(np.log(cost[hull_V]), np.log(loss[hull_V]))


def cost_cells(rows: pd.DataFrame, column: str) -> CostCells:
    """Of one variant's usable runs."""
    labels = list(zip(rows["budget"].tolist(), rows["size"].tolist(), strict=True))
    cells = sorted(set(labels))
    place = {cell: i for i, cell in enumerate(cells)}
    return CostCells(
        cells=cells,
        cell_U=np.array([place[label] for label in labels]),
        seed_U=rows["seed"].to_numpy(),
        log_cost_U=np.log(rows[column].to_numpy()),
        loss_U=rows["loss"].to_numpy(),
    )
