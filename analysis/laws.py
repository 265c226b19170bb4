"""The laws that are fitted, as pure functions, apart from how they are fitted.

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token.
"""

import numpy as np


def power_law(log_coefficient: float, exponent: float, C: np.ndarray | float) -> np.ndarray:
    """exp(log_coefficient) C^exponent, for N*(C), D*(C) and L*(C)."""
    return np.exp(log_coefficient + exponent * np.log(C))
