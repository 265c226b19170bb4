"""AdamW on a table whose gradient has some of the rows: `adamw.cpp`, one range per thread.

Shape suffixes: N rows of the table, R rows of the gradient, D width.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from peer_scaling.kernels.native import function, run_all, split_work
from peer_scaling.kernels.segments import RowGradient


class Rates(NamedTuple):
    """The numbers of one AdamW step; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


def adamw_rows(
    tables: Sequence[Tensor], gradient: RowGradient, rates: Rates, *, lazy: bool
) -> None:
    """One step, in place, of a table, its first moments and its second: (N, D), contiguous, on the
    CPU, float32 or float64. Rows without a gradient have one of 0, or are left alone if `lazy`.
    """
    num_rows, width = tables[0].shape
    row_R, grad_RD = gradient.row_R.contiguous(), gradient.grad_RD.contiguous()
    numbers = torch.tensor(_numbers(rates), dtype=torch.float64)
    update = function("adamw", grad_RD.dtype)
    pointers = [table.data_ptr() for table in tables]
    found = (row_R.data_ptr(), len(row_R), grad_RD.data_ptr(), numbers.data_ptr(), int(lazy))
    bounds = split_work(num_rows, grad_RD.numel() if lazy else num_rows * width)
    run_all(partial(update, *pointers, width, a, b, *found) for a, b in pairwise(bounds))


def _numbers(rates: Rates) -> list[float]:
    """As `adamw.cpp` takes them."""
    lr, beta1, beta2, eps, decay, step = rates
    return [
        1 - lr * decay,
        lr / (1 - beta1**step),
        beta1,
        beta2,
        eps,
        1 / sqrt(1 - beta2**step),
    ]
