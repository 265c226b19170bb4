"""Lower envelopes: approach 1 of Hoffmann et al. 2022, and L*(C) = E + A C^-gamma over variants.

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.fitting import DELTA, Fit, FitStatus, check_runs, fit_sum
from analysis.load import AnalysisError
from analysis.powerlaw import PowerFit, fit_power_law
from analysis.powersum import PowerSum, Term

GAMMAS = tuple(np.linspace(0.02, 0.6, 8).tolist())
"""Exponents of C where the search starts; published ones lie between 0.03 and 0.2."""
COARSE = tuple(np.linspace(0.03, 0.35, 4).tolist())
"""The same for three variants and more: the grid has a dimension for each."""


@dataclass(frozen=True, eq=False)
class Envelope:
    """Approach 1: power laws over the runs that no mixture of cheaper and dearer runs beats."""

    N: PowerFit
    D: PowerFit
    rows: np.ndarray
    """Those runs, by C."""


def lower_envelope(flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Rows on the falling part of the lower convex hull of (ln C, ln L), by C.

    In logarithms, because a power law is a straight line there: every point of it is on its hull.
    """
    C, L = check_runs(flops=flops, loss=loss)
    x, y = np.log(C), np.log(L)
    hull: list[int] = []
    for row in np.lexsort((y, x)):
        while hull and x[row] == x[hull[-1]] and y[row] < y[hull[-1]]:
            hull.pop()
        while len(hull) > 1 and _turns_down(x, y, hull[-2], hull[-1], row):
            hull.pop()
        if not hull or x[row] > x[hull[-1]]:
            hull.append(int(row))
    return np.array(hull[: int(np.argmin(y[hull])) + 1])


def fit_envelope(
    params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, flops: np.ndarray
) -> Envelope:
    """Fit approach 1.

    Args:
        params: N, (I,).
        tokens: D.
        loss: L. Points of training curves count only if their learning rate had decayed by then:
            mid-run checkpoints of a longer schedule are biased.
        flops: C as it was spent.

    Raises:
        AnalysisError: fewer than three runs on the envelope.
    """
    N, D, L, C = check_runs(params=params, tokens=tokens, loss=loss, flops=flops)
    rows = lower_envelope(C, L)
    if len(rows) < 3:
        raise AnalysisError(
            f"{len(rows)} of {len(C)} runs on the lower envelope: at least 3 are needed"
        )
    return Envelope(fit_power_law(C[rows], N[rows]), fit_power_law(C[rows], D[rows]), rows)


@dataclass(frozen=True, eq=False)
class LossEnvelope:
    """L*(C) = E + A_v C^-gamma_v, one E for all variants v."""

    variants: tuple[str, ...]
    A: tuple[float, ...]
    gamma: tuple[float, ...]
    E: float
    pinned: bool
    """Whether E was given."""
    objective: float
    status: FitStatus
    fit: Fit

    def loss(self, variant: str, C: np.ndarray | float) -> np.ndarray:
        """L* of a variant at C."""
        place = self.variants.index(variant)
        return self.E + self.A[place] * np.power(C, -self.gamma[place])

    def compute(self, variant: str, loss: float) -> float:
        """C at which a variant reaches a loss; infinite at E and below."""
        place = self.variants.index(variant)
        if loss <= self.E:
            return float("inf")
        return float((self.A[place] / (loss - self.E)) ** (1 / self.gamma[place]))


def fit_loss_envelope(
    flops: np.ndarray,
    loss: np.ndarray,
    variants: Sequence[str] | None = None,
    *,
    E: float | None = None,
    delta: float = DELTA,
) -> LossEnvelope:
    """Fit L*(C) of one or more variants that share E.

    One E, because it is the entropy of the text, which no architecture changes; with an E each, two
    short curves differ mostly in how E and gamma were traded.

    Args:
        flops: C of every minimum, (I,).
        loss: L* there.
        variants: whose it is, (I,); None: all of one.
        E: pinned, as 1.6 by Marin's mixture-of-experts envelope; None: fitted.
        delta: of the Huber loss, in ln L.

    Raises:
        AnalysisError: too few minima; E not below every loss.
    """
    C, L = check_runs(flops=flops, loss=loss)
    if E is not None and not 0 < E < L.min():
        raise AnalysisError(f"E={E:g}: it must lie between 0 and the lowest loss, {L.min():g}")
    labels = np.full(len(C), "all") if variants is None else np.asarray(variants, dtype=str)
    names = tuple(dict.fromkeys(labels.tolist()))
    terms = [Term(f"A {name}", {f"gamma {name}": np.log(C)}, only=labels == name) for name in names]
    floor = Term("E") if E is None else Term(None, pinned=E)
    model = PowerSum((*terms, floor), len(C))
    values = GAMMAS if len(names) < 3 else COARSE
    fit = fit_sum(model, L, dict.fromkeys(model.exponents, values), delta)
    return LossEnvelope(
        variants=names,
        A=tuple(fit.value(f"A {name}") for name in names),
        gamma=tuple(fit.value(f"gamma {name}") for name in names),
        E=fit.value("E") if E is None else E,
        pinned=E is not None,
        objective=fit.objective,
        status=fit.status,
        fit=fit,
    )


def _turns_down(x: np.ndarray, y: np.ndarray, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    return bool((y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a]))
