"""Exact top-k search over a product of two sets of sub-keys (Lample et al. 2019, 1907.05242).

A key is the concatenation of one sub-key from each set, so its inner product with a query is the
sum of two half scores, and only the k best sub-keys of each half can take part in one of the k best
pairs: S + S scores and a few sums stand in for S * S. Scores of all sub-keys exist for some tokens
at a time; the derivative goes through the selected sub-keys alone.

Shape suffixes: M tokens, H heads, P = 2 halves, S sub-keys per half, C width of a half, K kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from peer_scaling.kernels import plain
from peer_scaling.kernels.backend import Backend
from peer_scaling.kernels.dispatch import backend_for
from peer_scaling.kernels.segments import TableGradient


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
        search over all S * S keys. Between equal scores the choice is unspecified. A query that is
        not finite gives scores that are not numbers, never a choice that looks right.

    Raises:
        TypeError: queries and keys differ in type.
        ValueError: shapes or devices do not fit together, or k is not in [1, S].

    Source: He 2024 (2407.04153), equations (4) and (5).
    """
    _check(query_MHPC, keys_HPSC, k)
    backend = backend_for(query_MHPC.device, query_MHPC.dtype)
    if backend is None or not query_MHPC.numel():
        return TopKeys(*plain.product_key_topk(query_MHPC, keys_HPSC, k))
    return TopKeys(*_Search.apply(query_MHPC, keys_HPSC, k, backend))


class _Search(Function):
    @staticmethod
    def forward(
        ctx: Any, query_MHPC: Tensor, keys_HPSC: Tensor, k: int, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        score_MHK, index_MHK = backend.search(query_MHPC, keys_HPSC, k)
        ctx.mark_non_differentiable(index_MHK)
        ctx.save_for_backward(query_MHPC, keys_HPSC, index_MHK)
        ctx.backend = backend
        return score_MHK, index_MHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MHK: Tensor, _: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Queries are tokens, sub-keys a table and score gradients weights of the same look-ups
        that evaluate experts: dq = sum_k g_k key_k, and dkey = the sum of g q over its pairs.
        """
        query_MHPC, keys_HPSC, index_MHK = ctx.saved_tensors
        keys_SC, query_LC = keys_HPSC.flatten(0, 2), query_MHPC.flatten(0, 2)
        row_LK = _selected_rows(index_MHK, keys_HPSC)
        weight_LK = grad_MHK[:, :, None].expand(-1, -1, 2, -1).flatten(0, 2)
        picked = ctx.backend.group(row_LK, len(keys_SC))
        grad_query, grad_keys = None, None
        if ctx.needs_input_grad[0]:
            grad_query = ctx.backend.bag(picked, keys_SC, weight_LK).view_as(query_MHPC)
        if ctx.needs_input_grad[1]:
            form = TableGradient.DENSE
            grad_SC = ctx.backend.table_gradient(picked, query_LC, weight_LK, keys_SC, form)
            grad_keys = grad_SC.view_as(keys_HPSC)
        return grad_query, grad_keys, None, None


def _selected_rows(index_MHK: Tensor, keys_HPSC: Tensor) -> Tensor:
    """Rows of the selected sub-keys in `keys_HPSC.flatten(0, 2)`: (M * H * 2, K)."""
    num_sets, _, num_sub_keys, _ = keys_HPSC.shape
    sub_MHPK = torch.stack((index_MHK // num_sub_keys, index_MHK % num_sub_keys), dim=2)
    sets_HP = torch.arange(2 * num_sets, device=index_MHK.device).view(num_sets, 2)
    return (sub_MHPK + num_sub_keys * sets_HP[..., None]).flatten(0, 2)


def _check(query_MHPC: Tensor, keys_HPSC: Tensor, k: int) -> None:
    query, keys = tuple(query_MHPC.shape), tuple(keys_HPSC.shape)
    if len(query) != 4 or len(keys) != 4 or query[2:] != (2, keys[3]) or keys[1] != 2:
        raise ValueError(f"queries {query} do not fit keys {keys}: (M, H, 2, C) and (H, 2, S, C)")
    if keys[0] not in (1, query[1]):
        raise ValueError(f"{keys[0]} key sets for {query[1]} heads: one, or one for each")
    if not 1 <= k <= keys[2]:
        raise ValueError(f"k={k} is not in 1..{keys[2]}, the sub-keys of a half")
    if query_MHPC.dtype != keys_HPSC.dtype:
        raise TypeError(f"queries are {query_MHPC.dtype}, keys {keys_HPSC.dtype}")
    if query_MHPC.device != keys_HPSC.device:
        raise ValueError(f"queries are on {query_MHPC.device}, keys on {keys_HPSC.device}")
