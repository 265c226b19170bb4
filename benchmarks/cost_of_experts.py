"""What a larger pool of experts costs: time of PEER's search and of its expert part, apart.

    python -m benchmarks.cost_of_experts [--quick]

A token evaluates the same number of experts whatever the size of the pool, so only the search is
expected to grow, as the square root. Three choices of the experts tell causes apart:

    searched   those that the search returned
    uniform    drawn from the whole pool: the least that caches can help
    confined   drawn from as many rows as the smallest pool has: what is left is the table's size

Without --quick, writes docs/figures/cost_of_experts.png and a CSV beside it. The last line is one
JSON object: time at the largest pool over that at the smallest.
"""

import argparse
import csv
import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from typing import Any

import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.peers.backends import forced
from benchmarks.peers.report import machine_facts
from peer_scaling.display import table_text
from peer_scaling.ffw.peer import PEER, PEERFFW
from peer_scaling.kernels.experts import single_neuron_experts
from peer_scaling.kernels.segments import TableGradient

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "docs" / "figures" / "cost_of_experts.png"
STYLE = ROOT / "analysis" / "style.mplstyle"
WARMUP_ROUNDS = 2
MEASURES = {"forward": "forward", "backward": "forward + backward"}
LOOKS = {
    "search": ("#D55E00", "s"),
    "experts, searched": ("#0072B2", "D"),
    "experts, uniform": ("#009E73", "^"),
    "experts, confined": ("#CC79A7", "v"),
}
"""Colours of Okabe and Ito (2008) and markers, by part."""
QUICK = {"num_experts": [2**8, 2**10, 2**12], "d_model": 64, "tokens": 256, "rounds": 3}


@dataclass(frozen=True)
class Point:
    """Median time of one part of the layer."""

    part: str
    measure: str
    num_experts: int
    distinct_experts: int | None
    """Different experts that the tokens of the pass used; None for the search."""
    microseconds_per_token: float


@dataclass(frozen=True)
class Part:
    """One part of a layer, ready to run."""

    name: str
    num_experts: int
    distinct_experts: int | None
    run: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    """Whatever gets a gradient."""

    def seconds(self) -> dict[str, float]:
        """Time of a forward pass without autograd, and of a forward and backward pass."""
        began = time.perf_counter()
        with torch.no_grad():
            grad = self.run()
        middle = time.perf_counter()
        self.run().backward(grad)
        ended = time.perf_counter()
        for leaf in self.leaves:
            leaf.grad = None
        return {"forward": middle - began, "backward": ended - middle}


def main() -> None:
    """Print the table, write the figure and its numbers, print the JSON line."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    facts = machine_facts()
    with forced(arguments.backend):
        points = _measure(arguments)
    _print(points, arguments)
    if arguments.figure:
        title = (
            f"width {arguments.d_model}, {arguments.tokens:,} tokens, {arguments.threads} thread(s)"
        )
        _plot(points, title).savefig(arguments.figure, metadata={"Software": None})
        _write_csv(arguments.figure.with_suffix(".csv"), points, arguments, facts)
    print(json.dumps(_ratios(points)))


def parts(num_experts: int, confined: int, d_model: int, tokens: int) -> Iterator[Part]:
    """The search and the expert part of a layer, for each choice of experts."""
    generator = torch.Generator().manual_seed(0)
    layer = PEER(num_experts=num_experts, table_gradient="rows").build(d_model, generator=generator)
    x_MD = torch.randn(tokens, d_model, generator=generator).requires_grad_()
    router = layer.router
    yield Part("search", num_experts, None, lambda: router(x_MD)[1], [x_MD, *router.parameters()])
    with torch.no_grad():
        searched_ML, gate_ML = router(x_MD)
    gate_ML = gate_ML.clone().requires_grad_()
    shape = searched_ML.shape
    choices = {
        "searched": searched_ML.clone(),
        "uniform": torch.randint(num_experts, shape, generator=generator),
        "confined": torch.randint(confined, shape, generator=generator),
    }
    leaves = [x_MD, gate_ML, layer.down_ND, layer.up_ND]
    for name, index_ML in choices.items():
        run = _expert_part(layer, x_MD, index_ML, gate_ML)
        yield Part(f"experts, {name}", num_experts, len(index_ML.unique()), run, leaves)


def _expert_part(
    layer: PEERFFW, x_MD: Tensor, index_ML: Tensor, gate_ML: Tensor
) -> Callable[[], Tensor]:
    """The only place that knows the kernel's signature."""
    return lambda: single_neuron_experts(
        x_MD, index_ML, gate_ML, layer.down_ND, layer.up_ND, "gelu", TableGradient.ROWS
    )


