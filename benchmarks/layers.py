"""Time of each feed-forward layer against the dense one, forward and backward.

    python -m benchmarks.layers [--quick]

All layers take turns in one process, so that a slow moment of the machine hits all of them; medians
and ratios are printed, and one JSON line of ratios at the end. Quote ratios, not milliseconds.
"""

import argparse
import json
import statistics
import time

import torch

from peer_scaling.display import table_text
from peer_scaling.ffw.base import FFW, FFWConfig
from peer_scaling.ffw.dense import Dense
from peer_scaling.ffw.moe import MoE
from peer_scaling.ffw.peer import PEER
from peer_scaling.ffw.pkm import PKM

WARMUP_ROUNDS = 2


def layers(num_experts: int) -> dict[str, FFWConfig]:
    """The four variants at the paper's heads and choices per head."""
    return {
        "dense": Dense(),
        "moe": MoE(),
        "pkm": PKM(num_experts=num_experts),
        "peer": PEER(num_experts=num_experts),
    }


def seconds(layer: FFW, x_BTD: torch.Tensor) -> float:
    """One forward and backward pass."""
    began = time.perf_counter()
    layer(x_BTD).y_BTD.square().mean().backward()
    elapsed = time.perf_counter() - began
    layer.zero_grad(set_to_none=True)
    return elapsed


def main() -> None:
    """Print the table and the JSON line."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    d_model, tokens = arguments.d_model, 512 if arguments.quick else 4096
    configs = layers(128**2 if arguments.quick else 512**2)
    x_BTD = torch.randn(1, tokens, d_model, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    modules = {n: c.build(d_model, generator=generator) for n, c in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(WARMUP_ROUNDS + arguments.rounds):
        for name, module in modules.items():
            times[name].append(seconds(module, x_BTD))
    medians = {name: statistics.median(t[WARMUP_ROUNDS:]) for name, t in times.items()}
    _print(configs, medians, d_model, tokens)


def _print(
    configs: dict[str, FFWConfig], medians: dict[str, float], d_model: int, tokens: int
) -> None:
    ratios = {name: median / medians["dense"] for name, median in medians.items()}
    rows = []
    for name, median in medians.items():
        flops = configs[name].cost(d_model).flops_per_token * tokens
        speed = f"{flops / median / 1e9:.2f}"
        rows.append([name, f"{median * 1e3:.1f}", f"{ratios[name]:.2f}", speed])
    print(f"{tokens} tokens, width {d_model}, {torch.get_num_threads()} thread(s)")
    print(table_text(("layer", "median ms", "x dense", "GFLOP/s"), rows))
    print(json.dumps({f"{name}_over_dense": round(ratio, 4) for name, ratio in ratios.items()}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
