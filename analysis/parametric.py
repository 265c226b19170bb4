"""L(N, D) = E + A / N^alpha + B / D^beta: approach 3 of Hoffmann et al. 2022 (2203.15556).

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token. The objective is the sum over runs of Huber(ln L' - ln L); see `fitting.py`.
"""

from dataclasses import dataclass

import numpy as np

from analysis.fitting import (
    CONFIDENCE,
    DELTA,
    Fit,
    FitStatus,
    Replicates,
    check_runs,
    fit_sum,
    percentiles,
    refit,
    resampling_weights,
)
from analysis.load import AnalysisError
from analysis.powersum import PowerSum, Term

GRID = tuple(np.linspace(0.05, 1.15, 12).tolist())
"""Exponents where the search starts; published ones lie between 0.1 and 0.8."""
NUM_REPLICATES = 4000
FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""C = 6 N D (Kaplan et al. 2020), where no exact FLOPs are at hand."""


@dataclass(frozen=True, eq=False)
class LossSurface:
    """The fitted law; its coefficients are an answer if `status` is ok."""

    A: float
    B: float
    E: float
    alpha: float
    beta: float
    delta: float
    objective: float
    status: FitStatus
    fit: Fit
    """Covariance, residuals and the runs."""

    @property
    def exponent_N(self) -> float:
        """Of N* ~ C^exponent: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def exponent_D(self) -> float:
        """Of D* ~ C^exponent."""
        return 1.0 - self.exponent_N

    @property
    def exponent_stderr(self) -> float:
        """Standard error of both exponents (delta method)."""
        covariance = self.fit.covariance_PP[-2:, -2:]
        gradient = np.array([-self.beta, self.alpha]) / (self.alpha + self.beta) ** 2
        return float(np.sqrt(gradient @ covariance @ gradient))

    def loss(self, N: np.ndarray, D: np.ndarray) -> np.ndarray:
        """L at N parameters and D tokens."""
        return self.E + self.A * np.power(N, -self.alpha) + self.B * np.power(D, -self.beta)

    def optimum(
        self, C: np.ndarray, flops: float = FLOPS_PER_PARAMETER_AND_TOKEN
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N*, D*, L*) at a budget, where C = flops N D."""
        N, D = _allocation(self.A, self.B, self.alpha, self.beta, np.asarray(C) / flops)
        return N, D, self.loss(N, D)


@dataclass(frozen=True, eq=False)
class SurfaceBootstrap:
    """Exact refits of resampled runs."""

    replicates: Replicates

    @property
    def num_converged(self) -> int:
        """Replicates whose minimum was reached."""
        return int(self.replicates.converged_R.sum())

    def values(self, name: str) -> np.ndarray:
        """A, B, E, alpha, beta, exponent_N or exponent_D of every replicate, (R,)."""
        if name in ("exponent_N", "exponent_D"):
            alpha, beta = self.values("alpha"), self.values("beta")
            return (beta if name == "exponent_N" else alpha) / (alpha + beta)
        return self.replicates.values(name)

    def interval(self, name: str, level: float = CONFIDENCE) -> tuple[float, float]:
        """Percentile interval of one of them."""
        return percentiles(self.values(name), level)

    def stderr(self, name: str) -> float:
        """Standard deviation over replicates."""
        return float(self.values(name).std(ddof=1))

    def optimum(
        self, C: float, flops: float = FLOPS_PER_PARAMETER_AND_TOKEN
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N*, D*, L*) at a budget in every replicate, (R,) each."""
        A, B, E, alpha, beta = (self.values(n) for n in ("A", "B", "E", "alpha", "beta"))
        N, D = _allocation(A, B, alpha, beta, C / flops)
        return N, D, E + A * N**-alpha + B * D**-beta


def surface_model(params: np.ndarray, tokens: np.ndarray) -> PowerSum:
    """The law over these runs."""
    terms = (
        Term("A", {"alpha": np.log(params)}),
        Term("B", {"beta": np.log(tokens)}),
        Term("E"),
    )
    return PowerSum(terms, len(params))


def fit_loss_surface(
    params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, delta: float = DELTA
) -> LossSurface:
    """Fit approach 3.

    Args:
        params: N of every run, (I,).
        tokens: D.
        loss: L, nats per token.
        delta: of the Huber loss, in ln L. Results depend on it: see `diagnostics.delta_sweep`.

    Raises:
        AnalysisError: a value that is not a positive number, or fewer than six runs.
    """
    N, D, L = check_runs(params=params, tokens=tokens, loss=loss)
    fit = fit_sum(surface_model(N, D), L, {"alpha": GRID, "beta": GRID}, delta)
    return as_surface(fit)


def as_surface(fit: Fit) -> LossSurface:
    """A fit of `surface_model` under its own names."""
    values = {name: fit.value(name) for name in ("A", "B", "E", "alpha", "beta")}
    return LossSurface(
        **values, delta=fit.delta, objective=fit.objective, status=fit.status, fit=fit
    )


def bootstrap_loss_surface(
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    weights: np.ndarray | None = None,
    delta: float = DELTA,
    *,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> SurfaceBootstrap:
    """Refit approach 3 exactly to every resample.

    Args:
        params: N of every run, (I,).
        tokens: D.
        loss: L, nats per token.
        weights: (R, I), how often each run counts in each replicate; None: drawn, see
            `fitting.resampling_weights` for the other arguments.
        delta: of the Huber loss, in ln L.
        num_replicates: R, if drawn.
        seed: of the draws.
        clusters: runs that are drawn together.

    Raises:
        AnalysisError: as `fit_loss_surface`, or weights of another shape.
    """
    surface = fit_loss_surface(params, tokens, loss, delta)
    num_runs = len(surface.fit.log_L_I)
    if weights is None:
        weights = resampling_weights(num_runs, num_replicates, seed, clusters)
    if weights.ndim != 2 or weights.shape[1] != num_runs:
        raise AnalysisError(
            f"weights of shape {weights.shape}: give one row per replicate of {num_runs} numbers"
        )
    return SurfaceBootstrap(refit(surface.fit, np.asarray(weights, dtype=float)))


def _allocation(
    A: np.ndarray | float,
    B: np.ndarray | float,
    alpha: np.ndarray | float,
    beta: np.ndarray | float,
    product: np.ndarray | float,
) -> tuple[np.ndarray, np.ndarray]:
    """The N and D of given product that minimise L: Hoffmann et al. 2022, equation 4."""
    both = np.add(alpha, beta)
    N = np.exp((np.log(alpha * A) - np.log(beta * B) + beta * np.log(product)) / both)
    return N, product / N
