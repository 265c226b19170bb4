"""The sum of Huber losses of ln L' - ln L over runs, minimised exactly for many fits at once.

Damped Newton with the true Hessian, one batch of replicates with weights, starts and deltas of
their own. The curvature of the law itself counts: near the minimum at small delta, most runs lie
beyond delta and add nothing else. SUM, not mean: a mean makes optimisers with absolute tolerances
stop early, and the published Chinchilla fit is one of those (Besiroglu et al. 2024, 2404.10102).

Shape legend: I runs, K terms, P coefficients and exponents, R replicates, B those worked on now.
"""

from dataclasses import dataclass

import numpy as np

from analysis.powersum import PowerSum

BATCH_NUMBERS = 90_000
"""In the largest array of a batch, 0.7 MB: it stays in a CPU's second cache, and larger ones are
mapped and cleared anew at every step, which doubled the time of a bootstrap."""
MAX_STEPS = 300
TOLERANCE = 1e-14
"""Of the decrease that Newton still expects, relative to the objective."""
EXACT = 1e-14
"""Added to the objective there, per run: a law that fits without residuals has an objective of
nothing but rounding."""
ROUGH = 1e-3
"""The same where delta is only on its way down."""
LONGEST_STEP = 2.0
"""In units of ln c and of exponents, centred."""
FIRST, UP, DOWN = 1e-3, 10.0, 5.0
"""Damping after a rejected step, its growth with more of them, its fall with accepted ones."""
MOST_DAMPING = 1e12
SCALE_FLOOR = 1e-3
"""Of a coefficient's curvature scale against the largest: a term that has all but vanished keeps
one, or its steps would be without bound."""
POSITIVE = 1e-12
"""Smallest eigenvalue of a scaled Hessian that counts as convex."""


