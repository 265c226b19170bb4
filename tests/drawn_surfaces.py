"""Studies drawn at random from known surfaces L = E + A / N^alpha + B / D^beta, good ones and bad.

Nothing here is fitted; every draw has a private generator.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

BUDGETS = (1e18, 1e19, 1e20)
MIDDLE = 3e8
"""N* at the middle budget."""


@dataclass(frozen=True)
class Law:
    """A surface whose minima are known in closed form."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, C):
        return self.E + self.A / N**self.alpha + self.B / (C / (6 * N)) ** self.beta

    def best(self, C):
        """N* of C = 6 N D (Hoffmann et al. 2022, equation 4)."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        total = self.alpha + self.beta
        return ratio ** (1 / total) * (C / 6) ** (self.beta / total)


CHINCHILLA = Law(1.69, 406.4, 410.7, 0.34, 0.28)
ASYMMETRIC = Law(1.69, 406.4, 410.7, 0.465, 0.155)
"""The two surfaces of Open-Athena (2603.22339) on which parabolas are off."""


@dataclass(frozen=True)
class Cell:
    """One budget of a drawn study: its truth, and what is wrong with it."""

    N_star: float
    fault: str
    """One of `FAULTS`."""
    skew: float
    seeds: int


def draw_law(rng):
    """E 1.6 to 2, reducible loss 0.6 to 1.4 at the middle budget, exponents 0.25 to 0.45."""
    alpha, beta = rng.uniform(0.25, 0.45, 2)
    E, reducible = rng.uniform(1.6, 2.0), rng.uniform(0.6, 1.4)
    D = BUDGETS[1] / (6 * MIDDLE)
    A = reducible * beta / (alpha + beta) * MIDDLE**alpha
    return Law(E, A, reducible * alpha / (alpha + beta) * D**beta, alpha, beta)


def draw_study(seed):
    """A study of one variant at three budgets: (rows, {budget: Cell}).

    6 to 9 sizes over a factor of 3 to 8 to both sides of a centre that is off N* and drifts over
    the budgets by up to 1.5 times each; one seed or three, with an effect of its own at all sizes;
    noise of 0.001 to 0.004 nats. Per budget one of five faults, or none: a run that is 10 to 40
    standard deviations too high, a minimum up to 4 times beyond an end, losses upside down, one to
    four sizes, a valley a tenth as deep as the noise.
    """
    rng = np.random.default_rng(seed)
    law, noise = draw_law(rng), np.exp(rng.uniform(*np.log([0.001, 0.004])))
    seeds, num_sizes = int(rng.choice([1, 3])), int(rng.integers(6, 10))
    half = rng.uniform(*np.log([3.0, 8.0]))
    off, drift = rng.uniform(-0.4, 0.4, 2)
    frames, cells = [], {}
    for k, C in enumerate(BUDGETS):
        fault = str(rng.choice(FAULTS, p=SHARES))
        N_star = law.best(C)
        centre = off + (k - 1) * drift / 2
        if fault == "edge":
            centre = rng.choice([-1, 1]) * (half + rng.uniform(0, np.log(4)))
        x = centre + np.linspace(-half, half, num_sizes)
        if fault == "few":
            x = rng.choice(x, int(rng.integers(1, 5 if seeds == 1 else 4)), replace=False)
        N = N_star * np.exp(np.sort(x))
        loss = law.loss(N, C)
        if fault == "concave":
            loss = 2 * loss.min() - loss + (loss.max() - loss.min())
        if fault == "flat":
            loss = loss.mean() + (loss - loss.mean()) * noise / (10 * np.ptp(loss))
        frames.append(_rows(C, N, loss, noise, seeds, fault == "outlier", rng))
        cells[C] = Cell(N_star, fault, law.beta - law.alpha, seeds)
    return pd.concat(frames, ignore_index=True), cells


FAULTS = ("none", "outlier", "edge", "concave", "few", "flat")
SHARES = (0.55, 0.15, 0.15, 0.05, 0.05, 0.05)


def _rows(C, N, loss, noise, seeds, outlier, rng):
    """Seeds share their data: what is common to a seed's runs is twice the noise."""
    common = rng.normal(0, 2 * noise, seeds)
    drawn = loss[:, None] + common + rng.normal(0, noise, (len(N), seeds))
    if outlier:
        at = int(rng.integers(1, len(N) - 1)), int(rng.integers(seeds))
        drawn[at] += noise * rng.uniform(10, 40)
    size = np.repeat(np.arange(len(N)), seeds)
    N_U = N[size]
    return pd.DataFrame(
        {
            "variant": "dense", "budget": C, "num_params_total": N_U, "num_params_active": N_U,
            "tokens": C / (6 * N_U), "loss": drawn.ravel(), "seed": np.tile(np.arange(seeds), len(N)),
        }
    )  # fmt: skip
