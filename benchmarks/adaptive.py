"""Chosen sizes against fixed ladders: the FLOPs for the same accuracy, where the truth is known.

    python -m benchmarks.adaptive [--quick] [--prior-error 1.0]

Nothing is trained. A draw is a study of four variants at three budgets (1, 4, 16): each variant
has a surface L = E + A / N^alpha + B / D^beta, half of the draws pay for attention beside 6 N D,
and every run has Gaussian noise. Both ways centre their first ladder by the same rule, 20 tokens
per parameter, which is wrong by a factor that differs between draws and variants. Both are fitted
by `peer_scaling.curves`; a curve without a bracketed minimum answers with its best size; `parabola`
is what a plain parabola through the same runs would have answered for ln N*.

Fixed ladders have their sizes at every budget, and 1 to 12 seeds each. The adaptive study stops by
its targets. Errors are root mean squares over draws, variants and budgets of ln N*, and over pairs
of variants of the gap between their minimum losses; `p90` is the 90th percentile over draws. The
second table has the FLOPs, interpolated over its seeds, at which a ladder is as accurate as the
adaptive study, over the latter's; a ladder costs at least one seed, whatever that is good for.
`never`: no number of seeds is enough. Intervals: 90 %, bootstrap of draws.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.surfaces import (
    BUDGETS,
    LADDER,
    MAX_SEEDS,
    TOKENS_PER_PARAM,
    VARIANTS,
    Draw,
    make_draw,
)
from peer_scaling.adaptive import replay
from peer_scaling.candidates import Adaptive, Observation
from peer_scaling.chooser import Curve, coarse_ladder
from peer_scaling.display import table_text
from peer_scaling.tiers import log_N_at, make_tiers

SEEDS = (1, 2, 3, 4, 6, 8, 12)
SHAPES = ((5, 2.0), (5, 2.8), (7, 2.0), (9, 2.0), (9, 1.41), (13, 1.41))
"""Sizes of a fixed ladder, and the factor in N between them."""
TARGETS = ((0.3, 0.03), (0.1, 0.01), (0.05, 0.005), (1.0, 0.005), (0.05, 0.1))
"""Half widths of ln N* and of the loss, nats."""
RESAMPLES = 400


@dataclass(frozen=True)
class Score:
    """What a way of choosing costs and brings, per draw."""

    flops: np.ndarray
    size: np.ndarray
    """Mean square error of ln N*."""
    gap: np.ndarray
    """Mean square error of the loss gaps, nats^2."""
    parabola: np.ndarray
    """Mean square error of ln N* of a plain parabola."""
    lost: np.ndarray
    """Share of the curves without a bracketed minimum."""

    def take(self, index: np.ndarray) -> "Score":
        """Some of the draws."""
        return Score(*(getattr(self, column.name)[index] for column in fields(self)))

    def rms(self, of: str) -> float:
        """Root mean square over draws."""
        return math.sqrt(getattr(self, of).mean())

    def p90(self, of: str) -> float:
        """90th percentile over draws of their root mean square."""
        return math.sqrt(np.quantile(getattr(self, of), 0.9))


def adaptive_runs(draw: Draw, config: Adaptive) -> list[Observation]:
    """The runs that the adaptive study makes."""
    rounds = replay(config, draw.candidates, draw.observe)
    return [draw.observe(d.key) for decided in rounds for d in decided if d.key]


def fixed_runs(draw: Draw, config: Adaptive, num_sizes: int) -> list[tuple[str, float, str]]:
    """The cells of a fixed ladder, centred by the rule."""
    cells = []
    for tier in make_tiers(config, draw.candidates, {}):
        for curve in tier.curves:
            ladder = coarse_ladder(curve, log_N_at(curve, math.log(TOKENS_PER_PARAM)), num_sizes)
            cells += [(curve.variant, tier.budget, size.size) for size in ladder]
    return cells


def score(draw: Draw, config: Adaptive, runs: Sequence[Observation]) -> tuple[float, ...]:
    """The columns of `Score`."""
    known = {run.key: run for run in runs}
    size, gap, parabola, lost = [], [], [], []
    for tier in make_tiers(config, draw.candidates, known):
        wrong = []
        for curve in tier.curves:
            log_N, loss = draw.truth[curve.variant, tier.budget]
            found = curve.minimum if curve.bracketed else None
            best = curve.best
            assert best is not None
            lowest = curve.mean_loss(best)
            assert lowest is not None
            size.append(((found or best).log_N - log_N) ** 2)
            wrong.append((found.loss if found else lowest) - loss)
            parabola.append((_parabola_vertex(curve) - log_N) ** 2)
            lost.append(found is None)
        gap += [(one - other) ** 2 for one, other in combinations(wrong, 2)]
    columns = size, gap, parabola, lost
    return sum(run.budget for run in runs), *(float(np.mean(column)) for column in columns)


def _parabola_vertex(curve: Curve) -> float:
    """Ln N* of a least-squares parabola, at most at the end of what was run."""
    x_P = curve.points.log_N_P
    a, b, _ = np.polyfit(x_P - x_P.mean(), curve.points.loss_P, 2)
    vertex = x_P.mean() - b / (2 * a) if a > 0 else math.inf
    return float(np.clip(vertex, x_P.min(), x_P.max()))


def measure(
    draws: Sequence[Draw], config: Adaptive, runs: Callable[[Draw], list[Observation]]
) -> Score:
    """One way of choosing on all draws."""
    columns = zip(*(score(draw, config, runs(draw)) for draw in draws), strict=True)
    return Score(*(np.array(column) for column in columns))


def fixed_scores(
    draws: Sequence[Draw], shape: tuple[int, float], seeds: Sequence[int]
) -> list[Score]:
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


def flops_for(ladder: Sequence[Score], error: Callable[[Score], float], wanted: float) -> float:
    """What a fixed ladder must cost to be as accurate; infinite if no number of seeds is enough."""
    flops = np.log([score.flops.mean() for score in ladder])
    errors = np.minimum.accumulate([math.log(error(score)) for score in ladder])
    if errors[-1] > math.log(wanted):
        return math.inf
    return math.exp(np.interp(-math.log(wanted), -errors, flops))


def ratio(ladder: Sequence[Score], found: Score, error: Callable[[Score], float]) -> float:
    """FLOPs of a ladder as accurate as `found`, over those of `found`."""
    return flops_for(ladder, error, error(found)) / found.flops.mean()


def _config(**own: float) -> Adaptive:
    values: dict[str, Any] = {"max_seeds": MAX_SEEDS, "ladders": 30.0, **own}
    return Adaptive(tuple(f"s{i}" for i in range(LADDER)), **values)


ERRORS: dict[str, Callable[[Score], float]] = {
    "rms ln N*": lambda score: score.rms("size"),
    "p90 ln N*": lambda score: score.p90("size"),
    "rms gap": lambda score: score.rms("gap"),
    "p90 gap": lambda score: score.p90("gap"),
}
HEADER = ("", "runs/curve", "median", *ERRORS, "parabola", "no minimum")


def main() -> None:
    """Print the tables and the JSON line."""
    arguments = _arguments()
    rng = np.random.Generator(np.random.Philox(key=arguments.seed))
    draws = [make_draw(rng, arguments.prior_error) for _ in range(arguments.draws)]
    seeds = (1, 2, 4) if arguments.quick else SEEDS
    ladders = {shape_text(shape): fixed_scores(draws, shape, seeds) for shape in SHAPES}
    chosen = {}
    for size, loss in TARGETS:
        config = _config(target_size=size, target_loss=loss)
        runs = partial(adaptive_runs, config=config)
        chosen[f"adaptive, {size:g}, {loss:g} nats"] = measure(draws, config, runs)
    print(f"{len(draws)} draws; runs per curve weighted by their FLOPs, mean and median over draws")
    rows = [
        _row(f"{name}, {count} seeds", found)
        for name, scores in ladders.items()
        for count, found in zip(seeds, scores, strict=True)
    ]
    print(table_text(HEADER, [*rows, *(_row(name, found) for name, found in chosen.items())]))
    resamples = [rng.integers(len(draws), size=len(draws)) for _ in range(RESAMPLES)]
    print(json.dumps(_print_ratios(ladders, chosen, resamples)))


def shape_text(shape: tuple[int, float]) -> str:
    """A ladder's name."""
    return f"{shape[0]} sizes x {shape[1]:g}"


