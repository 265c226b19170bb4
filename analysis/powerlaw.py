"""Power laws through points, y = exp(log_coefficient) C^exponent: approach 2 over isoFLOP minima.

Least squares of ln y on ln C, weighted where the points have standard errors. Legend, as in the
papers: C training FLOPs; y is N*, D* or L*.
"""

from dataclasses import dataclass

import numpy as np

from analysis.fitting import FitStatus, check_runs, student_quantile
from analysis.laws import power_law
from analysis.load import AnalysisError


@dataclass(frozen=True, eq=False)
class PowerFit:
    """The fitted law."""

    log_coefficient: float
    exponent: float
    covariance: np.ndarray
    """(2, 2), of log_coefficient and exponent; NaN with two points, through which any law passes.
    With standard errors, theirs, times chi^2 / dof where the points scatter more than they say;
    without, from the scatter."""
    residuals: np.ndarray
    """ln of fitted over given y."""
    left_out: np.ndarray
    """The same for each point, with the law fitted to the others."""
    exponents_without: np.ndarray
    """Exponent without each point: its influence."""
    dof: int
    status: FitStatus

    @property
    def exponent_stderr(self) -> float:
        """Standard error of the exponent."""
        return float(np.sqrt(self.covariance[1, 1]))

    @property
    def exponent_interval(self) -> tuple[float, float]:
        """95 % interval, from Student's t."""
        margin = student_quantile(self.dof) * self.exponent_stderr
        return self.exponent - margin, self.exponent + margin

    def at(self, C: np.ndarray | float) -> np.ndarray:
        """The law's value at C."""
        return power_law(self.log_coefficient, self.exponent, C)

    def log_stderr(self, C: float) -> float:
        """Standard error of ln y of the law at C."""
        row = np.array([1.0, np.log(C)])
        return float(np.sqrt(row @ self.covariance @ row))


def fit_power_law(C: np.ndarray, y: np.ndarray, log_stderr: np.ndarray | None = None) -> PowerFit:
    """Fit ln y = log_coefficient + exponent ln C.

    Args:
        C: (I,), FLOPs as they were spent, never rounded labels: 2e18 for 2.15e18 moved nanochat's
            exponents by 0.01.
        y: (I,).
        log_stderr: standard error of ln y, (I,); None: all points count the same.

    Raises:
        AnalysisError: fewer than two different C, or a value that is not a positive number.
    """
    C, y = check_runs(C=C, y=y)
    if len(np.unique(C)) < 2:
        raise AnalysisError(f"{len(np.unique(C))} budget: a power law needs two")
    sigma = np.ones(len(C)) if log_stderr is None else check_runs(y=y, log_stderr=log_stderr)[1]
    centre = float(np.average(np.log(C), weights=sigma**-2))
    design = np.stack([np.ones(len(C)), np.log(C) - centre], axis=1) / sigma[:, None]
    goal = np.log(y) / sigma
    inverse = np.linalg.inv(design.T @ design)
    solution = inverse @ (design.T @ goal)
    scaled = design @ solution - goal
    dof = len(C) - 2
    spread = float(scaled @ scaled / dof) if dof else np.nan
    if log_stderr is not None and dof:
        spread = max(1.0, spread)
    back = np.array([[1.0, -centre], [0.0, 1.0]])
    leverage = np.einsum("ip,pq,iq->i", design, inverse, design)
    alone = leverage > 1 - 1e-12
    left_out = np.where(alone, np.nan, scaled / np.where(alone, 1.0, 1 - leverage))
    return PowerFit(
        log_coefficient=float(solution[0] - solution[1] * centre),
        exponent=float(solution[1]),
        covariance=back @ (spread * inverse) @ back.T,
        residuals=scaled * sigma,
        left_out=left_out * sigma,
        exponents_without=solution[1] + (inverse @ design.T)[1] * left_out,
        dof=dof,
        status=FitStatus.OK if dof else FitStatus.UNDETERMINED,
    )
