"""Attention and the four feed-forwards of an exported peer-scaling model, in plain PyTorch.

This file is copied as it is beside the weights; `modeling_peer_scaling.py` has the model. It needs
torch and transformers and nothing else.

Shape suffixes: B batch, T new tokens, S all tokens (cached ones first), M = B * T tokens, D width
of the model, H heads, A width of an attention head, F hidden width of a feed-forward, N experts or
memory slots (E in a mixture), K kept per head or token, X = K * K candidates, L = H * K, P = 2
halves of a key or query, key and value, C width of a half or tokens of one expert, R sub-keys per
half (S in the name of the parameter), Q = H * width of a key.
"""

from math import ceil, isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache

from .configuration_peer_scaling import PeerScalingConfig

NORM_EPS = 1e-6
TOKENS_AT_ONCE = 512
"""Tokens whose experts' rows are gathered at a time."""
ACTIVATIONS = {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}


def weight(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std^2), for a model that is built and not loaded."""
    return nn.Parameter(torch.empty(shape).normal_(0.0, std))


class RMSNorm(nn.Module):
    """X / sqrt(mean(x^2) + eps), times a gain (Zhang and Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Same shape."""
        return functional.rms_norm(x_BTD, x_BTD.shape[-1:], self.weight, NORM_EPS)


def make_norm(config: PeerScalingConfig) -> nn.Module:
    """The norm that `config.norm` names."""
    if config.norm == "rms":
        return RMSNorm(config.hidden_size)
    return nn.LayerNorm(config.hidden_size, bias=False)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: PeerScalingConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.qkv_ED = weight(3 * width, width, std=width**-0.5)
        self.out_DD = weight(width, width, std=width**-0.5)
        self.qkv_bias_E = nn.Parameter(torch.zeros(3 * width)) if config.bias else None
        self.out_bias_D = nn.Parameter(torch.zeros(width)) if config.bias else None

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_BHTS: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Mix each token with those that the mask allows; without one, with itself and earlier."""
        qkv_BTE = functional.linear(x_BTD, self.qkv_ED, self.qkv_bias_E)
        qkv_PBHTA = qkv_BTE.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHTA, k_BHSA, v_BHSA = qkv_PBHTA.unbind()
        q_BHTA, k_BHSA = rotated(q_BHTA, *rotary), rotated(k_BHSA, *rotary)
        if cache is not None:
            k_BHSA, v_BHSA = cache.update(k_BHSA, v_BHSA, self.layer)
        y_BHTA = functional.scaled_dot_product_attention(
            q_BHTA, k_BHSA, v_BHSA, attn_mask=mask_BHTS, is_causal=mask_BHTS is None
        )
        return functional.linear(y_BHTA.transpose(1, 2).flatten(2), self.out_DD, self.out_bias_D)


def rotary_of(position_BT: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cos and sin of t * base^(-2 i / A), (B, 1, T, A) each, pairs (i, i + A / 2) alike; float32,
    from float64 on the CPU, as in training.
    """
    frequency_A = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_BTA = (position_BT.cpu().double()[..., None] * frequency_A).repeat(1, 1, 2)
    cos_BHTA, sin_BHTA = (x[:, None].float() for x in (angle_BTA.cos(), angle_BTA.sin()))
    return cos_BHTA.to(position_BT.device), sin_BHTA.to(position_BT.device)


def rotated(x_BHTA: Tensor, cos_BHTA: Tensor, sin_BHTA: Tensor) -> Tensor:
    """Each pair of channels turned by its position's angle (Su et al. 2021, equation 34)."""
    first, second = x_BHTA.chunk(2, dim=-1)
    turned_BHTA = torch.cat((-second, first), dim=-1)
    return (x_BHTA * cos_BHTA + turned_BHTA * sin_BHTA).to(x_BHTA.dtype)


class Dense(nn.Module):
    """W_out sigma(W_in x)."""

    def __init__(self, width: int, ratio: int, activation: str, bias: bool) -> None:
        super().__init__()
        hidden = ratio * width
        self.activation = ACTIVATIONS[activation]
        self.in_FD = weight(hidden, width, std=width**-0.5)
        self.out_DF = weight(width, hidden, std=hidden**-0.5)
        self.in_bias_F = nn.Parameter(torch.zeros(hidden)) if bias else None
        self.out_bias_D = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Same shape."""
        hidden_BTF = self.activation(functional.linear(x_BTD, self.in_FD, self.in_bias_F))
        return functional.linear(hidden_BTF, self.out_DF, self.out_bias_D)


class MoE(nn.Module):
    """Dense experts. `token_choice`: each token takes `top_k`, dropless (Fedus et al. 2021).
    `expert_choice`: each expert takes its best tokens of a group, later ones included: a forward
    pass (`batch`), a `sequence`, or a `position` of all sequences (Zhou et al. 2022).
    """

    def __init__(self, width: int, **numbers: Any) -> None:
        super().__init__()
        self.router, self.top_k = numbers["router"], numbers["top_k"]
        self.capacity_factor, self.group = numbers["capacity_factor"], numbers["group"]
        self.activation = ACTIVATIONS[numbers["activation"]]
        experts, hidden = numbers["num_experts"], numbers["ratio"] * width
        self.router_ED = weight(experts, width, std=width**-0.5)
        self.in_EFD = weight(experts, hidden, width, std=width**-0.5)
        self.out_EDF = weight(experts, width, hidden, std=hidden**-0.5)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Same shape; each expert in turn, on its tokens."""
        x_MD = x_BTD.flatten(0, 1)
        score_ME = torch.softmax(functional.linear(x_MD, self.router_ED), -1, torch.float32)
        y_MD = torch.zeros_like(x_MD)
        for expert, token_C in enumerate(self._tokens(score_ME, x_BTD.shape[1])):
            hidden_CF = self.activation(functional.linear(x_MD[token_C], self.in_EFD[expert]))
            gate_C1 = score_ME[token_C, expert, None].to(x_MD.dtype)
            out_CD = gate_C1 * functional.linear(hidden_CF, self.out_EDF[expert])
            y_MD = y_MD.index_add(0, token_C, out_CD)
        return y_MD.view_as(x_BTD)

    def _tokens(self, score_ME: Tensor, time: int) -> list[Tensor]:
        """The tokens of each expert, in their order."""
        experts = score_ME.shape[1]
        if self.router == "token_choice":
            chosen_MK = score_ME.topk(self.top_k, dim=-1).indices
            return [(chosen_MK == e).any(1).nonzero()[:, 0] for e in range(experts)]
        score_EBT = score_ME.T.unflatten(1, (-1, time))
        number_EBT = torch.arange(len(score_ME), device=score_ME.device).view_as(score_EBT[0])
        number_EBT = number_EBT.expand_as(score_EBT)
        if self.group == "batch":
            score_EBT, number_EBT = score_EBT.flatten(1)[:, None], number_EBT.flatten(1)[:, None]
        along = 1 if self.group == "position" else 2
        tokens = score_EBT.shape[along]
        capacity = min(tokens, max(1, ceil(tokens * self.capacity_factor / experts)))
        best = score_EBT.topk(capacity, dim=along).indices
        return list(number_EBT.gather(along, best).flatten(1).sort(dim=-1).values)


class ProductKeyRouter(nn.Module):
    """The k best of R * R keys for each head, and a softmax over their scores (He 2024,
    2407.04153, equations 4 and 5).
    """

    def __init__(self, width: int, **numbers: Any) -> None:
        super().__init__()
        self.heads, self.kept = numbers["num_heads"], numbers["experts_per_head"]
        self.key_dim, self.query_norm = numbers["key_dim"], numbers["query_norm"]
        self.query_QD = weight(self.heads * self.key_dim, width, std=width**-0.5)
        half, sets = self.key_dim // 2, 1 if numbers["shared_keys"] else self.heads
        keys_HPRC = torch.empty(sets, 2, isqrt(numbers["num_experts"]), half)
        self.keys_HPSC = nn.Parameter(keys_HPRC.uniform_(-(half**-0.5), half**-0.5))
        self.norm = {
            "batch": lambda: nn.BatchNorm1d(self.heads * self.key_dim),
            "layer": lambda: nn.LayerNorm(self.key_dim),
            "none": nn.Identity,
        }[self.query_norm]()

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert numbers and gates, (M, L) each."""
        query_MQ = functional.linear(x_MD, self.query_QD)
        if self.query_norm == "layer":
            query_MQ = self.norm(query_MQ.unflatten(1, (self.heads, self.key_dim))).flatten(1)
        else:
            query_MQ = self.norm(query_MQ)
        # In float32 whatever the weights are in: bfloat16 scores tie too often.
        with torch.autocast(x_MD.device.type, enabled=False):
            query_MHPC = query_MQ.float().view(len(x_MD), self.heads, 2, -1)
            keys_HPRC = self.keys_HPSC.float().expand(self.heads, -1, -1, -1)
            score_MHPR = torch.einsum("mhpc,hprc->mhpr", query_MHPC, keys_HPRC)
        half_MHPK, sub_MHPK = score_MHPR.topk(self.kept, dim=-1)
        # One of the k best pairs has both halves among the k best of theirs.
        score_MHX = (half_MHPK[:, :, 0, :, None] + half_MHPK[:, :, 1, None, :]).flatten(2)
        rows = keys_HPRC.shape[2]
        key_MHX = (sub_MHPK[:, :, 0, :, None] * rows + sub_MHPK[:, :, 1, None, :]).flatten(2)
        score_MHK, best_MHK = score_MHX.topk(self.kept, dim=-1)
        gate_MHK = torch.softmax(score_MHK, dim=-1).to(x_MD.dtype)
        return key_MHX.gather(2, best_MHK).flatten(1), gate_MHK.flatten(1)


class PKM(nn.Module):
    """Product-key memory: sum of g_i v_i over the keys found (Lample et al. 2019)."""

    def __init__(self, width: int, **numbers: Any) -> None:
        super().__init__()
        self.router = ProductKeyRouter(width, **numbers)
        self.value_ND = weight(numbers["num_experts"], width, std=width**-0.5)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Same shape."""
        index_ML, gate_ML = self.router(x_BTD.flatten(0, 1))
        parts = zip(index_ML.split(TOKENS_AT_ONCE), gate_ML.split(TOKENS_AT_ONCE), strict=True)
        y_MD = [weighted_rows(index, gate, self.value_ND) for index, gate in parts]
        return torch.cat(y_MD).view_as(x_BTD)


class PEER(nn.Module):
    """Single-neuron experts: sum of g_i sigma(u_i . x) v_i over the keys found (He 2024)."""

    def __init__(self, width: int, **numbers: Any) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[numbers["activation"]]
        self.router = ProductKeyRouter(width, **numbers)
        self.down_ND = weight(numbers["num_experts"], width, std=width**-0.5)
        self.up_ND = weight(numbers["num_experts"], width, std=width**-0.5)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Same shape."""
        x_MD = x_BTD.flatten(0, 1)
        split = (part.split(TOKENS_AT_ONCE) for part in (x_MD, *self.router(x_MD)))
        y_MD = [self._experts(*parts) for parts in zip(*split, strict=True)]
        return torch.cat(y_MD).view_as(x_BTD)

    def _experts(self, x_MD: Tensor, index_ML: Tensor, gate_ML: Tensor) -> Tensor:
        down_MLD = functional.embedding(index_ML, self.down_ND)
        hidden_ML = self.activation(torch.einsum("md,mld->ml", x_MD, down_MLD))
        return weighted_rows(index_ML, hidden_ML * gate_ML, self.up_ND)


def weighted_rows(index_ML: Tensor, weight_ML: Tensor, table_ND: Tensor) -> Tensor:
    """Sum over l of weight_ml table[index_ml]: (M, D)."""
    return torch.einsum("ml,mld->md", weight_ML, functional.embedding(index_ML, table_ND))


FEED_FORWARDS = {"dense": Dense, "moe": MoE, "pkm": PKM, "peer": PEER}
