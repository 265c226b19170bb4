"""Any sum of power laws, fitted: the minimum, how sure, and the same for many reweightings at once.

Convention: the objective is the SUM over runs of Huber(ln L' - ln L) with the delta that the result
states (Hoffmann et al. 2022, 2203.15556, approach 3, has 1e-3). Sums and delta must agree before
two objectives are compared.

Shape legend: I runs, K terms, P coefficients and exponents, R replicates, S starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.special import stdtrit

from analysis.huber import Minima, Objective, minimise
from analysis.load import AnalysisError
from analysis.powersum import PowerSum, starts_on_grid

DELTA = 1e-3
"""Of Hoffmann et al. 2022."""
STAGES = (1e-2, 3e-3)
"""Deltas on the way down to a smaller one, for starts that are far off."""
NUM_STARTS = 4
VANISHED = 1e-6
"""Of the loss: a term below it in every run is not there."""
SINGULAR = 1e-10
"""Smallest eigenvalue, of scaled J J' and of the scaled Hessian, that determines coefficients."""
CONFIDENCE = 0.95


class FitStatus(StrEnum):
    """What became of a fit."""

    OK = "ok"
    NOT_CONVERGED = "not converged"
    """The optimiser could still lower the objective when it stopped."""
    VANISHED = "a term vanished"
    """The best fit does without one of the law's terms, as E = 0: too few or too noisy runs."""
    UNDETERMINED = "undetermined"
    """Coefficients can be traded for one another without loss, as when a base never varies."""


@dataclass(frozen=True, eq=False)
class Fit:
    """The minimum of the objective for one model and its runs."""

    model: PowerSum
    log_L_I: np.ndarray
    grid: Mapping[str, Sequence[float]]
    theta_P: np.ndarray
    """As the law states them, in the order of `names`: ln of the coefficients, exponents."""
    covariance_PP: np.ndarray
    """Of theta_P, sandwich H^-1 (sum of score score') H^-1 times I / (I - P) (Huber 1967), for many
    runs; it holds their scatter, not that the law may be wrong. NaN unless the status is ok."""
    delta: float
    objective: float
    """Sum over runs of Huber(ln L' - ln L)."""
    status: FitStatus
    vanished: tuple[str, ...]
    """Coefficients of the terms that the fit does without."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of theta_P."""
        return self.model.names

    @property
    def ok(self) -> bool:
        """Whether the coefficients are an answer."""
        return self.status is FitStatus.OK

    @property
    def residuals_I(self) -> np.ndarray:
        """Ln L' - ln L of every run."""
        return np.log(self.model.loss(self.theta_P)) - self.log_L_I

    def value(self, name: str) -> float:
        """A coefficient (not its ln) or an exponent."""
        return float(_values(self.names, self.model, self.theta_P[None], name)[0])

    def stderr(self, name: str) -> float:
        """Standard error of an exponent, or of ln of a coefficient."""
        place = self.names.index(name)
        return float(np.sqrt(self.covariance_PP[place, place]))


@dataclass(frozen=True, eq=False)
class Replicates:
    """Refits of one model under other weights."""

    model: PowerSum
    theta_RP: np.ndarray
    """As the law states them."""
    objective_R: np.ndarray
    converged_R: np.ndarray

    def values(self, name: str) -> np.ndarray:
        """A coefficient (not its ln) or an exponent, (R,)."""
        return _values(self.model.names, self.model, self.theta_RP, name)

    def interval(self, name: str, level: float = CONFIDENCE) -> tuple[float, float]:
        """Percentile interval."""
        return percentiles(self.values(name), level)

    def losses(self) -> np.ndarray:
        """L' of every run, (R, I)."""
        return np.exp(self.model.ln_loss(self.model.centred(self.theta_RP)))


def student_quantile(dof: float, level: float = CONFIDENCE) -> float:
    """Half width of a two-sided interval in standard errors; NaN if there is no `dof`."""
    return float(stdtrit(dof, (1 + level) / 2)) if dof > 0 else float("nan")


