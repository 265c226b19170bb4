"""Curves through the sizes of one isoFLOP profile, in all replicates at once: loss against ln N.

Every curve is a parabola, a cubic or an Akima interpolant. Positions are ln N less a centre that
the caller chooses; losses are nats per token.

Shape legend: I sizes, J sizes that are not at an end, K coefficients, M pieces, P points, R
replicates.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import final

import numpy as np
from scipy.interpolate import Akima1DInterpolator


class Shape(StrEnum):
    """Kinds of curve, the simplest first."""

    PARABOLA = "parabola"
    CUBIC = "cubic"
    AKIMA = "akima"


@dataclass(frozen=True, eq=False)
class Minima:
    """Where curves are lowest; NaN where a curve is not convex or its minimum not bracketed."""

    x_R: np.ndarray
    loss_R: np.ndarray


class Curve(ABC):
    """A way to draw a curve through points."""

    @property
    @abstractmethod
    def free(self) -> int:
        """Coefficients that are fitted; for an interpolant, those of a cubic."""

    @abstractmethod
    def minima(self, x_I: np.ndarray, loss_RI: np.ndarray, weight_I: np.ndarray) -> Minima:
        """The minimum of every replicate over the range of x."""

    @abstractmethod
    def left_out(self, x_I: np.ndarray, loss_RI: np.ndarray, weight_I: np.ndarray) -> np.ndarray:
        """Error of the curve through the other sizes at every size but the first and last, (R, J):
        beyond its ends, an interpolant says nothing.
        """

    @abstractmethod
    def values(
        self, x_I: np.ndarray, loss_I: np.ndarray, weight_I: np.ndarray, at_P: np.ndarray
    ) -> np.ndarray:
        """The curve through loss_I at other positions, (P,)."""


@final
@dataclass(frozen=True)
class Polynomial(Curve):
    """Weighted least squares, of degree 2 or 3."""

    degree: int

    @property
    def free(self) -> int:
        """Powers and a constant."""
        return self.degree + 1

    def minima(self, x_I: np.ndarray, loss_RI: np.ndarray, weight_I: np.ndarray) -> Minima:
        """Of the polynomial."""
        return lowest(loss_RI @ self.solver(x_I, weight_I).T, x_I[0], x_I[-1])

    def left_out(self, x_I: np.ndarray, loss_RI: np.ndarray, weight_I: np.ndarray) -> np.ndarray:
        """Through the leverage: nothing is fitted again."""
        hat_II = self._powers(x_I) @ self.solver(x_I, weight_I)
        residual_RI = loss_RI @ hat_II.T - loss_RI
        return (residual_RI / (1 - np.diag(hat_II)))[:, 1:-1]

    def values(
        self, x_I: np.ndarray, loss_I: np.ndarray, weight_I: np.ndarray, at_P: np.ndarray
    ) -> np.ndarray:
        """Of the polynomial."""
        return self._powers(at_P) @ (self.solver(x_I, weight_I) @ loss_I)

    def solver(self, x_I: np.ndarray, weight_I: np.ndarray) -> np.ndarray:
        """From losses to coefficients, the constant first, (K, I)."""
        root_I = np.sqrt(weight_I)
        return np.linalg.pinv(self._powers(x_I) * root_I[:, None]) * root_I

    def _powers(self, x_P: np.ndarray) -> np.ndarray:
        return np.vander(x_P, self.degree + 1, increasing=True)


@final
class Akima(Curve):
    """A smooth curve through every point, which no point far off bends (Akima 1970)."""

    @property
    def free(self) -> int:
        """Of a cubic."""
        return 4

    def minima(self, x_I: np.ndarray, loss_RI: np.ndarray, weight_I: np.ndarray) -> Minima:
        """Of the one valley; with several, the noise would choose between them."""
        pieces_4MR = _akima(x_I, loss_RI).c
        cubic_4MR = pieces_4MR[::-1]  # the constant first
        width_M1 = np.diff(x_I)[:, None]
        offset_MR, loss_MR = stationary(cubic_4MR)
        inside_MR = (offset_MR >= 0) & (offset_MR < width_M1)
        loss_MR = np.where(inside_MR, loss_MR, np.inf)
        lowest_R = loss_MR.argmin(axis=0)
        columns_R = np.arange(len(loss_RI))
        x_R = x_I[lowest_R] + offset_MR[lowest_R, columns_R]
        loss_R = loss_MR[lowest_R, columns_R]
        valid_R = (inside_MR.sum(axis=0) == 1) & (loss_R < loss_RI[:, [0, -1]].min(axis=1))
        return Minima(np.where(valid_R, x_R, np.nan), np.where(valid_R, loss_R, np.nan))

    def left_out(self, x_I: np.ndarray, loss_RI: np.ndarray, weight_I: np.ndarray) -> np.ndarray:
        """Drawn again without each size."""
        columns = []
        for i in range(1, len(x_I) - 1):
            others = np.arange(len(x_I)) != i
            predicted_R = _akima(x_I[others], loss_RI[:, others])(x_I[i])
            columns.append(predicted_R - loss_RI[:, i])
        return np.stack(columns, axis=1)

    def values(
        self, x_I: np.ndarray, loss_I: np.ndarray, weight_I: np.ndarray, at_P: np.ndarray
    ) -> np.ndarray:
        """Between the first size and the last."""
        return _akima(x_I, loss_I[None])(at_P)[:, 0]


CURVES: dict[Shape, Curve] = {
    Shape.PARABOLA: Polynomial(2),
    Shape.CUBIC: Polynomial(3),
    Shape.AKIMA: Akima(),
}


def _akima(x_I: np.ndarray, loss_RI: np.ndarray) -> Akima1DInterpolator:
    return Akima1DInterpolator(x_I, loss_RI.T)


def lowest(coefficients_RK: np.ndarray, low: float, high: float) -> Minima:
    """Minima of polynomials of degree 2 or 3, the constant first, between two positions.

    A cubic counts if its local minimum is also lower than both ends.
    """
    full_R4 = np.pad(coefficients_RK, ((0, 0), (0, 4 - coefficients_RK.shape[1])))
    x_R, loss_R = stationary(full_R4.T)
    ends_2R = np.vander([low, high], 4, increasing=True) @ full_R4.T
    valid_R = (low < x_R) & (x_R < high) & (loss_R < ends_2R.min(axis=0))
    return Minima(np.where(valid_R, x_R, np.nan), np.where(valid_R, loss_R, np.nan))


def stationary(cubic_4X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position, value) of the local minimum of cubics, the constant first; NaN without one.

    The root of the derivative at which the second derivative, 2 sqrt(c2^2 - 3 c3 c1), is positive,
    in the form that stays exact when c3 vanishes.
    """
    c0, c1, c2, c3 = cubic_4X
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        x = -c1 / (c2 + np.sqrt(c2**2 - 3 * c3 * c1))
        value = c0 + x * (c1 + x * (c2 + x * c3))
    missing = ~np.isfinite(x)
    return np.where(missing, np.nan, x), np.where(missing, np.nan, value)
