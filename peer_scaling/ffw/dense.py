"""The dense feed-forward layer: W_out sigma(W_in x).

Shape suffixes: see base.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from peer_scaling.cost import Cost
from peer_scaling.errors import check
from peer_scaling.ffw.base import (
    ACTIVATIONS,
    FFW,
    FFWConfig,
    FFWOutput,
    ParamGroup,
    activation_problems,
    normal,
)


@dataclass(frozen=True)
class Dense(FFWConfig):
    """Two projections with a non-linearity between them (Vaswani et al. 2017, section 3.3)."""

    ratio: int = 4
    """Hidden width over model width."""
    activation: str = "gelu"
    bias: bool = False

    def __post_init__(self) -> None:
        problems = activation_problems(self.activation)
        if self.ratio < 1:
            problems.append(f"ratio={self.ratio} must be at least 1")
        check(problems)

    @property
    def causal(self) -> bool:
        """True: each token is treated alone."""
        return True

    @property
    def batch_coupled(self) -> bool:
        """False: each token is treated alone."""
        return False

    def build(
        self, d_model: int, *, out_scale: float = 1.0, generator: torch.Generator | None = None
    ) -> "DenseFFW":
        """The layer, weights drawn from N(0, 1 / fan_in)."""
        return DenseFFW(self, d_model, out_scale, generator)

    def cost(self, d_model: int) -> Cost:
        """2 products of d_model x (ratio d_model)."""
        weights = 2 * self.ratio * d_model**2
        biases = (self.ratio + 1) * d_model if self.bias else 0
        return Cost(
            num_params_total=weights + biases,
            num_params_active=weights + biases,
            flops_by_component={"mlp": 2.0 * weights},
        )


class DenseFFW(FFW):
    """The module that `Dense` builds."""

    def __init__(
        self, config: Dense, d_model: int, out_scale: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        d_hidden = config.ratio * d_model
        self.activation = ACTIVATIONS[config.activation]
        self.in_FD = normal((d_hidden, d_model), d_model**-0.5, generator)
        self.out_DF = normal((d_model, d_hidden), out_scale * d_hidden**-0.5, generator)
        self.in_bias_F = nn.Parameter(torch.zeros(d_hidden)) if config.bias else None
        self.out_bias_D = nn.Parameter(torch.zeros(d_model)) if config.bias else None

    def forward(self, x_BTD: Tensor) -> FFWOutput:
        """Apply the layer; no auxiliary loss, no routing."""
        hidden_BTF = self.activation(functional.linear(x_BTD, self.in_FD, self.in_bias_F))
        y_BTD = functional.linear(hidden_BTF, self.out_DF, self.out_bias_D)
        return FFWOutput(y_BTD, x_BTD.new_zeros(()), None)

    def optim_groups(self) -> list[ParamGroup]:
        """Weights decay, biases do not."""
        biases = tuple(b for b in (self.in_bias_F, self.out_bias_D) if b is not None)
        return [ParamGroup((self.in_FD, self.out_DF), decay=True), ParamGroup(biases, decay=False)]
