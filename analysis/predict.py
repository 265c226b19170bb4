"""What a study says of a budget that it did not train: N*, D* and L* with intervals.

Two ways that share their runs and nothing else: the power laws through the isoFLOP minima (approach
2 of Hoffmann et al. 2022, 2203.15556) and L(N, D) through all runs (approach 3). Which one counts,
and how wide the intervals are: docs/predict.md.

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fitting import CONFIDENCE
from analysis.isoflop import fit_isoflop
from analysis.load import AnalysisError, usable
from analysis.routes import Route, by_power_laws, by_surface

MAX_FACTOR = 30.0
"""Beyond the largest budget: an exponent of L* that is 0.01 off makes 3.5 % of a loss at 30 times,
more than the gaps between layers that are compared here. Marin's checked law went 3.3 times."""
MAX_ERROR = 0.01
"""Of L* by leaving out one budget: a law that misses budgets it lies between by more is not one."""


@dataclass(frozen=True)
class Prediction:
    """The answer for one variant at one budget."""

    study: str
    variant: str
    axis: str
    budget: float
    level: float
    routes: tuple[Route, ...]
    """The one that counts first."""
    notes: tuple[str, ...]
    """Why an approach is missing."""
    num_budgets: int
    """With a minimum."""
    largest_budget: float

    @property
    def best(self) -> Route:
        """The one that counts: approach 3 where its fit is ok, else approach 2."""
        return self.routes[0]

    @property
    def factor(self) -> float:
        """How far beyond the largest budget."""
        return self.budget / self.largest_budget

    @property
    def objections(self) -> tuple[str, ...]:
        """Why this should not be predicted; empty if it may."""
        found = []
        if self.factor > MAX_FACTOR:
            found.append(
                f"{self.factor:.3g} times the largest budget trained, {self.largest_budget:g} "
                f"(limit {MAX_FACTOR:g})"
            )
        if self.num_budgets < 3:
            found.append(f"{self.num_budgets} budgets with a minimum (limit: at least 3)")
        if self.best.held_out_error > MAX_ERROR:
            found.append(
                f"error of L* by leaving out one budget {100 * self.best.held_out_error:.2f} % "
                f"(limit {100 * MAX_ERROR:g} %)"
            )
        return tuple(found)


def predict(
    frame: pd.DataFrame,
    variant: str,
    budget: float,
    axis: str = "num_params_total",
    level: float = CONFIDENCE,
) -> Prediction:
    """N*, D* and L* of a variant at a budget by both approaches.

    Args:
        frame: runs of one study, as `load_runs` returns them.
        variant: a label of the frame.
        budget: training FLOPs.
        axis: what N counts.
        level: of the intervals.

    Raises:
        AnalysisError: no usable run of the variant, or minima at fewer than two budgets.
    """
    rows = usable(frame)
    runs = rows.loc[rows["variant"] == variant]
    if runs.empty:
        known = ", ".join(sorted(set(rows["variant"]))) or "none"
        raise AnalysisError(f"--variant {variant}: no usable run of it; there are {known}")
    if not (np.isfinite(budget) and budget > 0):
        raise AnalysisError(f"--budget {budget:g}: give a positive number of training FLOPs")
    optima = fit_isoflop(runs, axis).optima(variant)
    routes, notes = [], []
    try:
        routes.append(by_surface(runs, budget, axis, level))
    except AnalysisError as error:
        notes.append(f"no approach 3: {error}")
    if len(optima) > 1:
        routes.append(by_power_laws(optima, budget, level))
    else:
        notes.append(f"no approach 2: {len(optima)} of the curves have a minimum, it needs two")
    if not routes:
        raise AnalysisError(f"{variant} cannot be predicted: {'; '.join(notes)}")
    return Prediction(
        study=str(runs["study"].iloc[0]),
        variant=variant,
        axis=axis,
        budget=float(budget),
        level=level,
        routes=tuple(routes),
        notes=tuple(notes),
        num_budgets=len(optima),
        largest_budget=float(runs["budget"].max()),
    )
