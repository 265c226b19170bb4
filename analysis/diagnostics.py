"""How far a fitted law can be trusted: held-out error, influence, delta, starts, other approaches.

Every function takes a frozen fit and refits it exactly. Held-out errors are of L, relative, as
L' / L - 1.

Shape legend: I runs, K budgets or drops, S starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import ndtri

from analysis.fitting import CONFIDENCE, DELTA, Fit, Replicates, fit_sum, refit
from analysis.huber import Objective, minimise
from analysis.load import AnalysisError
from analysis.parametric import LossSurface, SurfaceBootstrap
from analysis.powerlaw import PowerFit
from analysis.sparse_laws import fit_routed

DELTAS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
LIMIT_DELTA = 1e-6
"""Stands for delta -> 0, least absolute deviations: all but as many runs as coefficients lie beyond
it. Chinchilla's coefficients move by up to 0.02 % from here to 1e-9."""
DROPS = (0, 1, 3, 5, 10)
CHINCHILLA_STARTS: dict[str, tuple[float, ...]] = {
    "A": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    "B": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    "E": (-1.0, -0.5, 0.0, 0.5, 1.0),
    "alpha": (0.0, 0.5, 1.0, 1.5, 2.0),
    "beta": (0.0, 0.5, 1.0, 1.5, 2.0),
}
"""Ln of the coefficients, exponents: the 4,500 starts of Hoffmann et al. 2022, appendix D.3."""
SAME = 1e-9
"""Relative difference of two objectives that are the same."""


@dataclass(frozen=True)
class BudgetError:
    """What a law says of a budget that it was not fitted to."""

    budget: float
    num_runs: int
    mean_error: float
    """Mean of L' / L - 1; NaN where too few runs are left to fit."""
    mean_abs_error: float


@dataclass(frozen=True)
class HeldOut:
    """Leave one budget out, for every budget, ascending."""

    budgets: tuple[BudgetError, ...]

    @property
    def mean_abs_error(self) -> float:
        """Over all runs, each predicted without its own budget."""
        runs = [budget.num_runs for budget in self.budgets]
        return float(np.average([b.mean_abs_error for b in self.budgets], weights=runs))

    @property
    def largest(self) -> BudgetError:
        """The largest budget, predicted from all others: the one extrapolation among them."""
        return self.budgets[-1]


def held_out(fit: Fit, budgets: np.ndarray) -> HeldOut:
    """Refit without each budget, predict it.

    Args:
        fit: any sum of power laws.
        budgets: of every run, (I,); runs of one budget have exactly the same value. Where there are
            none, any ordered groups will do.

    Raises:
        AnalysisError: a single budget.
    """
    values, member_KI = _groups(budgets, len(fit.log_L_I))
    kept_KI = (~member_KI).astype(float)
    predicted_KI = refit(fit, kept_KI).losses()
    enough_K = kept_KI.sum(axis=1) > len(fit.names)
    predicted_KI[~enough_K] = np.nan
    return _errors(values, member_KI, predicted_KI / np.exp(fit.log_L_I) - 1)


def held_out_power_law(power: PowerFit, C: np.ndarray) -> HeldOut:
    """The same for a power law with a point per budget; of y instead of L."""
    values, member_KI = _groups(C, len(power.left_out))
    if len(values) < len(power.left_out):
        raise AnalysisError("several points at one budget: give one minimum per budget")
    errors_I = np.expm1(power.left_out)
    return _errors(values, member_KI, np.broadcast_to(errors_I, member_KI.shape))


def held_out_routed(
    params: np.ndarray, experts: np.ndarray, loss: np.ndarray, groups: np.ndarray
) -> HeldOut:
    """The same for Clark's law, by groups of runs, as of equal N."""
    N, E, L = (np.asarray(column, dtype=float) for column in (params, experts, loss))
    values, member_KI = _groups(groups, len(L))
    predicted = [fit_routed(N[~m], E[~m], L[~m]).loss(N, E) for m in member_KI]
    return _errors(values, member_KI, np.stack(predicted) / L - 1)


def _groups(budgets: np.ndarray, num_runs: int) -> tuple[np.ndarray, np.ndarray]:
    values, group_I = np.unique(np.asarray(budgets, dtype=float), return_inverse=True)
    if len(group_I) != num_runs:
        raise AnalysisError(f"{len(group_I)} budgets for {num_runs} runs: give one per run")
    if len(values) < 2:
        raise AnalysisError("one budget: nothing is left to fit without it")
    return values, group_I == np.arange(len(values))[:, None]


def _errors(values: np.ndarray, member_KI: np.ndarray, error_KI: np.ndarray) -> HeldOut:
    return HeldOut(
        tuple(
            BudgetError(
                budget=float(value),
                num_runs=int(member_I.sum()),
                mean_error=float(error_I[member_I].mean()),
                mean_abs_error=float(np.abs(error_I[member_I]).mean()),
            )
            for value, member_I, error_I in zip(values, member_KI, error_KI, strict=True)
        )
    )


