"""The definitions, in plain PyTorch with its own autograd: what every backend is tested against.

They gather every chosen row, (tokens, choices, width) numbers, and hold all sub-key scores.

Shape suffixes: M tokens, L choices per token (heads x kept per head), N table rows, D model width,
H heads, P = 2 halves, S sub-keys per half, C width of a half key, K kept per head.
"""

import torch
from torch import Tensor
from torch.nn import functional

from peer_scaling.kernels.activations import ACTIVATIONS


def weighted_rows(index_ML: Tensor, weight_ML: Tensor, table_ND: Tensor) -> Tensor:
    """y_m = sum_l weight_ml table[index_ml] (Lample et al. 2019, 1907.05242, equation (3))."""
    rows_MLD = functional.embedding(index_ML, table_ND)
    return torch.einsum("ml,mld->md", weight_ML, rows_MLD)


def single_neuron_experts(
    x_MD: Tensor,
    index_ML: Tensor,
    gate_ML: Tensor,
    down_ND: Tensor,
    up_ND: Tensor,
    activation: str,
) -> Tensor:
    """He 2024 (2407.04153), algorithm 1."""
    down_MLD = functional.embedding(index_ML, down_ND)
    hidden_ML = ACTIVATIONS[activation](torch.einsum("md,mld->ml", x_MD, down_MLD))
    return weighted_rows(index_ML, hidden_ML * gate_ML, up_ND)


def product_key_topk(query_MHPC: Tensor, keys_HPSC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and key numbers, (M, H, K): He 2024, equations (4) and (5), all k * k candidates."""
    num_sub_keys = keys_HPSC.shape[2]
    keys_HPSC = keys_HPSC.expand(query_MHPC.shape[1], -1, -1, -1)
    scores_MHPS = torch.einsum("mhpc,hpsc->mhps", query_MHPC, keys_HPSC)
    half_MHPK, sub_MHPK = scores_MHPS.topk(k, dim=-1)
    sums = half_MHPK[:, :, 0, :, None] + half_MHPK[:, :, 1, None, :]
    numbers = sub_MHPK[:, :, 0, :, None] * num_sub_keys + sub_MHPK[:, :, 1, None, :]
    score_MHK, best_MHK = sums.flatten(2).topk(k, dim=-1)
    return score_MHK, numbers.flatten(2).gather(2, best_MHK)
