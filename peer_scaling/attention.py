"""Causal attention with rotary positions.

Shape suffixes: B batch, T time, D model width, E = 3 D, P = 3 (query, key, value), H heads,
A width of one head.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from peer_scaling.ffw.base import ParamGroup, normal

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, (B, T, H, A) each."""


class Rotary(NamedTuple):
    """What `per_head` makes of the rotary table, once per forward pass of the decoder."""

    cos_THA: Tensor
    sin_THA: Tensor
    """Negative for the first half of a head's channels."""


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

    def forward(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        """Mix each token with itself and earlier ones; same shape as the input."""
        qkv_BTE = functional.linear(x_BTD, self.qkv_ED, self.qkv_bias_E)
        qkv_BTPHA = qkv_BTE.unflatten(-1, (3, self.num_heads, -1))
        heads = _RotatedHeads.apply(qkv_BTPHA, *rotary)
        q_BHTA, k_BHTA, v_BHTA = (x_BTHA.transpose(1, 2) for x_BTHA in cast(Heads, heads))
        y_BHTA = functional.scaled_dot_product_attention(q_BHTA, k_BHTA, v_BHTA, is_causal=True)
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


def per_head(cos_TA: Tensor, sin_TA: Tensor, num_heads: int) -> Rotary:
    """The rotary table written out for every head, and the sine with the signs of its use: on a
    CPU, products with long rows are several times as fast as with one row per head.
    """
    half = sin_TA.shape[1] // 2
    signed_TA = torch.cat((-sin_TA[:, :half], sin_TA[:, half:]), dim=1)
    cos_THA, sin_THA = (x[:, None].repeat(1, num_heads, 1) for x in (cos_TA, signed_TA))
    return Rotary(cos_THA, sin_THA)


class _RotatedHeads(torch.autograd.Function):
    """Queries and keys rotated, values as they are: each (B, T, H, A), out of one projection.

    With a gradient of its own, because PyTorch's would keep and add several copies of each.
    """

    @staticmethod
    def forward(ctx: Any, qkv_BTPHA: Tensor, cos_THA: Tensor, sin_THA: Tensor) -> Heads:
        ctx.save_for_backward(cos_THA, sin_THA)
        q_BTHA, k_BTHA, v_BTHA = qkv_BTPHA.unbind(2)
        q_BTHA, k_BTHA = (_rotate(x_BTHA, cos_THA, sin_THA) for x_BTHA in (q_BTHA, k_BTHA))
        return q_BTHA, k_BTHA, v_BTHA.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q_BTHA: Tensor, k_BTHA: Tensor, v_BTHA: Tensor
    ) -> tuple[Tensor, None, None]:
        cos_THA, sin_THA = ctx.saved_tensors
        # The inverse of a rotation turns by the opposite angle.
        q_BTHA, k_BTHA = (_rotate(x_BTHA, cos_THA, -sin_THA) for x_BTHA in (q_BTHA, k_BTHA))
        return torch.stack((q_BTHA, k_BTHA, v_BTHA), dim=2), None, None


def _rotate(x_BTHA: Tensor, cos_THA: Tensor, sin_THA: Tensor) -> Tensor:
    """Turn each pair of channels by its position's angle (Su et al. 2021, 2104.09864, eq. 34)."""
    first, second = x_BTHA.chunk(2, dim=-1)
    turned_BTHA = torch.cat((second, first), dim=-1).to(cos_THA.dtype).mul_(sin_THA)
    return turned_BTHA.addcmul_(x_BTHA.to(cos_THA.dtype), cos_THA).to(x_BTHA.dtype)