@dataclass(frozen=True)
class Minima:
    """One row per replicate."""

    theta_RP: np.ndarray
    """Centred coefficients, see `PowerSum`."""
    objective_R: np.ndarray
    """Sum over runs of weight times Huber loss."""
    converged_R: np.ndarray
    steps_R: np.ndarray


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2 up to delta, delta (|r| - delta / 2) beyond (Huber 1964), elementwise."""
    inner = np.clip(residual, -delta, delta)
    return inner * (residual - inner / 2)


@dataclass
class _Point:
    """Objective and derivatives of a batch."""

    f_B: np.ndarray
    g_BP: np.ndarray
    H_BPP: np.ndarray
    """The Hessian."""
    M_BPP: np.ndarray
    """Sum of w min(1, delta / |r|) J J', positive: the curvature of the quadratic that touches the
    Huber loss at r from above. It steers where the Hessian is not convex."""

    @classmethod
    def unknown(cls, num_rows: int, num: int) -> "_Point":
        """Worse than any other."""
        square = np.zeros((2, num_rows, num, num))
        return cls(np.full(num_rows, np.inf), np.zeros((num_rows, num)), *square)

    def rows(self, rows_B: np.ndarray) -> "_Point":
        """Some of them."""
        return _Point(*(part[rows_B] for part in self._parts()))

    def joined(self, other: "_Point") -> "_Point":
        """These, then those of `other`."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return _Point(*(np.concatenate(pair) for pair in pairs))

    def _parts(self) -> tuple[np.ndarray, ...]:
        return self.f_B, self.g_BP, self.H_BPP, self.M_BPP

    def take(self, other: "_Point", rows_B: np.ndarray) -> None:
        """Replace those rows by `other`'s."""
        for own, theirs in zip(self._parts(), other._parts(), strict=True):
            own[rows_B] = theirs[rows_B]

    def step(self, damping_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The damped step, (B, P), and by how much the objective should fall without damping."""
        scale_BP = np.sqrt(np.einsum("bpp->bp", self.M_BPP)) + 1e-150
        scale_BP = np.maximum(scale_BP, SCALE_FLOOR * scale_BP.max(axis=1, keepdims=True))
        scale_BPP = scale_BP[:, :, None] * scale_BP[:, None, :]
        value_BP, vector_BPP = np.linalg.eigh(self.H_BPP / scale_BPP)
        bent_B = value_BP[:, 0] <= POSITIVE
        if bent_B.any():
            above_BPP = self.M_BPP[bent_B] / scale_BPP[bent_B]
            value_BP[bent_B], vector_BPP[bent_B] = np.linalg.eigh(above_BPP)
        value_BP = np.maximum(value_BP, POSITIVE / 10)
        along_BP = ((self.g_BP / scale_BP)[:, None] @ vector_BPP)[:, 0]
        expected_B = (along_BP**2 / value_BP).sum(axis=1) / 2
        along_BP /= value_BP + damping_B[:, None]
        step_BP = -(vector_BPP @ along_BP[..., None])[..., 0] / scale_BP
        longest_B = np.abs(step_BP).max(axis=1, keepdims=True) + 1e-300
        return step_BP * np.minimum(1.0, LONGEST_STEP / longest_B), expected_B


class Objective:
    """Objective, gradient and Hessian of one model and its losses."""

    def __init__(self, model: PowerSum, log_L_I: np.ndarray) -> None:
        self.model, self.log_L_I = model, log_L_I
        features_JP = model.features_PKI.reshape(len(model.names), -1).T
        num = features_JP.shape[1]
        self._upper = np.triu_indices(num)
        self._products_JM = features_JP[:, self._upper[0]] * features_JP[:, self._upper[1]]

    def values(self, theta_RP: np.ndarray, weights_RI: np.ndarray, delta: float) -> np.ndarray:
        """Objective of each row, (R,)."""
        residual_RI = self.model.ln_loss(theta_RP) - self.log_L_I
        return (weights_RI * huber(residual_RI, delta)).sum(axis=1)

    def at(self, theta_BP: np.ndarray, weights_BI: np.ndarray, delta_B: np.ndarray) -> _Point:
        """Value, gradient and Hessian sum w [(q - psi) J J' + psi sum_k p_k dt_k dt_k'].

        psi is the clipped residual, q whether it is not clipped, p_k the share of term k in L.
        """
        share_BKI = self.model.ln_terms(theta_BP)
        top_BI = share_BKI.max(axis=1)
        share_BKI -= top_BI[:, None]
        np.exp(share_BKI, out=share_BKI)
        total_BI = share_BKI.sum(axis=1)
        share_BKI /= total_BI[:, None]
        residual_BI = top_BI + np.log(total_BI) - self.log_L_I
        limit_B1 = delta_B[:, None]
        psi_BI = np.clip(residual_BI, -limit_B1, limit_B1)
        f_B = np.einsum("bi,bi->b", weights_BI * psi_BI, residual_BI - psi_BI / 2)
        jacobian_BPI = self._jacobian(share_BKI)
        pull_BI = weights_BI * psi_BI
        bend_BI = weights_BI * (psi_BI == residual_BI) - pull_BI
        g_BP = (jacobian_BPI @ pull_BI[..., None])[..., 0]
        H_BPP = (jacobian_BPI * bend_BI[:, None]) @ jacobian_BPI.transpose(0, 2, 1)
        near_BI = weights_BI * limit_B1 / np.maximum(np.abs(residual_BI), limit_B1)
        M_BPP = (jacobian_BPI * near_BI[:, None]) @ jacobian_BPI.transpose(0, 2, 1)
        share_BKI *= pull_BI[:, None]
        own_BM = share_BKI.reshape(len(theta_BP), -1) @ self._products_JM
        H_BPP[:, self._upper[0], self._upper[1]] += own_BM
        below = self._upper[0] != self._upper[1]
        H_BPP[:, self._upper[1][below], self._upper[0][below]] += own_BM[:, below]
        return _Point(f_B, g_BP, H_BPP, M_BPP)

    def slopes(self, theta_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ln L' - ln L of every run, (I,), and its gradient, (P, I))."""
        share_BKI = self.model.ln_terms(theta_P[None])
        ln_loss_BI = np.logaddexp.reduce(share_BKI, axis=1)
        jacobian_BPI = self._jacobian(np.exp(share_BKI - ln_loss_BI[:, None]))
        return ln_loss_BI[0] - self.log_L_I, jacobian_BPI[0]

    def _jacobian(self, share_BKI: np.ndarray) -> np.ndarray:
        num_rows, _, num_runs = share_BKI.shape
        jacobian_BPI = np.empty((num_rows, len(self.model.names), num_runs))
        for p, slots in enumerate(self.model.slots):
            if len(slots) != 1:
                jacobian_BPI[:, p] = 0.0  # a base that never varies has no slot
            for k, column_I in slots:
                part_BI = share_BKI[:, k] if column_I is None else share_BKI[:, k] * column_I
                if len(slots) == 1:
                    jacobian_BPI[:, p] = part_BI
                else:
                    jacobian_BPI[:, p] += part_BI
        return jacobian_BPI


def minimise(
    objective: Objective,
    weights_RI: np.ndarray,
    starts_RP: np.ndarray,
    deltas: tuple[float, ...],
) -> Minima:
    """The local minimum that each start leads to, to the last digits of the objective.

    Args:
        objective: the model with its losses.
        weights_RI: how often each run counts; one row for all replicates will do.
        starts_RP: centred.
        deltas: passed through in turn; the last one is the objective's. Coming from larger ones
            helps starts that are far off.
    """
    return _Newton(objective, np.atleast_2d(weights_RI), starts_RP, deltas).run()


class _Newton:
    """A batch of replicates at work; those that are done make place for those that wait."""

    def __init__(
        self,
        objective: Objective,
        weights_RI: np.ndarray,
        starts_RP: np.ndarray,
        deltas: tuple[float, ...],
    ) -> None:
        self._objective, self._weights_RI = objective, weights_RI
        self._shared = len(weights_RI) == 1
        self._deltas = np.array(deltas)
        num_rows, num = starts_RP.shape
        self._theta_RP = np.array(starts_RP, dtype=float)
        self._f_R = np.full(num_rows, np.nan)
        self._converged_R = np.zeros(num_rows, dtype=bool)
        self._steps_R = np.zeros(num_rows, dtype=int)
        self._batch = int(np.clip(BATCH_NUMBERS // (num * objective.model.num_runs), 16, 256))
        self._waiting = 0
        self._row_B = np.empty(0, dtype=int)
        self._stage_B = np.empty(0, dtype=int)
        self._damping_B = np.empty(0)
        self._trial_BP = np.empty((0, num))
        self._now = _Point.unknown(0, num)

    def run(self) -> Minima:
        self._refill(np.ones(0, dtype=bool))
        while len(self._row_B):
            self._step()
        return Minima(self._theta_RP, self._f_R, self._converged_R, self._steps_R)

    def _refill(self, keep_B: np.ndarray) -> None:
        """Drop the rows that are done and take in as many of those that wait."""
        num_new = min(self._batch - int(keep_B.sum()), len(self._theta_RP) - self._waiting)
        new = np.arange(self._waiting, self._waiting + num_new)
        self._waiting += num_new
        num = self._theta_RP.shape[1]
        self._row_B = np.concatenate([self._row_B[keep_B], new])
        self._stage_B = np.concatenate([self._stage_B[keep_B], np.zeros(num_new, dtype=int)])
        self._damping_B = np.concatenate([self._damping_B[keep_B], np.zeros(num_new)])
        self._trial_BP = np.concatenate([self._trial_BP[keep_B], self._theta_RP[new]])
        self._now = self._now.rows(keep_B).joined(_Point.unknown(num_new, num))
        rows_B = np.zeros_like(self._row_B) if self._shared else self._row_B
        self._weights_BI = self._weights_RI[rows_B]

    def _step(self) -> None:
        """Judge the trial points, go on from the better of old and new, end what has converged."""
        found = self._objective.at(self._trial_BP, self._weights_BI, self._deltas[self._stage_B])
        better_B = found.f_B < self._now.f_B
        self._theta_RP[self._row_B[better_B]] = self._trial_BP[better_B]
        self._now.take(found, better_B)
        self._steps_R[self._row_B] += 1
        self._damping_B = np.where(
            better_B,
            np.where(self._damping_B > FIRST**2, self._damping_B / DOWN, 0.0),
            np.maximum(self._damping_B * UP, FIRST),
        )
        step_BP, expected_B = self._now.step(self._damping_B)
        self._trial_BP = self._theta_RP[self._row_B] + step_BP
        self._end(expected_B)

    def _end(self, expected_B: np.ndarray) -> None:
        last_B = self._stage_B == len(self._deltas) - 1
        scale_B = self._now.f_B + EXACT * self._weights_BI.sum(axis=1)
        close_B = expected_B <= np.where(last_B, TOLERANCE, ROUGH) * scale_B
        tired_B = self._steps_R[self._row_B] >= MAX_STEPS
        tired_B |= self._damping_B > MOST_DAMPING
        onward_B = (close_B | tired_B) & ~last_B
        self._stage_B[onward_B] += 1
        self._damping_B[onward_B] = 0.0
        self._now.f_B[onward_B] = np.inf
        self._trial_BP[onward_B] = self._theta_RP[self._row_B[onward_B]]
        done_B = (close_B | tired_B) & last_B
        if done_B.any():
            rows = self._row_B[done_B]
            self._f_R[rows] = self._now.f_B[done_B]
            self._converged_R[rows] = close_B[done_B]
            self._refill(~done_B)
