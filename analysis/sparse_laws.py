"""Laws for layers that use a part of their parameters: fine-grained MoE, routed models, PKM, PEER.

Legend, as in the papers: N parameters, D training tokens, G granularity, E experts (in Clark's law;
elsewhere the loss floor), L loss in nats per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from analysis.fitting import DELTA, Fit, FitStatus, check_runs, fit_sum
from analysis.load import AnalysisError
from analysis.powersum import PowerSum, Term

GRID = tuple(np.linspace(0.05, 0.9, 8).tolist())
SPARSITY_GRID = (0.02, 0.1, 0.3, 0.6, 1.0)
ROUTED_STARTS = tuple((start, top) for start in (1.0, 2.0, 4.0, 8.0) for top in (64.0, 256.0, 2e3))
"""E_start and E_max; Clark et al. found 1.8 to 4.2 and 314 to 478."""


@dataclass(frozen=True, eq=False)
class SparseLaw:
    """A fitted law with sparsity, coefficients by the names of its source."""

    law: str
    coefficients: Mapping[str, float]
    objective: float
    status: FitStatus
    fit: Fit


def fit_sparse_surface(
    active: np.ndarray,
    total: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    delta: float = DELTA,
) -> SparseLaw:
    """L = E + A / (N_active^alpha (N_total / N_active)^gamma) + B / D^beta, for PKM and PEER.

    Parameters that are stored but not used by a token count gamma / alpha as much, in logarithms,
    as active ones: gamma = 0 if they are worth nothing, gamma = alpha if they are worth the same.
    The law is approach 3 of Hoffmann et al. 2022 with N = N_active (N_total / N_active)^(gamma /
    alpha), the effective parameter count of Clark et al. 2022 (2202.01169) without its saturation;
    dense runs have N_total = N_active and share A, alpha, B, beta and E.

    Args:
        active: N_active, parameters that a token uses, (I,).
        total: N_total, lookup tables included.
        tokens: D.
        loss: L.
        delta: of the Huber loss, in ln L.

    Raises:
        AnalysisError: fewer than seven runs, values that are not positive, total below active.
    """
    N, stored, D, L = check_runs(active=active, total=total, tokens=tokens, loss=loss)
    below = np.flatnonzero(stored < N)
    if len(below):
        raise AnalysisError(
            f"total={stored[below[0]]:g} of run {below[0]} is below active={N[below[0]]:g}"
        )
    terms = (
        Term("A", {"alpha": np.log(N), "gamma": np.log(stored / N)}),
        Term("B", {"beta": np.log(D)}),
        Term("E"),
    )
    grid = {"alpha": GRID, "gamma": SPARSITY_GRID, "beta": GRID}
    return _fitted("L(N_active, N_total, D)", PowerSum(terms, len(L)), L, grid, delta)


def fit_fine_grained(
    params: np.ndarray,
    tokens: np.ndarray,
    granularity: np.ndarray,
    loss: np.ndarray,
    delta: float = DELTA,
) -> SparseLaw:
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, 2402.07871).

    Args:
        params: N, total parameters, at one expansion rate, (I,).
        tokens: D.
        granularity: G, by how much experts are smaller than the dense layer's hidden width.
        loss: L.
        delta: of the Huber loss, in ln L.

    Raises:
        AnalysisError: fewer than eight runs, or values that are not positive.
    """
    N, D, G, L = check_runs(params=params, tokens=tokens, granularity=granularity, loss=loss)
    terms = (
        Term("g", {"alpha": np.log(N), "gamma": np.log(G)}),
        Term("a", {"alpha": np.log(N)}),
        Term("b", {"beta": np.log(D)}),
        Term("c"),
    )
    grid = {"alpha": GRID[:5], "gamma": SPARSITY_GRID, "beta": GRID[:5]}
    return _fitted("fine-grained MoE", PowerSum(terms, len(L)), L, grid, delta)


def _fitted(
    law: str, model: PowerSum, L: np.ndarray, grid: Mapping[str, tuple[float, ...]], delta: float
) -> SparseLaw:
    fit = fit_sum(model, L, grid, delta)
    values = {name: fit.value(name) for name in fit.names}
    return SparseLaw(law, values, fit.objective, fit.status, fit)


