"""The backend that needs nothing but PyTorch, for any device.

Rows are gathered a few tokens at a time, so that (tokens, choices, width) numbers never stand in
memory; sums of rows are `embedding_bag`s.

Shape suffixes: see backend.py; Q = M * L pairs, c tokens of a chunk.
"""

from functools import cached_property
from itertools import pairwise
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from peer_scaling.kernels.backend import Backend
from peer_scaling.kernels.reuse import BlockPool
from peer_scaling.kernels.segments import RowGradient, Segments, sort_segments

ROW_BYTES = 2**20
"""Gathered rows that stand in memory at a time: half of a core's second-level cache."""
ROW_BYTES_CUDA = 2**28

SUM_BYTES = 2**22
"""Sums of rows that are made at a time: memory that the allocator keeps, and some of the cache."""

GROUP = 4
"""Scores per group in `grouped_topk`: 0.65x the time of one search at k = 16 of 512 on a CPU."""


class Picked:
    """An index, and its pairs grouped by row when a gradient asks for them."""

    def __init__(self, index_ML: Tensor) -> None:
        self.index_ML = index_ML

    @cached_property
    def segments(self) -> Segments:
        """The pairs, sorted once for all tables."""
        return sort_segments(self.index_ML)


@final
class TorchBackend(Backend):
    """Chunked gathers and embedding bags."""

    name = "torch"

    def __init__(self) -> None:
        self._blocks = BlockPool()

    def group(self, index_ML: Tensor, num_rows: int) -> Picked:
        """Nothing to prepare."""
        del num_rows
        return Picked(index_ML)

    def dots(self, picked: Picked, table_ND: Tensor, x_MD: Tensor) -> Tensor:
        """Gather the rows of some tokens into one buffer, multiply, go on."""
        tokens, choices = picked.index_ML.shape
        width = table_ND.shape[1]
        limit = ROW_BYTES_CUDA if table_ND.is_cuda else ROW_BYTES
        chunk = max(1, limit // (choices * width * table_ND.element_size()))
        rows_QD = table_ND.new_empty(min(chunk, tokens) * choices, width)
        out_ML = x_MD.new_empty(tokens, choices)
        for start in range(0, tokens, chunk):
            index_Q = picked.index_ML[start : start + chunk].flatten()
            part_QD = rows_QD[: len(index_Q)]
            torch.index_select(table_ND, 0, index_Q, out=part_QD)
            rows_cLD = part_QD.view(-1, choices, width)
            x_cD1 = x_MD[start : start + chunk, :, None]
            out_ML[start : start + chunk] = torch.bmm(rows_cLD, x_cD1).squeeze(2)
        return out_ML

    def bag(self, picked: Picked, table_ND: Tensor, weight_ML: Tensor) -> Tensor:
        """One embedding bag per token."""
        return functional.embedding_bag(
            picked.index_ML, table_ND, per_sample_weights=weight_ML, mode="sum"
        )

    def row_sums(self, picked: Picked, x_MD: Tensor, weight_ML: Tensor) -> RowGradient:
        """One embedding bag per picked row, over the tokens that picked it."""
        pair_Q, row_R, start_R = picked.segments
        token_Q, weight_Q = pair_Q // weight_ML.shape[1], weight_ML.flatten()[pair_Q]

        def sums(begin: int, end: int, start_R: Tensor) -> Tensor:
            token_q, weight_q = token_Q[begin:end], weight_Q[begin:end]
            return functional.embedding_bag(
                token_q, x_MD, start_R, per_sample_weights=weight_q, mode="sum"
            )

        if x_MD.device.type != "cpu":
            return RowGradient(row_R, sums(0, len(pair_Q), start_R))
        # In parts, into memory that is used again: fresh memory costs more than the sums.
        grad_RD = self._blocks.empty((len(row_R), x_MD.shape[1]), x_MD.dtype)
        size = max(1, SUM_BYTES // (x_MD.shape[1] * x_MD.element_size()))
        bounds = [*start_R[::size].tolist(), len(pair_Q)]
        for part, (begin, end) in enumerate(pairwise(bounds)):
            rows = slice(part * size, (part + 1) * size)
            grad_RD[rows] = sums(begin, end, start_R[rows] - begin)
        return RowGradient(row_R, grad_RD)

    def best_pairs(self, scores_MHPS: Tensor, k: int, score_MHK: Tensor, index_MHK: Tensor) -> None:
        """Two top-k searches per head, then one over the candidate sums."""
        best_pairs(scores_MHPS, k, score_MHK, index_MHK)


def best_pairs(scores_MHPS: Tensor, k: int, score_MHK: Tensor, index_MHK: Tensor) -> None:
    """As `Backend.best_pairs`, for any device."""
    half_MHPK, sub_MHPK = grouped_topk(scores_MHPS, k)
    first_Q, second_Q = (rank_Q.to(scores_MHPS.device) for rank_Q in candidate_pairs(k))
    sums_MHQ = half_MHPK[:, :, 0, first_Q] + half_MHPK[:, :, 1, second_Q]
    best_MHK = torch.topk(sums_MHQ, k, dim=-1)
    score_MHK.copy_(best_MHK.values)
    first_MHK = sub_MHPK[:, :, 0].gather(2, first_Q[best_MHK.indices])
    second_MHK = sub_MHPK[:, :, 1].gather(2, second_Q[best_MHK.indices])
    torch.add(second_MHK, first_MHK, alpha=scores_MHPS.shape[-1], out=index_MHK)


def grouped_topk(scores_S: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`scores_S.topk(k)` over the last of any dimensions, in two steps: the k groups of scores with
    the largest maxima hold the k largest scores, and both searches together are shorter.
    """
    size = scores_S.shape[-1]
    if size < 16 * k or size % GROUP:
        values_K, number_K = scores_S.topk(k, dim=-1)
        return values_K, number_K
    num_groups = size // GROUP
    maxima_G = scores_S.unflatten(-1, (GROUP, num_groups)).amax(dim=-2)
    group_K = maxima_G.topk(k, dim=-1, sorted=False).indices
    members = torch.arange(GROUP, device=scores_S.device)[:, None] * num_groups
    number_C = (group_K[..., None, :] + members).flatten(-2)
    best_K = scores_S.gather(-1, number_C).topk(k, dim=-1)
    return best_K.values, number_C.gather(-1, best_K.indices)


def candidate_pairs(k: int) -> tuple[Tensor, Tensor]:
    """Ranks (i, j), counted from 0, of the pairs that can be among the k best.

    With both lists sorted, pair (i, j) has at least (i + 1)(j + 1) - 1 pairs that score no less, so
    only those with (i + 1)(j + 1) <= k can win: 50 of 256 for k = 16, 119 of 1,024 for k = 32.
    """
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    first, second = zip(*pairs, strict=True)
    return torch.tensor(first), torch.tensor(second)
