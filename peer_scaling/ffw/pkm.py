"""Product-key memory (Lample et al. 2019, 1907.05242): y = sum over heads of sum_i g_i v_i.

Shape suffixes: B batch, T time, M = B * T tokens, D model width, N memory slots,
L = heads x kept per head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peer_scaling.distributed import World
from peer_scaling.ffw.base import FFW, FFWOutput, ParamGroup, Routing, normal
from peer_scaling.ffw.product_key import ProductKeyConfig, ProductKeyRouter
from peer_scaling.kernels.experts import weighted_rows
from peer_scaling.kernels.segments import TableGradient


@dataclass(frozen=True)
class PKM(ProductKeyConfig):
    """A memory of N values addressed by product keys (He 2024, section 3.1: h = 8, k = 32)."""

    experts_per_head: int = 32
    shared_keys: bool = False
    """Each head has its own keys, as in Lample et al.'s own notebook."""

    @property
    def num_tables(self) -> int:
        """One: the values."""
        return 1

    def build(
        self, d_model: int, *, out_scale: float = 1.0, generator: torch.Generator | None = None
    ) -> "PKMFFW":
        """The layer; values drawn from N(0, 1 / d_model) as in the XLM notebook."""
        return PKMFFW(self, d_model, out_scale, generator)


class PKMFFW(FFW):
    """The module that `PKM` builds."""

    def __init__(
        self, config: PKM, d_model: int, out_scale: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.config = config
        self.router = ProductKeyRouter(config, d_model, generator)
        self.value_ND = normal((config.num_experts, d_model), out_scale * d_model**-0.5, generator)

    def forward(self, x_BTD: Tensor) -> FFWOutput:
        """Read h * k values for each token."""
        x_MD = x_BTD.flatten(0, 1)
        index_ML, gate_ML = self.router(x_MD)
        form = TableGradient(self.config.table_gradient)
        with torch.autocast(x_MD.device.type, enabled=False):
            y_MD = weighted_rows(index_ML, gate_ML, self.value_ND, form)
        stats = Routing(index_ML, gate_ML.detach(), self.config.num_experts)
        return FFWOutput(y_MD.to(x_BTD.dtype).view_as(x_BTD), x_BTD.new_zeros(()), stats)

    def spread(self, world: World) -> None:
        """The query norm takes the statistics of all ranks."""
        self.router.spread(world)

    @property
    def row_tables(self) -> tuple[nn.Parameter, ...]:
        """The tables, unless their gradient is dense."""
        rows = TableGradient(self.config.table_gradient) is TableGradient.ROWS
        return (self.value_ND,) if rows else ()

    @property
    def compiles(self) -> bool:
        """False: the kernels are compiled already."""
        return False

    def optim_groups(self) -> list[ParamGroup]:
        """The router's groups, and the values: no decay, their own learning rate."""
        table = ParamGroup((self.value_ND,), False, self.config.table_lr_multiplier)
        return [*self.router.optim_groups(), table]
