"""Whole training steps against the matrix-product peak of the machine, and against dense ones.

    python -m benchmarks.step [--quick]

A step is forward, backward, clipping and update of a model of d 256 and 6 layers (V 8,192) on 8
sequences of 512 tokens, float32, by the classes that training uses. `plain` is the dense model with
all logits at once. The variants take turns in one process on the same threads, and each round also
times the machine's best matrix product (the fastest of 3 each of 512, 1024 and 2048 squared); the
share of the peak is the median over rounds of a round's speed over that round's peak. Memory is the
peak of resident memory in a step above what was resident before it. Quote ratios, not milliseconds.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from peer_scaling import machine
from peer_scaling.data import DataConfig
from peer_scaling.display import table_text
from peer_scaling.evaluate import EvalConfig
from peer_scaling.ffw.base import FFWConfig
from peer_scaling.ffw.dense import Dense
from peer_scaling.ffw.moe import MoE
from peer_scaling.ffw.peer import PEER
from peer_scaling.ffw.pkm import PKM
from peer_scaling.kernels.cross_entropy import cross_entropy_sum_reference
from peer_scaling.model import Decoder, DecoderConfig, DecoderOutput
from peer_scaling.optim import OptimConfig, make_optimizer
from peer_scaling.run import Run, Settings
from peer_scaling.step import Stepper, read_results
from peer_scaling.tokenizer import TokenizerConfig
from peer_scaling.track import TrackerConfig

CPU = torch.device("cpu")
WARMUP_ROUNDS = 1
PEAK_SIZES = (512, 1024, 2048)


@dataclass(frozen=True)
class Sizes:
    """What the variants have in common."""

    d_model: int = 256
    num_layers: int = 6
    num_heads: int = 4
    vocab_size: int = 8192
    context: int = 512
    batch_size: int = 8
    num_experts: int = 512**2
    moe_experts: int = 128


QUICK = Sizes(
    d_model=64, num_layers=2, vocab_size=1024, context=128, num_experts=64**2, moe_experts=16
)


@dataclass(frozen=True)
class PlainOutput(DecoderOutput):
    """The loss by its definition, from all logits at once."""

    def cross_entropy_sum(self, target_BT: torch.Tensor) -> torch.Tensor:
        hidden_MD = self.hidden_BTD.flatten(0, 1)
        return cross_entropy_sum_reference(hidden_MD, self.head_VD, target_BT.flatten())


class PlainLoss(nn.Module):
    """A decoder whose loss is not chunked."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens_BT: torch.Tensor) -> PlainOutput:
        return PlainOutput(**vars(self.decoder(tokens_BT)))


@dataclass
class Variant:
    """A model that makes steps, and what was measured of them."""

    stepper: Stepper
    flops: float
    """Training FLOPs of one step."""
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def measure(self, tokens: np.ndarray) -> None:
        machine.reset_peak_memory(CPU)
        resident = machine.peak_memory_bytes(CPU)
        began = time.perf_counter()
        read_results([self.stepper.step(tokens, 1.0)])
        self.seconds.append(time.perf_counter() - began)
        self.memory.append(machine.peak_memory_bytes(CPU) - resident)


def variant(sizes: Sizes, ffw: FFWConfig, plain: bool = False) -> Variant:
    """A model with its optimiser."""
    run = Run(
        settings=Settings(budget=1.0, batch_size=sizes.batch_size),
        ffw_name="",
        ffw=ffw,
        decoder=DecoderConfig(sizes.d_model, sizes.num_layers, sizes.num_heads),
        data=DataConfig(
            source="synthetic",
            tokenizer=TokenizerConfig(kind="none", vocab_size=sizes.vocab_size),
            context=sizes.context,
        ),
        optim=OptimConfig(),
        eval=EvalConfig(),
        tracker=TrackerConfig(kind="off"),
    )
    model = run.model()
    optimizer = make_optimizer(run.optim, model.optim_groups(), run.lr)
    stepper = Stepper(run, PlainLoss(model) if plain else model, optimizer, CPU)
    return Variant(stepper, run.cost().flops_per_token * run.batch_tokens)


def matmul_peak() -> float:
    """FLOP/s of the machine's best matrix product, now."""
    best = 0.0
    for size in PEAK_SIZES:
        a = torch.ones(size, size)
        for _ in range(3):
            began = time.perf_counter()
            torch.matmul(a, a)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def main() -> None:
    """Print the table and the JSON line."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    sizes = QUICK if arguments.quick else Sizes()
    variants = {
        "plain": variant(sizes, Dense(), plain=True),
        "dense": variant(sizes, Dense()),
        "moe": variant(sizes, MoE(num_experts=sizes.moe_experts)),
        "pkm": variant(sizes, PKM(num_experts=sizes.num_experts, table_gradient="rows")),
        "peer": variant(sizes, PEER(num_experts=sizes.num_experts, table_gradient="rows")),
    }
    rng = np.random.Generator(np.random.Philox(key=0))
    tokens = rng.integers(sizes.vocab_size, size=(sizes.batch_size, sizes.context + 1))
    peaks = []
    for _ in range(WARMUP_ROUNDS + arguments.rounds):
        peaks.append(matmul_peak())
        for measured in variants.values():
            measured.measure(tokens)
    _print(variants, peaks[WARMUP_ROUNDS:], sizes)


def _print(variants: dict[str, Variant], peaks: list[float], sizes: Sizes) -> None:
    tokens = sizes.batch_size * sizes.context
    rows, share, speed, memory = [], {}, {}, {}
    for name, measured in variants.items():
        seconds = measured.seconds[WARMUP_ROUNDS:]
        median = statistics.median(seconds)
        shares = (measured.flops / s / p for s, p in zip(seconds, peaks, strict=True))
        share[name], speed[name] = statistics.median(shares), tokens / median
        memory[name] = statistics.median(measured.memory[WARMUP_ROUNDS:]) / 2**20
        rows.append(
            [
                name,
                f"{median * 1e3:.0f}",
                f"{measured.flops / median / 1e9:.1f}",
                f"{100 * share[name]:.0f} %",
                f"{100 * measured.flops / median / max(peaks):.0f} %",
                f"{speed[name] / 1e3:.2f}k",
                f"{memory[name]:.0f}",
            ]
        )
    print(f"{tokens} tokens, width {sizes.d_model}, {torch.get_num_threads()} thread(s)")
    print(f"matrix-product peak {statistics.median(peaks) / 1e9:.1f} GFLOP/s (median of rounds)")
    columns = "step", "median ms", "GFLOP/s", "of peak", "of highest peak", "tokens/s", "MiB"
    print(table_text(columns, rows))
    ratios = {"dense_share_of_peak": share["dense"], "plain_share_of_peak": share["plain"]}
    for name in ("moe", "pkm", "peer"):
        ratios[f"{name}_over_dense_tokens_per_second"] = speed[name] / speed["dense"]
    ratios["plain_over_dense_memory"] = max(memory["plain"], 1.0) / max(memory["dense"], 1.0)
    print(json.dumps({name: round(ratio, 4) for name, ratio in ratios.items()}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
