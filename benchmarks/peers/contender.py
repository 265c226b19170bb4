"""What the benchmark knows of an implementation, and the shapes at which it compares them.

Shape suffixes: see peer_scaling/ffw/base.py.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from peer_scaling.ffw.base import FFW, ParamGroup

SEQUENCE = 512
"""Tokens of one sequence, at most; only st-moe-pytorch, which groups by sequence, depends on it."""


@dataclass(frozen=True)
class Case:
    """One comparison: a kind of layer at one shape."""

    layer: str
    d_model: int
    tokens: int
    num_experts: int
    backends: tuple[str, ...]
    """Backends of ours to compare; empty where the package has a single one."""

    @property
    def label(self) -> str:
        """A short name, unique within a run of the benchmark."""
        return f"{self.layer}/d{self.d_model}/n{self.num_experts}/t{self.tokens}"


@dataclass(frozen=True)
class Truth:
    """Float64 result of a layer for one input, and its gradients by the names of our weights."""

    y_BTD: Tensor
    grads: dict[str, Tensor]
    row_R: Tensor | None = None
    """Rows of the tables that the gradients of names ending in `_ND` hold; the others are zero."""


class Peer(nn.Module, ABC):
    """An implementation of a layer that is not ours."""

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """The layer's output, same shape."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor | None]:
        """Its weights' gradients, in the names and layouts of our weights."""


class Ours(Peer):
    """A layer of this project, behind the same surface as a peer."""

    def __init__(self, layer: FFW) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.layer(x_BTD).y_BTD

    def gradients(self) -> dict[str, Tensor | None]:
        named = self.layer.named_parameters()
        return {name.removeprefix("router."): weight.grad for name, weight in named}


@dataclass(frozen=True)
class Contender:
    """An implementation that takes part in a comparison."""

    name: str
    module: Peer
    truth: Callable[[Tensor, Tensor], Truth] | None
    """Float64 result and gradients for an input and the output's gradient; None if it computes a
    function of its own."""
    note: str = ""
    """How its function differs from ours."""
    backend: str | None = None
    """Backend of ours to force."""
    groups: tuple[ParamGroup, ...] = ()
    """Parameter groups of ours; empty for a peer."""


def ours(
    name: str, layer: FFW, truth: Callable[[Tensor, Tensor], Truth], backends: tuple[str, ...]
) -> list[Contender]:
    """Our layer, once for each backend; all share the weights."""
    module, groups = Ours(layer), tuple(layer.optim_groups())
    if not backends:
        return [Contender(name, module, truth, groups=groups)]
    return [
        Contender(f"{name} ({backend})", module, truth, backend=backend, groups=groups)
        for backend in backends
    ]


def optional_module(name: str, package: str) -> ModuleType | None:
    """A peer's module, or None and a printed line if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{package} is skipped: {error}; pip install -e '.[bench]' installs it", flush=True)
        return None


def inputs(case: Case, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """An input (batch, time, d_model) that takes gradients, and a gradient of the output."""
    tokens = tokens or case.tokens
    length = min(SEQUENCE, tokens)
    # Not the seed of the layers: the input would be their first weights, and saturate routers.
    generator = torch.Generator().manual_seed(1)
    x_BTD, grad_BTD = torch.randn(2, tokens // length, length, case.d_model, generator=generator)
    return x_BTD.clone().requires_grad_(), grad_BTD.clone()
