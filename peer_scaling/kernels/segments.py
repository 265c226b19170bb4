"""Gradients of table rows: sums over the (token, choice) pairs that picked a row, without atomics.

A stable sort brings the pairs of one row together in the order of their tokens, so every sum has
one order: the same bits on every execution.

Shape suffixes: M tokens, L choices per token, Q = M * L pairs, N table rows, R rows that some pair
picked, D model width.
"""

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """The pairs of an (M, L) index, grouped by the row that they picked."""

    pair_Q: Tensor
    """int64 pair numbers (token * L + choice), by row, within a row in ascending order."""
    row_R: Tensor
    """int64 rows that some pair picked, ascending."""
    start_R: Tensor
    """int64 place in `pair_Q` where each row's pairs begin."""


class TableGradient(Enum):
    """The form in which a table's gradient arrives in `.grad`."""

    DENSE = "dense"
    """An (N, D) tensor, as any optimiser takes it."""
    ROWS = "rows"
    """A coalesced sparse tensor of the chosen rows, as `nn.Embedding(sparse=True)` gives it, for
    `peer_scaling.adamw`: no table-sized tensor is made."""


class RowGradient(NamedTuple):
    """The gradient of an (N, D) table as the rows that are not zero for sure."""

    row_R: Tensor
    """int64, ascending, without repetition."""
    grad_RD: Tensor

    def formed(self, num_rows: int, form: TableGradient) -> Tensor:
        """The (N, D) gradient in the form that was asked for."""
        return self.dense(num_rows) if form is TableGradient.DENSE else self.sparse(num_rows)

    def dense(self, num_rows: int) -> Tensor:
        """The whole (N, D) gradient."""
        grad_ND = self.grad_RD.new_zeros(num_rows, self.grad_RD.shape[1])
        return grad_ND.index_copy_(0, self.row_R, self.grad_RD)

    def sparse(self, num_rows: int) -> Tensor:
        """The (N, D) gradient as a coalesced sparse tensor, as of `nn.Embedding(sparse=True)`."""
        shape = (num_rows, self.grad_RD.shape[1])
        # PyTorch 2.11 warns of checks that are off unless they are switched off, argument or not.
        with torch.sparse.check_sparse_tensor_invariants(False):
            return torch.sparse_coo_tensor(self.row_R[None], self.grad_RD, shape, is_coalesced=True)


def sort_segments(index_ML: Tensor) -> Segments:
    """Group the pairs of `index_ML` by row. Waits for the device: the number of rows is data."""
    sorted_Q, pair_Q = index_ML.flatten().sort(stable=True)
    row_R, count_R = sorted_Q.unique_consecutive(return_counts=True)
    return Segments(pair_Q, row_R, count_R.cumsum(0) - count_R)
