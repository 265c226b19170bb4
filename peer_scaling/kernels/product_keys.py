"""Exact top-k search over a product of two sets of sub-keys (Lample et al. 2019, 1907.05242).

A key is the concatenation of one sub-key from each set, so its inner product with a query is the
sum of two half scores, and only the k best sub-keys of each half can take part in one of the k best
pairs: S + S scores and a few sums stand in for S * S. With both lists sorted, pair (i, j) has at
least (i + 1)(j + 1) - 1 pairs that score no less, so only those with (i + 1)(j + 1) <= k can win:
50 of 256 for k = 16.

Shape suffixes: M tokens, H heads, P = 2 halves, S sub-keys per half, C width of a half, K kept,
L candidate pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TopKeys(NamedTuple):
    """The best keys of each token and head, best first."""

    score_MHK: Tensor
    index_MHK: Tensor
    """int64 key numbers in [0, S * S): first sub-key * S + second sub-key."""


def product_key_topk(query_MHPC: Tensor, keys_HPSC: Tensor, k: int) -> TopKeys:
    """The k keys with the largest inner products, for each token and head.

    Args:
        query_MHPC: queries, both halves.
        keys_HPSC: sub-keys; a leading size of 1 means that all heads share them.
        k: keys to keep, at most S.

    Returns:
        Scores (differentiable in queries and keys) and key numbers. Exact: the same scores as a
        search over all S * S keys. Between equal scores the choice is unspecified.

    Source: He 2024 (2407.04153), equations (4) and (5).
    """
    num_sub_keys = keys_HPSC.shape[2]
    if k > num_sub_keys:
        raise ValueError(f"k={k} exceeds the {num_sub_keys} sub-keys of a half")
    if keys_HPSC.shape[0] == 1:
        scores_MHPS = torch.einsum("mhpc,psc->mhps", query_MHPC, keys_HPSC[0])
    else:
        scores_MHPS = torch.einsum("mhpc,hpsc->mhps", query_MHPC, keys_HPSC)
    half_MHPK, sub_MHPK = scores_MHPS.topk(k, dim=-1)
    first_L, second_L = (pair_L.to(query_MHPC.device) for pair_L in candidate_pairs(k))
    sums_MHL = half_MHPK[:, :, 0, first_L] + half_MHPK[:, :, 1, second_L]
    score_MHK, best_MHK = sums_MHL.topk(k, dim=-1)
    sub_first_MHK = sub_MHPK[:, :, 0].gather(2, first_L[best_MHK])
    sub_second_MHK = sub_MHPK[:, :, 1].gather(2, second_L[best_MHK])
    return TopKeys(score_MHK, sub_first_MHK * num_sub_keys + sub_second_MHK)


def candidate_pairs(k: int) -> tuple[Tensor, Tensor]:
    """Ranks (i, j), counted from 0, of the pairs that can be among the k best."""
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    first, second = zip(*pairs, strict=True)
    return torch.tensor(first), torch.tensor(second)
