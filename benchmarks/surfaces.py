"""Studies with a known truth, for benchmarks of how sizes are chosen: nothing is trained."""

import math
from dataclasses import dataclass

import numpy as np

from peer_scaling.candidates import Candidate, Key, Observation

BUDGETS = (1e18, 4e18, 1.6e19)
VARIANTS = ("a", "b", "c", "d")
LADDER = 44
"""Sizes, a factor of about 1.28 apart."""
MAX_SEEDS = 12
TOKENS_PER_PARAM = 20.0


@dataclass(frozen=True)
class Surface:
    """What a variant's runs would cost and reach without noise."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    attention: float
    """Share of the cost of attention at `middle` in that of the rest."""
    middle: float

    def tokens(self, budget: float, N: np.ndarray) -> np.ndarray:
        """Training tokens that a budget buys."""
        return budget / (6 * N * (1 + self.attention * (self.middle / N) ** (1 / 3)))

    def loss(self, budget: float, N: np.ndarray) -> np.ndarray:
        """Nats."""
        return self.E + self.A / N**self.alpha + self.B / self.tokens(budget, N) ** self.beta

    def minimum(self, budget: float) -> tuple[float, float]:
        """(ln N*, L*), the first within 1e-3."""
        log_N = math.log(self.middle) + np.arange(-8, 8, 1e-3)
        loss = self.loss(budget, np.exp(log_N))
        return float(log_N[loss.argmin()]), float(loss.min())


@dataclass(frozen=True)
class Draw:
    """A study with its truth, and the losses of all runs that could be made."""

    candidates: tuple[Candidate, ...]
    truth: dict[tuple[str, float], tuple[float, float]]
    losses: dict[tuple[str, float, str], np.ndarray]

    def observe(self, key: Key) -> Observation:
        """What a run would bring."""
        return Observation(*key, float(self.losses[key[:3]][key[3]]))


def make_draw(rng: np.random.Generator, prior_error: float) -> Draw:
    """A random study: exponents 0.25 to 0.45, noise 0.003 to 0.01 nats, tokens per parameter at the
    minimum a factor exp(`prior_error`) from the rule's, and half of that between variants (standard
    deviations of the logarithm).
    """
    alpha, beta = rng.uniform(0.25, 0.45, 2)
    E, reducible = rng.uniform(1.6, 2.0), rng.uniform(0.6, 1.4)
    log_ratio, noise = (
        rng.normal(0, prior_error),
        math.exp(rng.uniform(math.log(0.003), math.log(0.01))),
    )
    attention = float(rng.choice([0.0, 0.4]))
    middle = math.sqrt(BUDGETS[1] / 6 / TOKENS_PER_PARAM)
    log_N = (
        math.log(middle)
        + 0.25 * (np.arange(LADDER) - LADDER / 2)
        + rng.uniform(-0.06, 0.06, LADDER)
    )
    sizes_N = np.exp(log_N)
    candidates, truth, losses = [], {}, {}
    for variant in VARIANTS:
        own = alpha + rng.normal(0, 0.02), beta + rng.normal(0, 0.02)
        ratio = TOKENS_PER_PARAM * math.exp(log_ratio + rng.normal(0, prior_error / 2))
        surface = _surface(E, reducible * (1 + rng.normal(0, 0.05)), own, ratio, attention, middle)
        for budget in BUDGETS:
            truth[variant, budget] = surface.minimum(budget)
            expected = surface.loss(budget, sizes_N)
            ratios = surface.tokens(budget, sizes_N) / sizes_N
            for i, N in enumerate(sizes_N):
                own_noise = rng.normal(0, noise, MAX_SEEDS)
                losses[variant, budget, f"s{i}"] = expected[i] + own_noise
                candidates.append(Candidate(variant, budget, f"s{i}", N, ratios[i], budget))
    return Draw(tuple(candidates), truth, losses)


def _surface(
    E: float, reducible: float, exponents: tuple[float, float], ratio: float, attention: float,
    middle: float,
) -> Surface:  # fmt: skip
    """With its minimum at the middle budget where tokens over parameters are about `ratio`."""
    alpha, beta = exponents
    N = math.sqrt(BUDGETS[1] / 6 / ratio)
    D = N * ratio
    A = reducible * beta / (alpha + beta) * N**alpha
    B = reducible * alpha / (alpha + beta) * D**beta
    return Surface(E, A, alpha, B, beta, attention, middle)