@dataclass(frozen=True, eq=False)
class RoutedLaw:
    """Log10 L = a log10 N + b log10 E' + c log10 N log10 E' + d, and E' saturates in E.

    1 / E' = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max: from E_start at one expert to
    E_max (Clark et al. 2022, 2202.01169, equation 7).
    """

    a: float
    b: float
    c: float
    d: float
    E_start: float
    E_max: float
    covariance: np.ndarray
    """(6, 6), in the order above, with E_start and E_max as their ln."""
    residuals: np.ndarray
    """Log10 of fitted over measured loss."""
    status: FitStatus

    @property
    def rmse(self) -> float:
        """Root of the mean square residual, in dex."""
        return float(np.sqrt((self.residuals**2).mean()))

    def loss(self, N: np.ndarray, E: np.ndarray) -> np.ndarray:
        """L of routed models of N dense-equivalent parameters with E experts."""
        saturated = _saturated(np.asarray(E), np.log(self.E_start), np.log(self.E_max))
        return 10 ** (_routed_design(N, saturated) @ [self.a, self.b, self.c, self.d])


def fit_routed(params: np.ndarray, experts: np.ndarray, loss: np.ndarray) -> RoutedLaw:
    """Fit Clark's law by least squares in log10 L, a to d by variable projection.

    Args:
        params: N, parameters of the model without the other experts, (I,).
        experts: E, 1 for dense models.
        loss: L.

    Raises:
        AnalysisError: fewer than seven runs, or values that are not positive.
    """
    N, E, L = check_runs(params=params, experts=experts, loss=loss)
    if len(L) < 7:
        raise AnalysisError(f"{len(L)} runs for 6 coefficients: at least 7 are needed")

    def project(log_bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        design = _routed_design(N, _saturated(E, *log_bounds))
        solution = np.linalg.lstsq(design, np.log10(L), rcond=None)[0]
        return solution, design @ solution - np.log10(L)

    fits = [
        least_squares(
            lambda x: project(x)[1], np.log(start), x_scale=1.0, xtol=1e-12, ftol=1e-14, gtol=1e-14
        )
        for start in ROUTED_STARTS
    ]
    best = min(fits, key=lambda found: found.cost)
    linear, residuals = project(best.x)
    covariance = _routed_covariance(N, E, np.concatenate([linear, best.x]), residuals)
    status = FitStatus.OK if best.success else FitStatus.NOT_CONVERGED
    if not np.isfinite(covariance).all():
        status = FitStatus.UNDETERMINED
    a, b, c, d = linear.tolist()
    E_start, E_max = np.exp(best.x).tolist()
    return RoutedLaw(a, b, c, d, E_start, E_max, covariance, residuals, status)


def _routed_design(N: np.ndarray, saturated: np.ndarray) -> np.ndarray:
    x, y = np.log10(N), np.log10(saturated)
    return np.stack([x, y, x * y, np.ones_like(y)], axis=-1)


def _saturated(E: np.ndarray, log_start: float, log_max: float) -> np.ndarray:
    # Written so that E_start at or above E_max, where the search may pass, still has a value.
    gap = np.maximum(np.exp(-log_start) - np.exp(-log_max), 1e-12)
    return 1 / (1 / (E - 1 + 1 / gap) + np.exp(-log_max))


def _routed_covariance(
    N: np.ndarray, E: np.ndarray, values: np.ndarray, residuals: np.ndarray
) -> np.ndarray:
    """sigma^2 (J'J)^-1 over all six; NaN where they can be traded for one another."""

    def fitted(values: np.ndarray) -> np.ndarray:
        return _routed_design(N, _saturated(E, values[4], values[5])) @ values[:4]

    steps = 1e-6 * np.maximum(np.abs(values), 1e-2)
    jacobian = np.stack(
        [(fitted(values + s) - fitted(values - s)) / (2 * s.sum()) for s in np.diag(steps)], axis=1
    )
    scale = np.linalg.norm(jacobian, axis=0) + 1e-150
    singular = np.linalg.svd(jacobian / scale, compute_uv=False)
    if singular[-1] < 1e-7:
        return np.full((6, 6), np.nan)
    scaled = jacobian / scale
    spread = residuals @ residuals / (len(residuals) - len(values))
    return spread * np.linalg.inv(scaled.T @ scaled) / np.outer(scale, scale)
