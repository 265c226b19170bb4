"""Chosen sizes against fixed ladders: the FLOPs for the same accuracy, where the truth is known.

    python -m benchmarks.adaptive [--quick]

Nothing is trained. A draw is a study of four variants at three budgets (1, 4, 16): each variant has
a surface L = E + A / N^alpha + B / D^beta, half of the draws pay for attention beside 6 N D, and every
run has Gaussian noise. Both ways centre their first ladder by the same rule, 20 tokens per parameter,
which is wrong by a factor that differs between draws and variants. Both are fitted by
`peer_scaling.curves`; a curve without a bracketed minimum answers with its best size.

Fixed ladders have their sizes at every budget, and 1 to 12 seeds each. The adaptive study stops by
its targets. `FLOPs` of a ladder are those, interpolated over its seeds, at which it is as accurate
as the adaptive study; errors are root mean squares over draws, variants and budgets of ln N*, and
over pairs of variants of the gap between their minimum losses. Intervals: 90 %, bootstrap of draws.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from peer_scaling.adaptive import replay
from peer_scaling.candidates import Adaptive, Candidate, Key, Observation
from peer_scaling.chooser import Curve, coarse_ladder
from peer_scaling.display import table_text
from peer_scaling.tiers import make_tiers

BUDGETS = (1e18, 4e18, 1.6e19)
VARIANTS = ("a", "b", "c", "d")
LADDER = 44
"""Sizes, a factor of about 1.28 apart."""
MAX_SEEDS = 12
SEEDS = (1, 2, 3, 4, 6, 8, 12)
SHAPES = ((5, 2.0), (7, 2.0), (9, 2.0), (7, 2**0.5), (9, 2**0.5), (13, 2**0.5))
"""Sizes of a fixed ladder, and the factor in N between them."""
TARGETS = ((0.3, 0.03), (0.2, 0.02), (0.1, 0.01), (0.07, 0.007), (0.05, 0.005))
"""Half widths of ln N* and of the loss, nats."""
TOKENS_PER_PARAM = 20.0
RESAMPLES = 1000


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


@dataclass(frozen=True)
class Score:
    """What a way of choosing costs and brings, per draw."""

    flops: np.ndarray
    size: np.ndarray
    """Mean square error of ln N*."""
    gap: np.ndarray
    """Mean square error of the loss gaps, nats^2."""
    lost: np.ndarray
    """Share of the curves without a bracketed minimum."""

    def take(self, index: np.ndarray) -> "Score":
        """Some of the draws."""
        return Score(self.flops[index], self.size[index], self.gap[index], self.lost[index])

    def rms(self, of: str) -> float:
        """Root mean square of `size` or `gap`."""
        return math.sqrt(getattr(self, of).mean())


def make_draw(rng: np.random.Generator) -> Draw:
    """A random study: exponents 0.25 to 0.45, noise 0.003 to 0.01 nats, tokens per parameter at the
    minimum a factor e (one standard deviation) from the rule's, and 1.6 more between variants.
    """
    alpha, beta = rng.uniform(0.25, 0.45, 2)
    E, reducible = rng.uniform(1.6, 2.0), rng.uniform(0.6, 1.4)
    log_ratio, noise = rng.normal(0, 1.0), math.exp(rng.uniform(math.log(0.003), math.log(0.01)))
    attention = float(rng.choice([0.0, 0.4]))
    middle = math.sqrt(BUDGETS[1] / 6 / TOKENS_PER_PARAM)
    log_N = math.log(middle) + 0.25 * (np.arange(LADDER) - LADDER / 2) + rng.uniform(-0.06, 0.06, LADDER)
    sizes_N = np.exp(log_N)
    candidates, truth, losses = [], {}, {}
    for variant in VARIANTS:
        own = alpha + rng.normal(0, 0.02), beta + rng.normal(0, 0.02)
        ratio = TOKENS_PER_PARAM * math.exp(log_ratio + rng.normal(0, 0.5))
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


def adaptive_runs(draw: Draw, config: Adaptive) -> list[Observation]:
    """The runs that the adaptive study makes."""
    rounds = replay(config, draw.candidates, draw.observe)
    return [draw.observe(d.key) for decided in rounds for d in decided if d.key]


def fixed_runs(draw: Draw, config: Adaptive, num_sizes: int) -> list[tuple[str, float, str]]:
    """The cells of a fixed ladder, centred by the rule."""
    cells = []
    for tier in make_tiers(config, draw.candidates, {}):
        for curve in tier.curves:
            ladder = coarse_ladder(curve, _by_rule(curve), num_sizes)
            cells += [(curve.variant, tier.budget, size.size) for size in ladder]
    return cells


def _by_rule(curve: Curve) -> float:
    pairs = sorted((math.log(c.tokens_per_param), c.log_N) for c in curve.candidates)
    return float(np.interp(math.log(TOKENS_PER_PARAM), *zip(*pairs, strict=True)))


def score(draw: Draw, config: Adaptive, runs: Sequence[Observation]) -> tuple[float, ...]:
    """(FLOPs, squared error of ln N*, of the gaps, share of curves without a minimum)."""
    known = {run.key: run for run in runs}
    size, gap, lost = [], [], []
    for tier in make_tiers(config, draw.candidates, known):
        wrong = []
        for curve in tier.curves:
            log_N, loss = draw.truth[curve.variant, tier.budget]
            found = curve.minimum if curve.bracketed else None
            best = curve.best
            assert best is not None
            answer = (found.log_N, found.loss) if found else (best.log_N, curve.mean_loss(best))
            size.append((answer[0] - log_N) ** 2)
            wrong.append(answer[1] - loss)
            lost.append(found is None)
        gap += [(one - other) ** 2 for one, other in combinations(wrong, 2)]
    return sum(run.budget for run in runs), *(float(np.mean(v)) for v in (size, gap, lost))


def measure(
    draws: Sequence[Draw], config: Adaptive, runs: Callable[[Draw], list[Observation]]
) -> Score:
    """One way of choosing on all draws."""
    columns = zip(*(score(draw, config, runs(draw)) for draw in draws), strict=True)
    return Score(*(np.array(column) for column in columns))


def fixed_scores(draws: Sequence[Draw], shape: tuple[int, float], seeds: Sequence[int]) -> list[Score]:
    """A fixed ladder with each number of seeds."""
    num_sizes, spacing = shape
    config = _config(start=num_sizes, spacing=spacing)

    def runs(num_seeds: int) -> Callable[[Draw], list[Observation]]:
        return lambda draw: [
            draw.observe((*cell, seed))
            for cell in fixed_runs(draw, config, num_sizes)
            for seed in range(num_seeds)
        ]

    return [measure(draws, config, runs(num_seeds)) for num_seeds in seeds]


def flops_for(ladder: Sequence[Score], of: str, error: float) -> float:
    """What a fixed ladder must cost to be as accurate; infinite if no number of seeds is enough."""
    flops = np.log([score.flops.mean() for score in ladder])
    errors = np.minimum.accumulate([math.log(score.rms(of)) for score in ladder])
    if errors[-1] > math.log(error):
        return math.inf
    return math.exp(np.interp(-math.log(error), -errors, flops))


def _config(**own: object) -> Adaptive:
    sizes = tuple(f"s{i}" for i in range(LADDER))
    return Adaptive(sizes, **{"max_seeds": MAX_SEEDS, "ladders": 30.0, **own})  # type: ignore[arg-type]


def interval(values: Sequence[float]) -> str:
    """90 %, of resampled values."""
    low, high = np.quantile(values, (0.05, 0.95), method="nearest")
    return f"{low:.2f} to {high:.2f}"


def main() -> None:
    """Print the tables and the JSON line."""
    arguments = _arguments()
    rng = np.random.Generator(np.random.Philox(key=arguments.seed))
    draws = [make_draw(rng) for _ in range(arguments.draws)]
    seeds = (1, 2, 4) if arguments.quick else SEEDS
    ladders = {shape: fixed_scores(draws, shape, seeds) for shape in SHAPES}
    _print_scores(ladders, seeds)
    ratios: dict[str, float] = {}
    resamples = [rng.integers(len(draws), size=len(draws)) for _ in range(RESAMPLES)]
    for target in TARGETS:
        config = _config(target_size=target[0], target_loss=target[1])
        found = measure(draws, config, lambda draw, config=config: adaptive_runs(draw, config))
        ratios |= _print_comparison(target, found, ladders, resamples)
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


def _row(name: str, found: Score) -> list[str]:
    coarse = sum(BUDGETS) * len(VARIANTS)
    return [
        name,
        f"{found.flops.mean() / coarse:.2f}",
        f"{np.median(found.flops) / coarse:.2f}",
        f"{found.rms('size'):.4f}",
        f"{np.sqrt(np.median(found.size)):.4f}",
        f"{found.rms('gap'):.5f}",
        f"{np.sqrt(np.median(found.gap)):.5f}",
        f"{found.lost.mean():.1%}",
    ]


HEADER = ("", "runs/curve", "median", "rms ln N*", "median", "rms gap", "median", "no minimum")


def _print_scores(ladders: dict[tuple[int, float], list[Score]], seeds: Sequence[int]) -> None:
    rows = [
        _row(f"{n} sizes x {spacing:.3g}, {s} seeds", found)
        for (n, spacing), scores in ladders.items()
        for s, found in zip(seeds, scores, strict=True)
    ]
    print(table_text(HEADER, rows))


def _print_comparison(
    target: tuple[float, float],
    found: Score,
    ladders: dict[tuple[int, float], list[Score]],
    resamples: list[np.ndarray],
) -> dict[str, float]:
    print(table_text(HEADER, [_row(f"adaptive, {target[0]:g} and {target[1]:g} nats", found)]))
    ratios = {}
    rows = []
    samples = [found.take(index) for index in resamples]
    for (n, spacing), scores in ladders.items():
        row = [f"{n} sizes x {spacing:.3g}"]
        taken = [[score.take(index) for score in scores] for index in resamples]
        for of in ("size", "gap"):
            ratio = flops_for(scores, of, found.rms(of)) / found.flops.mean()
            spread = [
                flops_for(own, of, sample.rms(of)) / sample.flops.mean()
                for own, sample in zip(taken, samples, strict=True)
            ]
            ratios[f"{of}_{target[0]:g}_{n}x{spacing:.3g}"] = ratio
            row += [f"{ratio:.2f}", interval(spread)]
        rows.append(row)
    columns = ("FLOPs over adaptive", "for ln N*", "90 %", "for the gap", "90 %")
    print(table_text(columns, rows))
    return ratios


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--draws", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.draws = arguments.draws or (20 if arguments.quick else 200)
    return arguments


if __name__ == "__main__":
    main()
