"""The loss of a layer that is not causal, routed causally, on weights that were trained otherwise.

`threshold` needs a cutoff for each expert: the mean over forward passes on training text of the
least router score with which the expert took a token, when it takes as many as in training. It is
measured after training, on its last batches, and not as a running mean during it: so it belongs to
the final weights, and no state of training changes (docs/deviations.md).

Shape suffixes: B sequences, T time, N experts.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from peer_scaling.data import TrainingBatches
from peer_scaling.distributed import ALONE, World
from peer_scaling.ffw.base import CALIBRATION, FFW, THRESHOLD, FFWConfig, Routing

CALIBRATION_TOKENS = 65_536
"""Of the last steps of training, rounded up to whole steps."""


def causal_losses(
    ffw: FFW,
    config: FFWConfig,
    score: Callable[[], float],
    cutoffs: Callable[[], torch.Tensor],
) -> dict[str, float]:
    """What `score` returns with each of the causal routes of `config`; none for a causal layer.

    Args:
        ffw: the layer; it routes as in training again afterwards.
        config: its configuration.
        score: evaluates the model that `ffw` is part of.
        cutoffs: see `expert_cutoffs`.
    """
    losses = {}
    for route in config.causal_routes:
        with routed(ffw, route, cutoffs() if route == THRESHOLD else None):
            losses[route] = score()
    return losses


@contextmanager
def routed(ffw: FFW, route: str, cutoff_N: torch.Tensor | None = None) -> Iterator[None]:
    """`ffw.take_route` for as long as this context lasts; then as in training."""
    ffw.take_route(route, cutoff_N)
    try:
        yield
    finally:
        ffw.take_route(None)


def calibration_passes(
    batches: TrainingBatches, last: int, batch_tokens: int, sequences: int
) -> Iterator[torch.Tensor]:
    """The forward passes of the steps before `last` that hold `CALIBRATION_TOKENS`, int64
    (B, T + 1) with B = `sequences`.
    """
    steps = min(last, -(-CALIBRATION_TOKENS // batch_tokens))
    for step in range(last - steps, last):
        yield from torch.from_numpy(batches.batch(step)).split(sequences)


def expert_cutoffs(
    ffw: FFW,
    losses: nn.Module,
    batches: Iterable[torch.Tensor],
    device: torch.device,
    autocast: torch.autocast,
    world: World = ALONE,
) -> torch.Tensor:
    """The cutoffs of the experts, float32 (N,).

    Args:
        ffw: the layer, a part of `losses`.
        losses: makes a `LossOutput` of tokens (parallel.py); in eval mode meanwhile.
        batches: of each forward pass the tokens of this rank, int64 (B, T + 1).
        device: the model's.
        autocast: the precision.
        world: the ranks; all make as many passes.
    """
    was_training, found = losses.training, []
    losses.eval()
    try:
        with routed(ffw, CALIBRATION), torch.no_grad(), autocast:
            for tokens_BT in batches:
                least_N = _least(losses(tokens_BT.to(device)).stats)
                parts = world.gather(least_N) if world.size > 1 else [least_N]
                found.append(torch.stack(parts).amin(0).double())
    finally:
        losses.train(was_training)
    return torch.stack(found).mean(0).float()


def _least(stats: Routing) -> torch.Tensor:
    """The least score of each expert's choices, (N,); infinite where it has none."""
    least_N = stats.weight.new_full((stats.num_experts,), torch.inf)
    return least_N.scatter_reduce(0, stats.expert.flatten(), stats.weight.flatten(), "amin")
