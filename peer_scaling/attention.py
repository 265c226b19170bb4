"""Causal attention with rotary positions.

Shape suffixes: B batch, T time, D model width, E = 3 D, P = 3 (query, key, value), H heads,
A width of one head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from peer_scaling.ffw.base import ParamGroup, normal


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        bias: bool,
        out_scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        std = d_model**-0.5
        self.num_heads = num_heads
        self.qkv_ED = normal((3 * d_model, d_model), std, generator)
        self.out_DD = normal((d_model, d_model), out_scale * std, generator)
        self.qkv_bias_E = nn.Parameter(torch.zeros(3 * d_model)) if bias else None
        self.out_bias_D = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Mix each token with itself and earlier ones; same shape as the input."""
        qkv_BTE = functional.linear(x_BTD, self.qkv_ED, self.qkv_bias_E)
        heads_BTPHA = qkv_BTE.unflatten(-1, (3, self.num_heads, -1))
        q_BHTA, k_BHTA, v_BHTA = heads_BTPHA.permute(2, 0, 3, 1, 4).unbind(0)
        y_BHTA = functional.scaled_dot_product_attention(
            _rotate(q_BHTA, rotary), _rotate(k_BHTA, rotary), v_BHTA, is_causal=True
        )
        return functional.linear(y_BHTA.transpose(1, 2).flatten(2), self.out_DD, self.out_bias_D)

    def optim_groups(self) -> list[ParamGroup]:
        """Weights decay, biases do not."""
        biases = tuple(b for b in (self.qkv_bias_E, self.out_bias_D) if b is not None)
        return [ParamGroup((self.qkv_ED, self.out_DD), decay=True), ParamGroup(biases, False)]


def rotary_table(width: int, base: float, context: int) -> tuple[Tensor, Tensor]:
    """Cos and sin of t * base^(-2 i / A), each (context, A), pairs (i, i + A / 2) alike, float32,
    for heads of an even width A.
    """
    frequency_A = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_TA = torch.outer(torch.arange(context, dtype=torch.float64), frequency_A).repeat(1, 2)
    return angle_TA.cos().float(), angle_TA.sin().float()


def _rotate(x_BHTA: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of channels by its position's angle (Su et al. 2021, 2104.09864, eq. 34)."""
    cos_TA, sin_TA = rotary
    first, second = x_BHTA.chunk(2, dim=-1)
    turned_BHTA = torch.cat((-second, first), dim=-1)
    return (x_BHTA * cos_TA + turned_BHTA * sin_TA).to(x_BHTA.dtype)
