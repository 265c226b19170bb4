"""PEER: a pool of single-neuron experts found by product keys (He 2024, arXiv 2407.04153).

    y = sum over heads h, sum over i in top-k of head h:  g_i(x) sigma(u_i . x) v_i

Every head searches the same experts, by default with the same product keys; an expert that two
heads choose counts twice. The gate g is a softmax over the k scores of one head and multiplies
after the non-linearity; heads are summed. No norm, no output projection, no biases inside the
layer.

Shape suffixes: B batch, T time, M = B * T tokens, D model width, N experts,
L = heads x kept per head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peer_scaling.distributed import World
from peer_scaling.ffw.base import (
    FFW,
    FFWOutput,
    ParamGroup,
    Routing,
    activation_problems,
    normal,
)
from peer_scaling.ffw.product_key import ProductKeyConfig, ProductKeyRouter
from peer_scaling.kernels.experts import single_neuron_experts
from peer_scaling.kernels.segments import TableGradient


@dataclass(frozen=True)
class PEER(ProductKeyConfig):
    """Parameter-efficient expert retrieval (He 2024, section 3.1: N = 1024^2, h = 8, k = 16)."""

    activation: str = "gelu"

    def _problems(self) -> list[str]:
        return [*super()._problems(), *activation_problems(self.activation)]

    @property
    def num_tables(self) -> int:
        """Two: the down (u) and up (v) vectors of the experts."""
        return 2

    def build(
        self, d_model: int, *, out_scale: float = 1.0, generator: torch.Generator | None = None
    ) -> "PEERFFW":
        """The layer; both tables drawn from N(0, 1 / d_model)."""
        return PEERFFW(self, d_model, out_scale, generator)


class PEERFFW(FFW):
    """The module that `PEER` builds."""

    def __init__(
        self, config: PEER, d_model: int, out_scale: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.config = config
        self.router = ProductKeyRouter(config, d_model, generator)
        shape = (config.num_experts, d_model)
        self.down_ND = normal(shape, d_model**-0.5, generator)
        self.up_ND = normal(shape, out_scale * d_model**-0.5, generator)

    def forward(self, x_BTD: Tensor) -> FFWOutput:
        """Evaluate h * k single-neuron experts for each token."""
        x_MD = x_BTD.flatten(0, 1)
        index_ML, gate_ML = self.router(x_MD)
        # In the tables' type under autocast: casting a table costs more than reading its rows.
        with torch.autocast(x_MD.device.type, enabled=False):
            y_MD = single_neuron_experts(
                x_MD.to(self.up_ND.dtype),
                index_ML,
                gate_ML,
                self.down_ND,
                self.up_ND,
                self.config.activation,
                TableGradient(self.config.table_gradient),
            )
        stats = Routing(index_ML, gate_ML.detach(), self.config.num_experts)
        return FFWOutput(y_MD.to(x_BTD.dtype).view_as(x_BTD), x_BTD.new_zeros(()), stats)

    def spread(self, world: World) -> None:
        """The query norm takes the statistics of all ranks."""
        self.router.spread(world)

    @property
    def row_tables(self) -> tuple[nn.Parameter, ...]:
        """The tables, unless their gradient is dense."""
        rows = TableGradient(self.config.table_gradient) is TableGradient.ROWS
        return (self.down_ND, self.up_ND) if rows else ()

    @property
    def compiles(self) -> bool:
        """False: the kernels are compiled already."""
        return False

    def optim_groups(self) -> list[ParamGroup]:
        """The router's groups, and the tables: no decay, their own learning rate."""
        tables = ParamGroup((self.down_ND, self.up_ND), False, self.config.table_lr_multiplier)
        return [*self.router.optim_groups(), tables]
