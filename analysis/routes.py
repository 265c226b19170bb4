"""N*, D* and L* at one budget, with intervals, by either of two approaches.

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token. Shape legend: I runs, R replicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtri

from analysis.diagnostics import held_out, held_out_power_law
from analysis.fitting import student_quantile
from analysis.isoflop import power_fits
from analysis.load import AnalysisError
from analysis.parametric import (
    LossSurface,
    SurfaceBootstrap,
    bootstrap_loss_surface,
    fit_loss_surface,
)
from analysis.powerlaw import PowerFit, fit_power_law
from analysis.profile import Profile

QUANTITIES = ("N", "D", "L")
NUM_REPLICATES = 400
MIN_SPARE = 4
"""Configurations beyond the five coefficients of L(N, D), below which a bootstrap of them says
little."""
COEFFICIENTS = 5


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; NaN where there is none."""

    value: float
    low: float
    high: float

    @property
    def finite(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


@dataclass(frozen=True)
class Route:
    """What one approach says."""

    approach: str
    N: Estimate
    D: Estimate
    L: Estimate
    coefficients: dict[str, float]
    """At full precision, by name."""
    held_out_error: float
    """Mean |L' / L - 1| over budgets, each predicted from the others; NaN below three."""
    largest_error: float
    """L' / L - 1 of the largest budget predicted from the others."""


def by_power_laws(optima: Sequence[Profile], budget: float, level: float) -> Route:
    """Approach 2. The interval adds to the law's error that of one more minimum like the others."""
    fits = power_fits(optima)
    C = np.array([p.budget for p in optima])
    own = {
        "N": [p.num_params_log_stderr for p in optima],
        "D": [p.tokens_log_stderr for p in optima],
        "L": [p.loss_margin / student_quantile(p.dof) / p.loss for p in optima],
    }
    estimates = {of: _of_law(fits[of], budget, np.array(own[of]), level) for of in QUANTITIES}
    errors = held_out_power_law(fits["L"], C) if len(C) > 2 else None
    return Route(
        approach="approach 2",
        **estimates,
        coefficients={
            f"{name}_{of}": float(getattr(fits[of], name))
            for of in QUANTITIES
            for name in ("log_coefficient", "exponent", "exponent_stderr")
        },
        held_out_error=errors.mean_abs_error if errors else float("nan"),
        largest_error=errors.largest.mean_error if errors else float("nan"),
    )


def _of_law(fit: PowerFit, budget: float, own: np.ndarray, level: float) -> Estimate:
    value = float(fit.at(budget))
    scatter = np.sqrt(np.sum(fit.residuals**2) / fit.dof) if fit.dof else np.nan
    new = max(float(np.median(own)), float(scatter))
    margin = student_quantile(fit.dof, level) * np.hypot(fit.log_stderr(budget), new)
    return Estimate(value, value * float(np.exp(-margin)), value * float(np.exp(margin)))


def by_surface(
    runs: pd.DataFrame,
    budget: float,
    axis: str,
    level: float,
    num_replicates: int = NUM_REPLICATES,
) -> Route:
    """Approach 3. Runs of one (size, budget) are drawn together; L* adds the scatter of one run.

    Raises:
        AnalysisError: too few configurations or budgets, or a fit that is not ok.
    """
    N, D, L, C = columns(runs, axis)
    clusters = configurations(runs)
    groups, budgets = len(set(clusters)), np.unique(runs["budget"])
    if groups < COEFFICIENTS + MIN_SPARE or len(budgets) < 3:
        raise AnalysisError(
            f"{groups} configurations at {len(budgets)} budgets; L(N, D) needs "
            f"{COEFFICIENTS + MIN_SPARE} at 3"
        )
    surface = fit_loss_surface(N, D, L)
    if not surface.fit.ok:
        raise AnalysisError(f"the fit of L(N, D) is not an answer: {surface.status}")
    cost = fit_power_law(N, C / (N * D)) if len(np.unique(N)) > 1 else None
    boot = bootstrap_loss_surface(N, D, L, num_replicates=num_replicates, clusters=clusters)
    best = _optimum(surface, cost, budget)
    drawn = _optimum(boot, cost, budget)
    spare = groups - COEFFICIENTS
    scatter = float(np.sqrt(np.sum(surface.fit.residuals_I**2) / (len(L) - COEFFICIENTS)))
    widths = {"N": 0.0, "D": 0.0, "L": scatter}
    estimates = {
        of: _widened(float(value), values_R, spare, groups, widths[of], level)
        for of, value, values_R in zip(QUANTITIES, best, drawn, strict=True)
    }
    errors = held_out(surface.fit, runs["budget"].to_numpy())
    return Route(
        approach="approach 3",
        **estimates,
        coefficients=_coefficients(surface, cost),
        held_out_error=errors.mean_abs_error,
        largest_error=errors.largest.mean_error,
    )


def configurations(runs: pd.DataFrame) -> np.ndarray:
    """The index of every run's (size, budget), (I,)."""
    return runs.groupby(["size", "budget"]).ngroup().to_numpy()


def columns(runs: pd.DataFrame, axis: str) -> list[np.ndarray]:
    """N, D, L and C of every run, (I,) each; C is the budget where no FLOPs were counted."""
    C = runs["flops"].where(runs["flops"].notna(), runs["budget"])
    return [runs[name].to_numpy(dtype=float) for name in (axis, "tokens", "loss")] + [
        C.to_numpy(dtype=float)
    ]


def _coefficients(surface: LossSurface, cost: PowerFit | None) -> dict[str, float]:
    found = {name: float(getattr(surface, name)) for name in ("A", "B", "E", "alpha", "beta")}
    found["delta"], found["objective"] = surface.delta, surface.objective
    if cost:
        found["log_flops_per_ND"], found["flops_per_ND_exponent"] = (
            cost.log_coefficient,
            cost.exponent,
        )
    return found


def _optimum(
    law: LossSurface | SurfaceBootstrap, cost: PowerFit | None, C: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N*, D*, L*) where C = k N^(1 + b) D: FLOPs per parameter and token fall or rise with N, as
    where N counts tables of which a token reads a few rows. b = 0, k = 6 is the usual 6 N D.
    """
    names = ("A", "B", "E", "alpha", "beta")
    if isinstance(law, SurfaceBootstrap):
        A, B, E, alpha, beta = (law.values(name) for name in names)
    else:
        A, B, E, alpha, beta = (np.asarray(getattr(law, name)) for name in names)
    log_k, power = (cost.log_coefficient, 1 + cost.exponent) if cost else (np.log(6.0), 1.0)
    with np.errstate(all="ignore"):  # replicates without a term: they are at an end of the interval
        log_N = np.log(alpha * A) - np.log(power * beta * B) + beta * (np.log(C) - log_k)
        log_N = log_N / (alpha + power * beta)
        log_D = np.log(C) - log_k - power * log_N
        L = E + A * np.exp(-alpha * log_N) + B * np.exp(-beta * log_D)
        return np.exp(log_N), np.exp(log_D), L


def _widened(
    value: float, values_R: np.ndarray, spare: int, groups: int, scatter: float, level: float
) -> Estimate:
    """Percentiles around the value, in logarithms, as much wider as few configurations ask for.

    A resample of K configurations has the variance of K where K - 5 are left after fitting; and the
    t quantile of those K - 5 takes the place of the normal one.
    """
    with np.errstate(all="ignore"):
        offset_R = np.log(values_R / value)
    offset_R = offset_R[np.isfinite(offset_R)]
    if len(offset_R) < len(values_R) / 2:
        return Estimate(value, float("nan"), float("nan"))
    quantile = student_quantile(spare, level)
    wider = np.sqrt(groups / spare) * quantile / ndtri((1 + level) / 2)
    low, high = np.quantile(offset_R, [(1 - level) / 2, (1 + level) / 2])
    below = np.hypot(wider * min(low, 0.0), quantile * scatter)
    above = np.hypot(wider * max(high, 0.0), quantile * scatter)
    return Estimate(value, value * float(np.exp(-below)), value * float(np.exp(above)))