def percentiles(values: np.ndarray, level: float = CONFIDENCE) -> tuple[float, float]:
    """The central interval that holds `level` of the values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def fit_sum(
    model: PowerSum, loss: np.ndarray, grid: Mapping[str, Sequence[float]], delta: float = DELTA
) -> Fit:
    """The lowest minimum from the best starts of the grid.

    Args:
        model: the law over these runs.
        loss: (I,), nats per token.
        grid: exponent -> values where the search starts.
        delta: of the Huber loss, in ln L.

    Raises:
        AnalysisError: fewer runs than coefficients plus one.
    """
    if model.num_runs <= len(model.names):
        raise AnalysisError(
            f"{model.num_runs} runs for {len(model.names)} coefficients: at least "
            f"{len(model.names) + 1} are needed"
        )
    log_L_I = np.log(loss)
    objective = Objective(model, log_L_I)
    weights_1I = np.ones((1, model.num_runs))
    starts_SP = starts_on_grid(model, log_L_I, weights_1I, grid, NUM_STARTS)[0]
    minima = minimise(objective, weights_1I, starts_SP, stages(delta))
    best = int(np.argmin(minima.objective_R))
    return _fit(objective, grid, delta, minima, best)


def stages(delta: float) -> tuple[float, ...]:
    """Deltas that lead down to this one, by at most half a decade where it is small."""
    ways = [*STAGES, *(10.0**-k * step for k in range(3, 13) for step in (1.0, 0.3))]
    return (*(way for way in ways if way > delta * 1.01), delta)


def _fit(
    objective: Objective,
    grid: Mapping[str, Sequence[float]],
    delta: float,
    minima: Minima,
    best: int,
) -> Fit:
    model = objective.model
    theta_P = minima.theta_RP[best]
    share_KI = np.exp(model.ln_terms(theta_P[None])[0] - model.ln_loss(theta_P[None]))
    gone = [
        term.coefficient
        for term, share in zip(model.terms, share_KI.max(axis=1), strict=True)
        if term.coefficient is not None and share < VANISHED
    ]
    covariance_PP = _covariance(objective, theta_P, delta)
    status = FitStatus.OK
    if gone:
        status = FitStatus.VANISHED
    elif covariance_PP is None:
        status = FitStatus.UNDETERMINED
    elif not minima.converged_R[best]:
        status = FitStatus.NOT_CONVERGED
    if covariance_PP is None or status is not FitStatus.OK:
        covariance_PP = np.full((len(theta_P), len(theta_P)), np.nan)
    return Fit(
        model=model,
        log_L_I=objective.log_L_I,
        grid=grid,
        theta_P=model.raw(theta_P[None])[0],
        covariance_PP=covariance_PP,
        delta=delta,
        objective=float(minima.objective_R[best]),
        status=status,
        vanished=tuple(gone),
    )


def _covariance(objective: Objective, theta_P: np.ndarray, delta: float) -> np.ndarray | None:
    """Of the coefficients as the law states them; None where the runs do not determine them."""
    model = objective.model
    residual_I, slope_PI = objective.slopes(theta_P)
    scale_P = np.sqrt((slope_PI**2).sum(axis=1)) + 1e-150
    slope_PI /= scale_P[:, None]
    if np.linalg.eigvalsh(slope_PI @ slope_PI.T)[0] < SINGULAR:
        return None
    point = objective.at(theta_P[None], np.ones((1, model.num_runs)), np.array([delta]))
    own_I = (np.abs(residual_I) < delta).astype(float)
    smooth_I = _smoothed(residual_I, delta)
    hessian_PP = point.H_BPP[0] / np.outer(scale_P, scale_P)
    hessian_PP += (slope_PI * (smooth_I - own_I)) @ slope_PI.T
    if np.linalg.eigvalsh(hessian_PP)[0] < SINGULAR * smooth_I.mean():
        return None
    scores_PI = slope_PI * np.clip(residual_I, -delta, delta)
    bread_PP = model.to_raw_PP @ (np.linalg.inv(hessian_PP) / scale_P[:, None])
    few = model.num_runs / (model.num_runs - len(theta_P))
    return few * bread_PP @ (scores_PI @ scores_PI.T) @ bread_PP.T


def _smoothed(residual_I: np.ndarray, delta: float) -> np.ndarray:
    """Chance that a run lies within delta, from those within a wider band (Powell 1991).

    At small delta, only about as many runs as coefficients lie within it, on purpose: the minimum
    passes through them. Taken as they are, they would make it look certain.
    """
    spread = 1.4826 * float(np.median(np.abs(residual_I)))
    band = max(delta, 1.06 * spread * len(residual_I) ** -0.2)
    return (np.abs(residual_I) < band) * (delta / band)


def refit(fit: Fit, weights_RI: np.ndarray) -> Replicates:
    """The exact minimum under each row of weights.

    Each replicate descends twice, from the fit's own minimum and from its own best point of the
    grid; the lower one counts.
    """
    model, rows = fit.model, len(weights_RI)
    objective = Objective(model, fit.log_L_I)
    warm_RP = np.repeat(model.centred(fit.theta_P[None]), rows, axis=0)
    cold_RP = starts_on_grid(model, fit.log_L_I, weights_RI, fit.grid, 1)[:, 0]
    warm = minimise(objective, weights_RI, warm_RP, (fit.delta,))
    cold = minimise(objective, weights_RI, cold_RP, stages(fit.delta))
    lower_R = cold.objective_R < warm.objective_R
    return Replicates(
        model=model,
        theta_RP=model.raw(np.where(lower_R[:, None], cold.theta_RP, warm.theta_RP)),
        objective_R=np.where(lower_R, cold.objective_R, warm.objective_R),
        converged_R=np.where(lower_R, cold.converged_R, warm.converged_R),
    )


def resampling_weights(
    num_runs: int, num_replicates: int, seed: int = 0, clusters: np.ndarray | None = None
) -> np.ndarray:
    """How often each run was drawn, (R, I): runs with replacement, or whole clusters of them.

    Args:
        num_runs: I.
        num_replicates: R.
        seed: of a private generator.
        clusters: (I,) labels, as of configurations of which several seeds or checkpoints were run;
            these are not independent, and drawing them singly makes intervals too narrow.
    """
    labels = np.arange(num_runs) if clusters is None else np.asarray(clusters)
    names, cluster_I = np.unique(labels, return_inverse=True)
    rng = np.random.default_rng(seed)
    share = np.full(len(names), 1 / len(names))
    return rng.multinomial(len(names), share, num_replicates).astype(float)[:, cluster_I]


def _values(names: tuple[str, ...], model: PowerSum, theta_RP: np.ndarray, name: str) -> np.ndarray:
    column_R = theta_RP[:, names.index(name)]
    return np.exp(column_R) if name in model.coefficients else column_R


def check_runs(**columns: np.ndarray) -> list[np.ndarray]:
    """The columns as float64, (I,) each: 6 N D overflows int64.

    Raises:
        AnalysisError: lengths differ, or a value is not a positive number.
    """
    arrays = {name: np.asarray(column, dtype=float) for name, column in columns.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 1:
        raise AnalysisError(f"columns of different shapes, {shapes}: give one value per run")
    for name, array in arrays.items():
        wrong = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
        if len(wrong):
            raise AnalysisError(
                f"{name}={array[wrong[0]]:g} of run {wrong[0]}: it must be a positive number; "
                f"leave out the {len(wrong)} runs like it"
            )
    return list(arrays.values())
