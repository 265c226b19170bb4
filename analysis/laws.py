"""The laws that are fitted, as pure functions, apart from how they are fitted.

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token.
"""

from typing import TypeVar

import numpy as np

Values = TypeVar("Values", float, np.ndarray)


def parabola(coefficients: tuple[float, float, float], log_N: Values) -> Values:
    """L(N) at fixed C: a (ln N)^2 + b ln N + c (Hoffmann et al. 2022, 2203.15556, approach 2)."""
    a, b, c = coefficients
    return (a * log_N + b) * log_N + c


def parabola_vertex(coefficients: tuple[float, float, float]) -> tuple[float, float]:
    """(ln N*, L*): where `parabola` is stationary, and its value there."""
    a, b, c = coefficients
    return -b / (2 * a), c - b * b / (4 * a)


def power_law(log_coefficient: float, exponent: float, C: np.ndarray | float) -> np.ndarray:
    """exp(log_coefficient) C^exponent, for N*(C), D*(C) and L*(C)."""
    return np.exp(log_coefficient + exponent * np.log(C))
