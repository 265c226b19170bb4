"""What the settings of a PEER layer do to its loss: table 2 and figures 3a and 3b of He 2024
(2407.04153), from the runs of studies that vary them.

Legend: L loss in nats per token. Shape legend: U runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fitting import student_quantile
from analysis.load import AnalysisError, usable

SETTINGS = ("num_experts", "num_heads", "experts_per_head", "query_norm")
LAYER = "peer"


@dataclass(frozen=True)
class ExpertsPoint:
    """One setting of the layer at a budget, at its best trained size."""

    budget: float
    num_experts: int
    num_heads: int
    experts_per_head: int
    query_norm: str
    size: str
    """The one with the lowest mean loss of those trained."""
    sizes: tuple[str, ...]
    """All that were trained."""
    loss: float
    """Mean over seeds, nats per token."""
    margin: float
    """Half width of its 95 % interval: Student's t, with one variance between seeds for all
    settings of the budget; NaN with one seed everywhere."""
    num_seeds: int
    usage: float
    """Share of the experts that any validation token reads; NaN if not recorded."""
    unevenness: float
    """KL divergence of the router's weights from uniform, nats."""
    val_tokens: tuple[float, float]
    """Least and most validation tokens behind the usage, which grows with them; NaN if not
    recorded."""
    runs: tuple[tuple[str, str], ...]
    """Study and run id of those at the best size."""

    @property
    def active(self) -> int:
        """Experts per token: h k."""
        return self.num_heads * self.experts_per_head

    @property
    def effective_experts(self) -> float:
        """How many evenly used experts would be as uneven: exp of the entropy of their shares."""
        return float(np.exp(-self.unevenness)) * self.num_experts


@dataclass(frozen=True)
class DensePoint:
    """The dense model at a budget, at its best trained size."""

    budget: float
    size: str
    loss: float
    num_seeds: int


@dataclass(frozen=True)
class ExpertsStudy:
    """All settings of the layer that runs have."""

    points: tuple[ExpertsPoint, ...]
    dense: tuple[DensePoint, ...]
    num_runs: int

    def budgets(self) -> list[float]:
        """Ascending."""
        return sorted({point.budget for point in self.points})

    def with_experts(self, budget: float, query_norm: str) -> list[ExpertsPoint]:
        """Figure 3a: the points that differ in the number of experts alone, by it; those with the
        h and k that most numbers of experts have.
        """
        here = [p for p in self.points if (p.budget, p.query_norm) == (budget, query_norm)]
        groups: dict[tuple[int, int], list[ExpertsPoint]] = {}
        for point in here:
            groups.setdefault((point.num_heads, point.experts_per_head), []).append(point)
        chosen = max(groups.values(), key=len, default=[])
        return sorted(chosen, key=lambda point: point.num_experts)

    def with_heads(self, budget: float) -> dict[int, list[ExpertsPoint]]:
        """Figure 3b: by h k, the points that differ in h alone, by it; of the number of experts and
        the norm that most points have.
        """
        groups: dict[tuple[int, str], list[ExpertsPoint]] = {}
        for point in self.points:
            if point.budget == budget:
                groups.setdefault((point.num_experts, point.query_norm), []).append(point)
        lines: dict[int, list[ExpertsPoint]] = {}
        for point in sorted(max(groups.values(), key=len, default=[]), key=lambda p: p.num_heads):
            lines.setdefault(point.active, []).append(point)
        return dict(sorted(lines.items()))


def experts_study(frame: pd.DataFrame) -> ExpertsStudy:
    """The settings of PEER in a frame of runs, each at its best trained size.

    Raises:
        AnalysisError: no run of PEER whose settings are known.
    """
    runs = usable(frame)
    own = runs.loc[(runs["ffw"] == LAYER) & runs[list(SETTINGS)].notna().all(axis=1)]
    if own.empty:
        raise AnalysisError(
            f"none of {len(frame)} runs is a finished one of {LAYER} with {', '.join(SETTINGS)}: "
            f"`peer-train --config-name laptop_table2` makes some"
        )
    points = []
    for budget, of_budget in own.groupby("budget"):
        variance, dof = _between_seeds(of_budget)
        for _, cell in of_budget.groupby(list(SETTINGS)):
            points.append(_point(float(str(budget)), cell, variance, dof))
    dense = runs.loc[runs["ffw"] == "dense"]
    return ExpertsStudy(
        tuple(points),
        tuple(_dense(float(str(budget)), cell) for budget, cell in dense.groupby("budget")),
        len(own),
    )


def _between_seeds(runs: pd.DataFrame) -> tuple[float, int]:
    """(variance of a run's loss, its degrees of freedom), pooled over settings and sizes."""
    groups = [group["loss"].to_numpy() for _, group in runs.groupby([*SETTINGS, "size"])]
    squares = sum(float(((L_U - L_U.mean()) ** 2).sum()) for L_U in groups)
    dof = sum(len(L_U) - 1 for L_U in groups)
    return (squares / dof if dof else float("nan")), dof


def _best(cell: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """(the size with the lowest mean loss, its runs)."""
    means = {str(size): _mean(runs, "loss") for size, runs in cell.groupby("size")}
    size = min(means, key=means.__getitem__)
    return size, cell.loc[cell["size"] == size]


def _mean(runs: pd.DataFrame, column: str) -> float:
    return float(np.mean(runs[column].to_numpy()))


def _point(budget: float, cell: pd.DataFrame, variance: float, dof: int) -> ExpertsPoint:
    size, runs = _best(cell)
    first, tokens_U = runs.iloc[0], runs["val_tokens"].to_numpy()
    return ExpertsPoint(
        budget=budget,
        num_experts=int(first["num_experts"]),
        num_heads=int(first["num_heads"]),
        experts_per_head=int(first["experts_per_head"]),
        query_norm=str(first["query_norm"]),
        size=size,
        sizes=_sizes(cell),
        loss=_mean(runs, "loss"),
        margin=float(student_quantile(dof) * np.sqrt(variance / len(runs))),
        num_seeds=len(runs),
        usage=_mean(runs, "expert_usage"),
        unevenness=_mean(runs, "expert_unevenness"),
        val_tokens=(float(np.min(tokens_U)), float(np.max(tokens_U))),
        runs=tuple(zip(runs["study"], runs["run_id"], strict=True)),
    )


def _sizes(cell: pd.DataFrame) -> tuple[str, ...]:
    by_params: Sequence[str] = cell.sort_values("num_params_active")["size"].tolist()
    return tuple(dict.fromkeys(by_params))


def _dense(budget: float, cell: pd.DataFrame) -> DensePoint:
    size, runs = _best(cell)
    return DensePoint(budget, size, _mean(runs, "loss"), len(runs))
