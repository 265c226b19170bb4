"""The comparisons by name: which implementations take part in which."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.peers import reference
from benchmarks.peers.contender import Case, Contender, ours
from benchmarks.peers.moe import top1_contenders, top2_contenders
from benchmarks.peers.product_key import peer_contenders, pkm_contenders
from peer_scaling.ffw.dense import Dense

LAYERS = ("peer", "pkm", "moe")


def contenders(case: Case) -> list[Contender]:
    """The implementations of a comparison, the dense layer of that width last."""
    builders: dict[str, Callable[[Case], list[Contender]]] = {
        "peer": peer_contenders,
        "pkm": pkm_contenders,
        "moe-top2": top2_contenders,
        "moe-top1": top1_contenders,
    }
    layer = Dense().build(case.d_model, generator=torch.Generator().manual_seed(0))
    dense = ours("dense", layer, partial(reference.dense, layer), ())
    return [*builders[case.layer](case), *dense]


def cases(
    layers: list[str],
    widths: list[int],
    tokens: list[int],
    num_experts: list[int],
    moe_experts: int,
    backends: tuple[str, ...],
) -> list[Case]:
    """All shapes of the chosen layers, small ones first."""
    found = []
    for d_model in widths:
        for length in tokens:
            for layer in layers:
                kinds = ("moe-top2", "moe-top1") if layer == "moe" else (layer,)
                sizes = [moe_experts] if layer == "moe" else num_experts
                found += [Case(k, d_model, length, n, backends) for n in sizes for k in kinds]
    return found
