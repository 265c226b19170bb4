"""The contract that every feed-forward variant keeps.

A variant is one file in this folder and one YAML in `conf/ffw/`. The file holds one frozen
dataclass that extends `FFWConfig` and the `FFW` module that it builds; nothing else in the project
knows the variant's name. To add one, see docs/add_a_variant.md.

Shape suffixes, here and in the variants: B batch, T time, M = B * T tokens, D model width,
F hidden width of a dense layer, H heads, K experts kept per head, N experts or memory slots.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peer_scaling.cost import Cost
from peer_scaling.distributed import World
from peer_scaling.kernels.activations import ACTIVATIONS

LATER = "later"
THRESHOLD = "threshold"
"""The causal route that needs the cutoffs of `FFW.take_route`."""
CALIBRATION = "calibration"
"""The route that shows those cutoffs: each expert takes as many tokens as in training, out of all
tokens of a forward pass; not causal."""


def later(default: Any) -> Any:
    """The default of a field that a variant was given after runs of it were recorded: at this
    value it is no part of a run's identity, nor of its record.
    """
    return field(default=default, metadata={LATER: True})


class Routing(NamedTuple):
    """Which experts the tokens of a forward pass used, for usage statistics."""

    expert: Tensor
    """int64, any shape: expert numbers in [0, num_experts)."""
    weight: Tensor
    """Same shape: router score of each choice, detached."""
    num_experts: int


class FFWOutput(NamedTuple):
    """What a feed-forward layer returns."""

    y_BTD: Tensor
    aux_loss: Tensor
    """Scalar to add to the training loss; never part of a reported loss."""
    stats: Routing | None
    """Expert choices of this pass; None for a layer without experts."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that the optimiser treats alike."""

    params: tuple[nn.Parameter, ...]
    decay: bool
    """Whether decoupled weight decay applies."""
    lr_multiplier: float = 1.0
    """Factor on the run's learning rate."""


class FFW(nn.Module, ABC):
    """A feed-forward layer."""

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> FFWOutput:
        """Apply the layer to (batch, time, d_model); the output has the same shape and dtype."""

    @abstractmethod
    def optim_groups(self) -> list[ParamGroup]:
        """Every parameter of the layer exactly once."""

    def spread(self, world: World) -> None:
        """Be told of the ranks that share each forward pass. A layer whose `batch_coupled` is true
        computes what one rank would; others have nothing to do.
        """
        del world

    def take_route(self, route: str | None, cutoff_N: Tensor | None = None) -> None:
        """Route by one of the configuration's `causal_routes`, or for calibration, until told
        otherwise; None is the way of training.

        Args:
            route: its name.
            cutoff_N: for `threshold`, the least router score with which each expert takes a token.
        """
        raise NotImplementedError(route)

    @property
    def row_tables(self) -> tuple[nn.Parameter, ...]:
        """Parameters whose gradient comes as rows, and is exchanged as rows."""
        return ()

    @property
    def compiles(self) -> bool:
        """Whether `torch.compile` can follow the layer; one that brings its own kernels says no."""
        return True


class FFWConfig(ABC):
    """The frozen numbers of a feed-forward layer; subclasses are final dataclasses."""

    @property
    @abstractmethod
    def causal(self) -> bool:
        """Whether, in eval mode, no output depends on a later token or on another sequence."""

    @property
    def causal_routes(self) -> tuple[str, ...]:
        """How a layer that is not causal can be evaluated causally; the first is what ranks it."""
        return ()

    @property
    @abstractmethod
    def batch_coupled(self) -> bool:
        """Whether, in training, a token's output depends on other sequences of its forward pass."""

    @property
    def micro_batch_matters(self) -> bool:
        """Whether the gradient of a step depends on how its sequences are divided into forward
        passes: always if `batch_coupled`, and with an auxiliary loss that is no mean over tokens.
        """
        return self.batch_coupled

    @abstractmethod
    def build(
        self, d_model: int, *, out_scale: float = 1.0, generator: torch.Generator | None = None
    ) -> FFW:
        """Make the layer, initialised from `generator` (default: PyTorch's global one).

        `out_scale` multiplies the initial standard deviation of the weights that write into the
        residual stream.
        """

    @abstractmethod
    def cost(self, d_model: int) -> Cost:
        """Parameters, FLOPs and gathered bytes per token, by the conventions of `cost.py`."""

    def cost_problem(self, sequences: int, context: int) -> str | None:
        """Why a forward pass over `sequences` of `context` tokens would not cost what `cost` says,
        or None.
        """
        del sequences, context
        return None

    def numbers(self) -> dict[str, Any]:
        """Every field that a run's identity and record hold: all but those of `later` at their
        defaults.
        """
        own = [
            f
            for f in fields(self)  # pyright: ignore[reportArgumentType]
            if not (f.metadata.get(LATER) and getattr(self, f.name) == f.default)
        ]
        return {f.name: getattr(self, f.name) for f in own}


def normal(
    shape: tuple[int, ...], std: float, generator: torch.Generator | None = None
) -> nn.Parameter:
    """A parameter drawn from N(0, std^2) with a private generator."""
    return nn.Parameter(torch.empty(shape).normal_(0.0, std, generator=generator))


def activation_problems(activation: str) -> list[str]:
    """The problem with an activation's name, as a list of at most one."""
    if activation in ACTIVATIONS:
        return []
    return [f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}"]
