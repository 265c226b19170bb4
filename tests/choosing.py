"""Studies with a known surface that choose their sizes, for tests."""

import math
import random

from peer_scaling.adaptive import replay
from peer_scaling.candidates import Adaptive, Candidate, Observation

BUDGETS = (1e15, 4e15)
VARIANTS = ("dense", "peer")
SIZES = tuple(f"d{i}" for i in range(30))
CONFIG = Adaptive(SIZES, target_size=0.1, target_loss=0.01)


def candidates(problems=(), budgets=BUDGETS, variants=VARIANTS, sizes=SIZES):
    """A ladder from N = 1e5, a factor of 1.3 apart; the rule's minimum is near d13 at 1e15."""
    found = []
    for variant in variants:
        for budget in budgets:
            for i, size in enumerate(sizes):
                N = 1e5 * 1.3**i
                problem = "too few steps" if (variant, budget, size) in problems else None
                found.append(
                    Candidate(variant, budget, size, N, budget / 6 / N**2, budget, problem)
                )
    return found


class Oracle:
    """Losses of a known surface with noise that depends on the run alone."""

    def __init__(self, at=20.0, noise=0.004, failing=()):
        self.at, self.noise, self.failing = at, noise, set(failing)

    def log_N(self, variant, budget):
        return 0.5 * math.log(budget / 6 / self.at) + (0.4 if variant == "peer" else 0.0)

    def __call__(self, key):
        variant, budget, size, _ = key
        if key in self.failing or key[:3] in self.failing or size in self.failing:
            return Observation(*key, None)
        x = math.log(1e5 * 1.3 ** int(size[1:])) - self.log_N(variant, budget)
        loss = 2 + 0.4 * math.exp(-0.34 * x) + 0.35 * math.exp(0.37 * x)
        return Observation(*key, loss + self.noise * random.Random(repr(key)).gauss(0, 1))


def study(oracle, config=CONFIG, given_candidates=None):
    """All decisions of a study that runs to its end."""
    return [d for r in replay(config, given_candidates or candidates(), oracle) for d in r]


def of(decisions, *actions):
    return [d for d in decisions if d.action in actions]
