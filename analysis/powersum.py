"""Sums of power laws, L = sum_k c_k prod_j base_kj^-exponent_j: what every parametric law here is.

L(N, D) = E + A/N^alpha + B/D^beta is one, with three terms; so are the laws with sparsity and
L*(C). They share one optimiser (`huber.py`): ln of each term is linear in ln c and the exponents.

Shape legend: I runs, K terms, P coefficients and exponents, G grid points, R replicates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

SMALLEST = 1e-9
"""Of a term against the loss, where a start of the optimiser would have it negative."""

ROWS_AT_ONCE = 64
"""Replicates projected at a time, for memory: 10 MB with 144 grid points and three terms."""


@dataclass(frozen=True)
class Term:
    """c prod_j base_j^-exponent_j."""

    coefficient: str | None
    """Name of c; None: c is `pinned`."""
    powers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Exponent -> ln of its base, (I,). Terms may share exponents."""
    pinned: float = 1.0
    only: np.ndarray | None = None
    """(I,) bool, the runs that have this term; None: all."""


@dataclass(frozen=True)
class PowerSum:
    """Terms over the same I runs; `names` orders theta_P: ln of the coefficients, then exponents.

    Inside, ln of every base is centred: uncentred, ln c and its exponents are nearly collinear.
    `raw` and `centred` go between the two.
    """

    terms: tuple[Term, ...]
    num_runs: int

    @cached_property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the free coefficients."""
        return tuple(term.coefficient for term in self.terms if term.coefficient is not None)

    @cached_property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents, each once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.powers))

    @property
    def names(self) -> tuple[str, ...]:
        """Of theta_P."""
        return (*self.coefficients, *self.exponents)

    @cached_property
    def centres(self) -> dict[str, float]:
        """Mean of ln base over the runs that have it; 0 where a term could not make up for it."""
        pinned = {name for t in self.terms if t.coefficient is None for name in t.powers}
        means: dict[str, float] = dict.fromkeys(pinned, 0.0)
        for term in self.terms:
            for name, ln_base_I in term.powers.items():
                here_I = ln_base_I if term.only is None else ln_base_I[term.only]
                means.setdefault(name, float(here_I.mean()))
        return means

    @cached_property
    def features_PKI(self) -> np.ndarray:
        """Ln term_k of run i is offset_KI + sum_p theta_p features_pki, theta centred."""
        features_PKI = np.zeros((len(self.names), len(self.terms), self.num_runs))
        for k, term in enumerate(self.terms):
            if term.coefficient is not None:
                features_PKI[self.names.index(term.coefficient), k] = 1.0
            for name, ln_base_I in term.powers.items():
                features_PKI[self.names.index(name), k] = self.centres[name] - ln_base_I
        return features_PKI

    @cached_property
    def offset_KI(self) -> np.ndarray:
        """Ln of the pinned coefficients; -inf where a run lacks the term."""
        offset_KI = np.zeros((len(self.terms), self.num_runs))
        for k, term in enumerate(self.terms):
            offset_KI[k] = np.log(term.pinned) if term.coefficient is None else 0.0
            if term.only is not None:
                offset_KI[k, ~term.only] = -np.inf
        return offset_KI

    @cached_property
    def slots(self) -> tuple[tuple[tuple[int, np.ndarray | None], ...], ...]:
        """Per coefficient the (term, column) that are not zero; column None where it is 1."""
        return tuple(
            tuple(
                (k, None if p < len(self.coefficients) else column_KI[k])
                for k in range(len(self.terms))
                if column_KI[k].any()
            )
            for p, column_KI in enumerate(self.features_PKI)
        )

    @cached_property
    def to_raw_PP(self) -> np.ndarray:
        """theta_raw = to_raw_PP theta_centred: ln c = ln c' + sum of exponent times centre."""
        to_raw_PP = np.eye(len(self.names))
        for term in self.terms:
            if term.coefficient is not None:
                for name in term.powers:
                    row, column = self.names.index(term.coefficient), self.names.index(name)
                    to_raw_PP[row, column] = self.centres[name]
        return to_raw_PP

    def raw(self, theta_RP: np.ndarray) -> np.ndarray:
        """Coefficients as the law states them, from centred ones."""
        return theta_RP @ self.to_raw_PP.T

    def centred(self, theta_RP: np.ndarray) -> np.ndarray:
        """The inverse of `raw`."""
        return np.linalg.solve(self.to_raw_PP, theta_RP.T).T

    def ln_terms(self, theta_RP: np.ndarray) -> np.ndarray:
        """Ln of every term, (R, K, I), of centred coefficients."""
        shape = (len(theta_RP), len(self.terms), self.num_runs)
        flat_PJ = self.features_PKI.reshape(len(self.names), -1)
        return (theta_RP @ flat_PJ).reshape(shape) + self.offset_KI

    def ln_loss(self, theta_RP: np.ndarray) -> np.ndarray:
        """Ln L, (R, I), of centred coefficients."""
        return np.logaddexp.reduce(self.ln_terms(theta_RP), axis=1)

    def loss(self, theta_P: np.ndarray) -> np.ndarray:
        """L of every run, (I,), of coefficients as the law states them."""
        return np.exp(self.ln_loss(self.centred(theta_P[None]))[0])


