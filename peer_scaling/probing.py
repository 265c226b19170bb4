"""What a probe of a model is made with: tokens and others in their place, and contexts that leave
the model as it was, to the bit.

Shape suffixes: B sequences, T time (the model's inputs), V vocabulary, D model
width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from peer_scaling.parallel import Losses
from peer_scaling.rng import capture_rng, restore_rng

PREFIXES = (1, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64)
"""Lengths of prefixes that are probed, beside that of all tokens but the last."""
MAX_TIME = 72
"""Tokens of a probe, if the model's context is no shorter: a little beyond the longest prefix."""
MIN_SEQUENCES = 4
SEED = 0x1EA4


@dataclass(frozen=True)
class Probe:
    """Tokens, others that differ from them everywhere, and a prefix length for each sequence."""

    tokens_BT: Tensor
    """int64 (B, T + 1): inputs and the last target, as the loss takes them."""
    other_BT: Tensor
    prefix_B: Tensor
    document_end: int | None

    @staticmethod
    def draw(
        vocab_size: int, context: int, device: torch.device, document_end: int | None
    ) -> "Probe":
        """A sequence for each length that fits, one without a prefix, and at least four."""
        length = min(context, MAX_TIME)
        prefixes = [0, *(sorted({p for p in (*PREFIXES, length - 1) if 0 < p < length}) or [1])]
        prefixes *= -(-MIN_SEQUENCES // len(prefixes))
        generator = torch.Generator().manual_seed(SEED)
        shape = (len(prefixes), length + 1)
        tokens_BT = torch.randint(vocab_size, shape, generator=generator)
        shift_BT = torch.randint(1, vocab_size, shape, generator=generator)
        other_BT = (tokens_BT + shift_BT) % vocab_size
        prefix_B = torch.tensor(prefixes)
        return Probe(tokens_BT.to(device), other_BT.to(device), prefix_B.to(device), document_end)

    @property
    def inside_BT(self) -> Tensor:
        """Which inputs are in the prefix of their sequence."""
        return self._time_T[:-1] < self.prefix_B[:, None]

    def other_suffixes(self) -> Tensor:
        """Tokens with others behind the prefixes."""
        return torch.where(self._time_T >= self.prefix_B[:, None], self.other_BT, self.tokens_BT)

    def other_sequences(self, rows_B: Tensor) -> Tensor:
        """Tokens with others for whole sequences (bool)."""
        return torch.where(rows_B[:, None], self.other_BT, self.tokens_BT)

    def documents(self) -> tuple[Tensor, Tensor]:
        """Two documents in each sequence, and the same with another first one."""
        assert self.document_end is not None
        end_BT = self._time_T == self.prefix_B[:, None]
        first_BT = self._time_T < self.prefix_B[:, None]
        tokens_BT = torch.where(end_BT, self.document_end, self.tokens_BT)
        return tokens_BT, torch.where(first_BT, self.other_BT, tokens_BT)

    @property
    def _time_T(self) -> Tensor:
        return torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device)


class Seen(NamedTuple):
    """One forward pass, as the model and the loss made it."""

    inputs_BT: Tensor
    """int64: what the model was given."""
    hidden_BTD: Tensor
    head_VD: Tensor
    """Detached."""
    loss: float
    """Summed cross-entropy, nats."""


def see(losses: Losses, tokens_BT: Tensor) -> Seen:
    """A forward pass of (B, T + 1) tokens, and what went through the model in it."""
    calls: list[tuple[Tensor, Any]] = []
    watch = lambda _, inputs, output: calls.append((inputs[0], output))  # noqa: E731
    handle = losses.model.register_forward_hook(watch)
    try:
        loss = losses(tokens_BT).cross_entropy_sum
    finally:
        handle.remove()
    inputs_BT, output = calls[-1]
    return Seen(inputs_BT, output.hidden_BTD, output.head_VD.detach(), float(loss.detach()))


class Embedded(TorchFunctionMode):
    """Makes what tokens are embedded to the leaves of a graph."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape
        self.leaves: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.embedding and result.shape[:2] == self._shape:
            result = result.detach().requires_grad_()
            self.leaves.append(result)
        return result


def set_mode(module: nn.Module, training: bool) -> None:
    """Dropout stays off: it is no leak, and would look like one."""
    module.train(training)
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.eval()


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Buffers, modes and random generators are afterwards what they were."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    generators = capture_rng()
    try:
        yield
    finally:
        restore_rng(*generators)
        for buffer, kept in buffers:
            buffer.copy_(kept)
        for part, training in modes:
            part.training = training


@contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """No derivative in parameters: those of large tables would take as much memory."""
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def in_float64(module: nn.Module) -> Iterator[None]:
    """The same numbers in float64; afterwards the same memory as before."""
    tensors = [t for t in chain(module.parameters(), module.buffers()) if t.is_floating_point()]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