@dataclass(frozen=True, eq=False)
class Influence:
    """The law without the runs that fit worst."""

    num_dropped: tuple[int, ...]
    rows: np.ndarray
    """All runs, worst first."""
    replicates: Replicates
    """One per entry of `num_dropped`."""


def influence(fit: Fit, num_dropped: Sequence[int] = DROPS) -> Influence:
    """Refit without the k runs that have the largest residuals, for every k.

    The exponent of N* in Chinchilla's table is 0.565, 0.559, 0.524, 0.516, 0.520 without 0, 1, 3, 5
    and 10 of its 245 runs: a conclusion that needs its outliers is not one.
    """
    num_runs = len(fit.log_L_I)
    rows = np.argsort(-np.abs(fit.residuals_I), kind="stable")
    drops = tuple(k for k in num_dropped if num_runs - k > len(fit.names))
    weights_KI = np.ones((len(drops), num_runs))
    for weights_I, k in zip(weights_KI, drops, strict=True):
        weights_I[rows[:k]] = 0.0
    return Influence(drops, rows, refit(fit, weights_KI))


def leave_one_out(fit: Fit) -> Replicates:
    """The law without each run, in the order of the runs."""
    num_runs = len(fit.log_L_I)
    return refit(fit, np.ones((num_runs, num_runs)) - np.eye(num_runs))


def delta_sweep(fit: Fit, deltas: Sequence[float] = DELTAS) -> tuple[Fit, ...]:
    """The same runs under other deltas, from least absolute deviations to least squares of ln L."""
    return tuple(fit_sum(fit.model, np.exp(fit.log_L_I), fit.grid, delta) for delta in deltas)


@dataclass(frozen=True)
class Certificate:
    """Where the starts of a grid lead, each by descent from where it is."""

    num_starts: int
    num_at_minimum: int
    """Reached the fit's objective, within 1e-9 of it."""
    num_lower: int
    """Went below it."""
    num_higher: int
    """Converged to another stationary point."""
    num_stuck: int
    """Stopped above it without converging."""
    lowest: float
    """The lowest objective found, over the fit's."""

    @property
    def holds(self) -> bool:
        """Whether no start got lower."""
        return self.num_lower == 0


def certify(fit: Fit, starts: Mapping[str, Sequence[float]]) -> Certificate:
    """Descend from every start of a grid and compare with the fit.

    Args:
        fit: any sum of power laws.
        starts: values of ln of each coefficient and of each exponent, as `CHINCHILLA_STARTS`.
    """
    grid_SP = np.array(list(product(*(starts[name] for name in fit.names))))
    objective = Objective(fit.model, fit.log_L_I)
    weights_1I = np.ones((1, len(fit.log_L_I)))
    found = minimise(objective, weights_1I, fit.model.centred(grid_SP), (fit.delta,))
    over_S = np.nan_to_num(found.objective_R, nan=np.inf) / fit.objective - 1
    same_S, lower_S = np.abs(over_S) <= SAME, over_S < -SAME
    return Certificate(
        num_starts=len(grid_SP),
        num_at_minimum=int(same_S.sum()),
        num_lower=int(lower_S.sum()),
        num_higher=int((found.converged_R & (over_S > SAME)).sum()),
        num_stuck=int((~found.converged_R & (over_S > SAME)).sum()),
        lowest=float(1 + over_S.min()),
    )


@dataclass(frozen=True)
class Agreement:
    """The exponent of N* by approach 2 and by approach 3."""

    approach_2: float
    approach_3: float
    difference: float
    """Approach 2 less approach 3."""
    margin: float
    """Half width of the 95 % interval of the difference, both taken as independent; they share
    their runs, so that it is wide rather than narrow."""

    @property
    def agree(self) -> bool:
        """Whether 0 lies in that interval. Where not, the law or the profiles are wrong."""
        return abs(self.difference) <= self.margin


def agreement(power: PowerFit, surface: LossSurface, bootstrap: SurfaceBootstrap) -> Agreement:
    """Compare the power law over isoFLOP minima with the fitted surface."""
    low, high = power.exponent_interval
    own = ndtri((1 + CONFIDENCE) / 2) * bootstrap.stderr("exponent_N")
    return Agreement(
        approach_2=power.exponent,
        approach_3=surface.exponent_N,
        difference=power.exponent - surface.exponent_N,
        margin=float(np.hypot((high - low) / 2, own)),
    )


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """What is printed with every fit."""

    held_out: HeldOut
    influence: Influence
    sweep: tuple[Fit, ...]


def diagnose(fit: Fit, budgets: np.ndarray) -> Diagnostics:
    """Held-out errors, influence and the sweep of delta of any sum of power laws.

    Raises:
        AnalysisError: as `held_out`.
    """
    deltas = sorted({*DELTAS, DELTA, fit.delta})
    return Diagnostics(held_out(fit, budgets), influence(fit), delta_sweep(fit, deltas))