def starts_on_grid(
    model: PowerSum,
    log_L_I: np.ndarray,
    weights_RI: np.ndarray,
    grid: Mapping[str, Sequence[float]],
    keep: int,
) -> np.ndarray:
    """Starts by variable projection (Golub and Pereyra 1973), (R, keep, P), centred, best first.

    At each point of the grid over the exponents, the coefficients by least squares on L'/L - 1,
    which is the log residual to first order. What comes out negative starts from nearly nothing.
    """
    exponents_GE = np.stack(np.meshgrid(*(grid[n] for n in model.exponents), indexing="ij"), -1)
    exponents_GE = exponents_GE.reshape(-1, len(model.exponents))
    num_free = len(model.coefficients)
    theta_GP = np.hstack([np.zeros((len(exponents_GE), num_free)), exponents_GE])
    term_GKI = np.exp(model.ln_terms(theta_GP) - log_L_I)
    free_K = np.array([term.coefficient is not None for term in model.terms])
    goal_GI = 1.0 - term_GKI[:, ~free_K].sum(axis=1)
    # A scale per term keeps the normal equations from overflow and from needless bad condition.
    scale_GK = term_GKI[:, free_K].mean(axis=2)
    unit_GKI = term_GKI[:, free_K] / scale_GK[..., None]
    rows_GMI = np.concatenate([unit_GKI, goal_GI[:, None]], axis=1)
    upper = np.triu_indices(num_free + 1)
    products_MGI = np.stack([rows_GMI[:, a] * rows_GMI[:, b] for a, b in zip(*upper, strict=True)])
    theta_RSP = np.empty((len(weights_RI), keep, theta_GP.shape[1]))
    for first in range(0, len(weights_RI), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        sums_RMG = np.tensordot(weights_RI[part], products_MGI, axes=(1, 2))
        found_RGK, miss_RG = _solve(sums_RMG, num_free)
        best_RS = np.argsort(miss_RG, axis=1, kind="stable")[:, :keep]
        theta_RSP[part] = theta_GP[best_RS]
        chosen_RSK = np.take_along_axis(found_RGK, best_RS[..., None], axis=1)
        theta_RSP[part, :, :num_free] = np.log(chosen_RSK / scale_GK[best_RS])
    return theta_RSP


def _solve(sums_RMG: np.ndarray, num_free: int) -> tuple[np.ndarray, np.ndarray]:
    """Scaled coefficients, (R, G, K), and by how much they miss, less a constant, (R, G)."""
    R, _, G = sums_RMG.shape
    gram_RGMM = np.empty((R, G, num_free + 1, num_free + 1))
    for m, (a, b) in enumerate(zip(*np.triu_indices(num_free + 1), strict=True)):
        gram_RGMM[..., a, b] = gram_RGMM[..., b, a] = sums_RMG[:, m]
    normal, right = gram_RGMM[..., :num_free, :num_free], gram_RGMM[..., :num_free, num_free]
    ridge = 1e-12 * np.trace(normal, axis1=-2, axis2=-1)[..., None, None] * np.eye(num_free)
    found_RGK = np.linalg.solve(normal + ridge, right[..., None])[..., 0]
    found_RGK = np.maximum(found_RGK, SMALLEST)
    pull_RGK = (normal @ found_RGK[..., None])[..., 0] - 2 * right
    return found_RGK, (found_RGK * pull_RGK).sum(axis=-1)