def _measure(arguments: argparse.Namespace) -> list[Point]:
    """All parts of all sizes take turns, so that a slow moment of the machine hits all of them."""
    smallest = min(arguments.num_experts)
    found = [
        part
        for num_experts in arguments.num_experts
        for part in parts(num_experts, smallest, arguments.d_model, arguments.tokens)
    ]
    seconds: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    gc.disable()
    for number in range(WARMUP_ROUNDS + arguments.rounds):
        for place, part in enumerate(found):
            part.seconds()  # the sizes take turns, so that each finds its memory given away
            for measure, elapsed in part.seconds().items():
                if number >= WARMUP_ROUNDS:
                    seconds[place, measure].append(elapsed)
    gc.enable()
    return [
        Point(
            found[place].name,
            measure,
            found[place].num_experts,
            found[place].distinct_experts,
            statistics.median(elapsed) / arguments.tokens * 1e6,
        )
        for (place, measure), elapsed in seconds.items()
    ]


def _ratios(points: list[Point]) -> dict[str, float]:
    sizes = [p.num_experts for p in points]
    low, high = min(sizes), max(sizes)
    times = {(p.part, p.measure, p.num_experts): p.microseconds_per_token for p in points}
    return {
        f"{part.replace(', ', '_')}_{measure}_{_power(high)}_over_{_power(low)}": round(
            times[part, measure, high] / times[part, measure, low], 4
        )
        for part in LOOKS
        for measure in MEASURES
    }


def _power(number: int) -> str:
    exponent = log2(number)
    return f"2^{exponent:.0f}" if exponent.is_integer() else str(number)


def _print(points: list[Point], arguments: argparse.Namespace) -> None:
    rows = [
        [
            p.part,
            MEASURES[p.measure],
            f"{p.num_experts:,}",
            "" if p.distinct_experts is None else f"{p.distinct_experts:,}",
            f"{p.microseconds_per_token:.2f}",
        ]
        for p in sorted(points, key=lambda p: (list(LOOKS).index(p.part), p.measure != "forward"))
    ]
    print(f"width {arguments.d_model}, {arguments.tokens:,} tokens, {arguments.threads} thread(s)")
    print(table_text(("part", "measure", "experts", "distinct", "us/token"), rows))


def _plot(points: list[Point], title: str) -> Figure:
    with style.context(STYLE):
        figure = Figure((8.4, 3.8))
        panels = figure.subplots(1, 2, sharey=True)
        for ax, measure in zip(panels, MEASURES, strict=True):
            _panel(ax, [p for p in points if p.measure == measure], MEASURES[measure])
        panels[0].set_ylabel("time per token (µs)")
        panels[0].legend(fontsize=7.5)
        figure.suptitle(f"Cost of PEER's parts against the pool of experts ({title})", fontsize=10)
    return figure


def _panel(ax: Axes, points: list[Point], title: str) -> None:
    for part, (colour, marker) in LOOKS.items():
        chosen = [p for p in points if p.part == part]
        sizes = [p.num_experts for p in chosen]
        times = [p.microseconds_per_token for p in chosen]
        ax.plot(sizes, times, color=colour, marker=marker, label=part)
        if part == "search":
            guide = [times[0] * (size / sizes[0]) ** 0.5 for size in sizes]
            ax.plot(
                sizes, guide, color="#777777", linestyle=":", label="√N through the first point"
            )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    sizes = sorted({p.num_experts for p in points})
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.set_xlabel("experts N")
    ax.set_title(title)


def _write_csv(
    path: Path, points: list[Point], arguments: argparse.Namespace, facts: dict[str, Any]
) -> None:
    shared = {
        "d_model": arguments.d_model,
        "tokens": arguments.tokens,
        "backend": arguments.backend or "automatic",
        "torch": facts["packages"]["torch"],
        **{name: facts[name] for name in ("threads", "cpu", "commit", "date")},
    }
    rows = [{**asdict(point), **shared} for point in points]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    sizes = [2**14, 2**16, 2**18, 2**20]
    parser.add_argument("--quick", action="store_true", help="tiny pools, no figure")
    parser.add_argument("--num-experts", type=int, nargs="+", default=sizes)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", help="of our kernels (default: their own choice)")
    parser.add_argument("--figure", type=Path, help=f"default: {FIGURE.relative_to(ROOT)}")
    if (arguments := parser.parse_args()).quick:
        vars(arguments).update(QUICK)
    elif arguments.figure is None:
        arguments.figure = FIGURE
    return arguments


if __name__ == "__main__":
    main()
