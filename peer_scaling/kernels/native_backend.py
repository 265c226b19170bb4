"""The backend of CPUs that have a C++ compiler at hand: `rows.cpp` and
`top_pairs.cpp`, one range per thread.

Pairs of (token, choice) are sorted by row, so a table is read once and in order. Every sum has one
order, and so the same bits, for any number of threads.

Shape suffixes: see backend.py; Q = M * L pairs.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import NamedTuple, final

import torch
from torch import Tensor

from peer_scaling.kernels.backend import Backend
from peer_scaling.kernels.native import function, library, run_all, split_work
from peer_scaling.kernels.reuse import BlockPool
from peer_scaling.kernels.segments import RowGradient

MAX_PAIRS = 2**32
"""A sorted pair holds its number in 32 bits."""
NUMBERS_PER_PAIR = 64
"""Work of a pair, for the choice of a number of threads: a narrow row."""


class Ranges(NamedTuple):
    """Picked rows, cut into ranges of similar work: a range per thread."""

    row_R: Tensor
    bounds: list[tuple[int, int]]
    """First row of each range and the one behind its last."""
    slots: list[int]
    """Place in `row_R` where each range begins."""


@dataclass(frozen=True)
class Picked:
    """Pairs sorted by row within each block of tokens: a block per thread."""

    sorted_Q: Tensor
    """int64: row << 32 | token * L + choice."""
    start_B: Tensor
    """Places where the blocks begin, and the end."""
    num_choices: int
    num_rows: int

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First place of each block and the one behind its last."""
        return list(pairwise(self.start_B.tolist()))

    @property
    def pointers(self) -> tuple[int, int, int]:
        """How the kernels take all blocks."""
        return self.sorted_Q.data_ptr(), self.start_B.data_ptr(), len(self.start_B) - 1

    @cached_property
    def ranges(self) -> Ranges:
        """The picked rows; listed once for all tables."""
        list_rows = library().list_rows
        bounds = list(pairwise(_row_bounds(self)))
        counts = run_all(partial(list_rows, *self.pointers, a, b, None) for a, b in bounds)
        slots = [0, *accumulate(counts)]
        row_R = torch.empty(slots[-1], dtype=torch.int64)
        run_all(
            partial(list_rows, *self.pointers, a, b, row_R.data_ptr() + 8 * slot)
            for (a, b), slot in zip(bounds, slots, strict=False)
        )
        return Ranges(row_R, bounds, slots)


@final
class NativeBackend(Backend):
    """C++ kernels for float32 and float64 on a CPU."""

    name = "native"

    def __init__(self) -> None:
        self._library, self._blocks = library(), BlockPool()

    def group(self, index_ML: Tensor, num_rows: int) -> Picked:
        """Sort the pairs of each block of tokens by row."""
        tokens, choices = index_ML.shape
        if index_ML.numel() >= MAX_PAIRS:
            raise ValueError(f"{index_ML.numel()} choices exceed {MAX_PAIRS}: use smaller batches")
        index_ML = index_ML.contiguous()
        sorted_Q = torch.empty(index_ML.numel(), dtype=torch.int64)
        scratch_Q = torch.empty_like(sorted_Q)
        start_B = choices * torch.tensor(split_work(tokens, index_ML.numel() * NUMBERS_PER_PAIR))
        picked = Picked(sorted_Q, start_B, choices, num_rows)
        arguments = [t.data_ptr() for t in (sorted_Q, scratch_Q)]
        run_all(
            partial(self._library.sort_pairs, index_ML.data_ptr(), a, b, num_rows, *arguments)
            for a, b in picked.blocks
        )
        return picked

    def dots(self, picked: Picked, table_ND: Tensor, x_MD: Tensor) -> Tensor:
        """A sorted sweep over the table, one inner product per pair."""
        x_MD = x_MD.contiguous()
        out_ML = x_MD.new_empty(len(x_MD), picked.num_choices)
        self._sweep("dots", picked, table_ND, x_MD, out_ML)
        return out_ML

    def bag(self, picked: Picked, table_ND: Tensor, weight_ML: Tensor) -> Tensor:
        """A sorted sweep over the table, each row added to the tokens that picked it."""
        out_MD = table_ND.new_zeros(len(weight_ML), table_ND.shape[1])
        self._sweep("bag", picked, table_ND, weight_ML.contiguous(), out_MD)
        return out_MD

    def _sweep(
        self, name: str, picked: Picked, table_ND: Tensor, source: Tensor, out: Tensor
    ) -> None:
        kernel = function(name, table_ND.dtype)
        table_ND = table_ND.contiguous()
        shape = (picked.num_choices, table_ND.shape[1])
        arguments = [t.data_ptr() for t in (table_ND, source, out)]
        run_all(
            partial(kernel, picked.sorted_Q.data_ptr(), a, b, *shape, *arguments)
            for a, b in picked.blocks
        )

    def row_sums(self, picked: Picked, x_MD: Tensor, weight_ML: Tensor) -> RowGradient:
        """A sorted sweep over the pairs, each row summed where it stands and written once."""
        x_MD, weight_ML = x_MD.contiguous(), weight_ML.contiguous()
        row_R, bounds, slots = picked.ranges
        grad_RD = self._blocks.empty((len(row_R), x_MD.shape[1]), x_MD.dtype)
        shape = (picked.num_choices, x_MD.shape[1])
        pointers = (weight_ML.data_ptr(), x_MD.data_ptr())
        kernel = function("row_sums", x_MD.dtype)
        run_all(
            partial(kernel, *picked.pointers, a, b, *shape, *pointers, slot, grad_RD.data_ptr())
            for (a, b), slot in zip(bounds, slots, strict=False)
        )
        return RowGradient(row_R, grad_RD)

    def best_pairs(self, scores_MHPS: Tensor, k: int, score_MHK: Tensor, index_MHK: Tensor) -> None:
        """One pass over the scores with the k best so far at hand."""
        tokens, heads, _, size = scores_MHPS.shape
        strides = scores_MHPS.stride()
        kernel = function("best_pairs", scores_MHPS.dtype)
        run_all(
            partial(
                kernel,
                scores_MHPS[a:b].data_ptr(),
                *(b - a, heads, *strides[:3], size, k),
                *(score_MHK[a:b].data_ptr(), index_MHK[a:b].data_ptr()),
            )
            for a, b in pairwise(split_work(tokens, scores_MHPS.numel()))
        )


def _row_bounds(picked: Picked) -> list[int]:
    """Bounds of row ranges of similar work: quantiles of the first block's rows."""
    parts, end = len(picked.blocks), picked.blocks[0][1]
    inner = {int(picked.sorted_Q[end * part // parts]) >> 32 for part in range(1, parts)}
    return [0, *sorted(inner - {0}), picked.num_rows]