def _row(name: str, found: Score) -> list[str]:
    coarse = sum(BUDGETS) * len(VARIANTS)
    return [
        name,
        f"{found.flops.mean() / coarse:.1f}",
        f"{np.median(found.flops) / coarse:.1f}",
        *(f"{error(found):.4f}" for error in ERRORS.values()),
        f"{found.rms('parabola'):.3f}",
        f"{found.lost.mean():.1%}",
    ]


def _print_ratios(
    ladders: dict[str, list[Score]], chosen: dict[str, Score], resamples: list[np.ndarray]
) -> dict[str, float]:
    """FLOPs of each ladder over the adaptive study's; those of the cheapest ladder are returned,
    unless none ever is as accurate.
    """
    rows, ratios = [], {}
    for name, found in chosen.items():
        own = {
            (ladder, kind): ratio(scores, found, error)
            for ladder, scores in ladders.items()
            for kind, error in ERRORS.items()
        }
        for ladder, scores in ladders.items():
            cells = []
            for kind, error in ERRORS.items():
                spread = [
                    ratio([score.take(index) for score in scores], found.take(index), error)
                    for index in resamples
                ]
                low, high = np.quantile(spread, (0.05, 0.95), method="nearest")
                texts = [_ratio_text(value) for value in (own[ladder, kind], low, high)]
                cells.append(f"{texts[0]} ({texts[1]}, {texts[2]})")
            rows.append([name, ladder, *cells])
        for kind in ERRORS:
            best = min(own[ladder, kind] for ladder in ladders)
            ratios |= {f"{kind} {name}": round(best, 3)} if math.isfinite(best) else {}
    print(table_text(("FLOPs as accurate as", "of", *ERRORS), rows))
    return ratios


def _ratio_text(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--draws", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prior-error", type=float, default=1.0)
    arguments = parser.parse_args()
    arguments.draws = arguments.draws or (20 if arguments.quick else 200)
    return arguments


if __name__ == "__main__":
    main()
