"""Times of implementations that take turns, so that a slow moment of the machine hits all of them.

Each turn is a forward pass without autograd, as in evaluation, and then a training step, timed up
to the end of the backward pass and to the end of the optimiser's step. The learning rate is 0: the
optimiser's arithmetic is the same, and all implementations keep the same weights.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.peers.backends import forced
from benchmarks.peers.contender import Contender
from peer_scaling.optim import OptimConfig, make_optimizer

MEASURES = ("forward", "backward", "step")
"""Forward; forward and backward; forward, backward and the optimiser's step."""
WARMUP_ROUNDS = 2
"""The first allocates the optimisers' state, the second is the first with warm memory."""

Times = dict[str, dict[str, list[float]]]
"""Seconds of each round, by implementation and measure."""


@dataclass(frozen=True)
class Turns:
    """What the implementations of a comparison share while they take turns."""

    contenders: Sequence[Contender]
    x_BTD: Tensor
    grad_BTD: Tensor
    measures: Sequence[str]

    def run(self, rounds: int) -> Times:
        """Seconds of each measured round."""
        optimizers = self._optimizers() if "step" in self.measures else {}
        times: Times = {c.name: {m: [] for m in self.measures} for c in self.contenders}
        gc.disable()  # a collection takes longer than a small layer
        try:
            for number in range(WARMUP_ROUNDS + rounds):
                for contender in self.contenders:
                    seconds = self._turn(contender, optimizers.get(contender.name))
                    for measure in self.measures if number >= WARMUP_ROUNDS else ():
                        times[contender.name][measure].append(seconds[measure])
        finally:
            gc.enable()
        return times

    def _turn(self, contender: Contender, step: Callable[[], object] | None) -> dict[str, float]:
        with forced(contender.backend):
            return self._forward(contender) | self._training(contender, step)

    def _forward(self, contender: Contender) -> dict[str, float]:
        if "forward" not in self.measures:
            return {}
        began = time.perf_counter()
        with torch.no_grad():
            contender.module(self.x_BTD)
        return {"forward": time.perf_counter() - began}

    def _training(
        self, contender: Contender, step: Callable[[], object] | None
    ) -> dict[str, float]:
        if step is None and "backward" not in self.measures:
            return {}
        began = time.perf_counter()
        contender.module(self.x_BTD).backward(self.grad_BTD)
        seconds = {"backward": time.perf_counter() - began}
        if step is not None:
            step()
            seconds["step"] = time.perf_counter() - began
        contender.module.zero_grad(set_to_none=True)
        self.x_BTD.grad = None
        return seconds

    def _optimizers(self) -> dict[str, Callable[[], object]]:
        """Ours for our layers, PyTorch's fused AdamW for the peers.

        One for each of our layers and one for all peers, since implementations share tables and the
        state of a large table is two more of its size; weights without a gradient cost nothing.
        """
        layers: dict[int, Optimizer] = {}
        for contender in self.contenders:
            key = id(contender.module)
            if contender.groups and key not in layers:
                layers[key] = make_optimizer(OptimConfig(), list(contender.groups), lr=0.0)
        peers = [c.module for c in self.contenders if not c.groups]
        weights = {id(w): w for module in peers for w in module.parameters()}
        shared = AdamW(list(weights.values()), lr=0.0, fused=True) if weights else None
        chosen = {c.name: layers[id(c.module)] if c.groups else shared for c in self.contenders}
        return {name: optimizer.step for name, optimizer in chosen.items() if optimizer}


def medians(times: Times) -> dict[str, dict[str, float]]:
    """Median seconds, by implementation and measure."""
    return {
        name: {measure: statistics.median(seconds) for measure, seconds in measured.items()}
        for name, measured in times.items()
    }
