"""Evaluation of chosen table rows, and its gradients, by Triton kernels: for CUDA tensors.

The functions take contiguous tensors on one device and know no autograd. `index` is int64 in
[0, N), unchecked. Tables, vectors and weights may be float32, bfloat16, float16 or float64, each
its own; sums are taken in float32, or in float64 if one of them has it. Results have the type of
what they are the gradient of; y that of x, or of the table in a bag.

The kernels are bound by memory. `bytes_moved` counts what a pass cannot avoid without reuse in the
cache, so bytes over time against the copy bandwidth is the share of the roofline that is reached.
At d = 1024 in bfloat16, 128 experts per token: 512 KiB forward, 512 KiB backward without the table
gradients, and these write up to as much again.

Shape suffixes: M tokens, L choices per token (heads x kept per head), N table rows, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from peer_scaling.kernels.segments import RowGradient
from peer_scaling.kernels.triton_gather import (
    bag_kernel,
    dots_kernel,
    experts_backward_kernel,
    experts_forward_kernel,
)
from peer_scaling.kernels.triton_scatter import table_gradients
from peer_scaling.kernels.triton_tiles import accumulator, launch, tile_of


def bag_forward(index_ML: Tensor, weight_ML: Tensor, table_ND: Tensor) -> Tensor:
    """y_m = sum_l weight_ml table[index_ml], as (M, D)."""
    (num_tokens, choices), width = index_ML.shape, table_ND.shape[1]
    y_MD = table_ND.new_empty(num_tokens, width)
    args = (table_ND, index_ML, weight_ML, y_MD, choices)
    launch(bag_kernel, num_tokens, args, tile_of(width, table_ND.itemsize), D=width)
    return y_MD


def dots(index_ML: Tensor, table_ND: Tensor, x_MD: Tensor, dtype: torch.dtype) -> Tensor:
    """s_ml = table[index_ml] . x_m, as (M, L) of type `dtype`."""
    (num_tokens, choices), width = index_ML.shape, table_ND.shape[1]
    out_ML = x_MD.new_empty(num_tokens, choices, dtype=dtype)
    args = (table_ND, index_ML, x_MD, out_ML, choices)
    launch(dots_kernel, num_tokens, args, tile_of(width, table_ND.itemsize), D=width)
    return out_ML


def bag_backward(
    grad_MD: Tensor,
    index_ML: Tensor,
    weight_ML: Tensor,
    table_ND: Tensor,
    *,
    compact: bool,
    atomic: bool,
) -> tuple[Tensor, RowGradient | Tensor]:
    """Gradients of the weights and of the table; see `table_gradients` for the options."""
    grad_weight_ML = dots(index_ML, table_ND, grad_MD, weight_ML.dtype)
    term = (grad_MD, weight_ML, table_ND)
    (grad_table,) = table_gradients(index_ML, term, compact=compact, atomic=atomic)
    return grad_weight_ML, grad_table


def experts_forward(
    x_MD: Tensor,
    index_ML: Tensor,
    gate_ML: Tensor,
    down_ND: Tensor,
    up_ND: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """pre_ml = down[index_ml] . x_m and y_m = sum_l gate_ml sigma(pre_ml) up[index_ml].

    Returns:
        y, (M, D), and pre, (M, L) in the accumulator's type, which the backward pass asks for.
    """
    (num_tokens, choices), width = index_ML.shape, x_MD.shape[1]
    acc = accumulator(x_MD, gate_ML, down_ND, up_ND)
    y_MD = torch.empty_like(x_MD)
    pre_ML = gate_ML.new_empty(num_tokens, choices, dtype=acc)
    args = (x_MD, index_ML, gate_ML, down_ND, up_ND, y_MD, pre_ML, choices)
    tile = tile_of(width, down_ND.itemsize, num_tables=2)
    launch(experts_forward_kernel, num_tokens, args, tile, D=width, ACTIVATION=activation)
    return y_MD, pre_ML


def experts_backward(
    grad_MD: Tensor,
    x_MD: Tensor,
    index_ML: Tensor,
    gate_ML: Tensor,
    pre_ML: Tensor,
    down_ND: Tensor,
    up_ND: Tensor,
    activation: str,
    *,
    compact: bool,
    atomic: bool,
) -> tuple[Tensor, Tensor, RowGradient | Tensor, RowGradient | Tensor]:
    """Gradients of x, the gates, down and up; see `table_gradients` for the options."""
    (num_tokens, choices), width = index_ML.shape, x_MD.shape[1]
    grad_x_MD, grad_gate_ML = torch.empty_like(x_MD), torch.empty_like(gate_ML)
    grad_pre_ML, weight_ML = torch.empty_like(pre_ML), torch.empty_like(pre_ML)
    inputs = (grad_MD, index_ML, gate_ML, pre_ML, down_ND, up_ND)
    args = (*inputs, grad_x_MD, grad_gate_ML, grad_pre_ML, weight_ML, choices)
    tile = tile_of(width, down_ND.itemsize, num_tables=2)
    launch(experts_backward_kernel, num_tokens, args, tile, D=width, ACTIVATION=activation)
    terms = ((x_MD, grad_pre_ML, down_ND), (grad_MD, weight_ML, up_ND))
    grad_down, grad_up = table_gradients(index_ML, *terms, compact=compact, atomic=atomic)
    return grad_x_MD, grad_gate_ML, grad_down, grad_up


class Traffic(NamedTuple):
    """Bytes that the passes of a layer move."""

    forward: int
    backward: int


def bytes_moved(
    shape: tuple[int, int], rows: int, d_model: int, itemsize: int, num_tables: int
) -> Traffic:
    """Bytes to and from memory if every read of a table row misses the cache: a lower bound.

    Args:
        shape: tokens and choices per token.
        rows: distinct rows that the tokens chose, whose gradients are written once.
        d_model: width of the rows.
        itemsize: bytes of an element of the tables and vectors.
        num_tables: 1 for a bag, 2 for experts.

    Each pass reads each chosen row. The vectors of a batch, which the table gradients read once for
    each pair, count once: they mostly stay in the cache. The (M, L) tensors, the sort, the zeros of
    a dense gradient and a second visit by atomic additions do not count.
    """
    tokens, choices = shape
    vector = d_model * itemsize
    gathered, streamed = tokens * choices * num_tables * vector, tokens * num_tables * vector
    return Traffic(gathered + streamed, gathered + 2 * streamed + rows * num_tables * vector)
