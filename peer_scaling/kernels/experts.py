"""Evaluation of the table rows that a router has chosen, with derivatives; exact.

No backend holds (tokens, choices, width) numbers, forward or backward, and between the two only
indices, gates and one number per choice are kept. The gradient of a table has the rows that were
chosen and no others; `TableGradient` says in which form it arrives.

Shape suffixes: M tokens, L choices per token (heads x kept per head), N table rows, D model width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from peer_scaling.kernels import plain
from peer_scaling.kernels.activations import ACTIVATIONS
from peer_scaling.kernels.backend import Backend
from peer_scaling.kernels.dispatch import backend_for
from peer_scaling.kernels.segments import TableGradient


def weighted_rows(
    index_ML: Tensor,
    weight_ML: Tensor,
    table_ND: Tensor,
    table_gradient: TableGradient = TableGradient.DENSE,
) -> Tensor:
    """y_m = sum_l weight_ml table[index_ml]: what a product-key memory returns.

    Shapes in the suffixes, result (M, D). A row chosen twice counts twice.

    Raises:
        IndexError: on a CPU, an index is outside the table (a GPU is not waited for).
        TypeError: an index that is not int64, or a weight of another type than the table.
        ValueError: shapes or devices that do not fit together.

    Source: Lample et al. 2019 (1907.05242), equation (3).
    """
    _check(index_ML, {"weight": weight_ML}, {"table": table_ND})
    backend = backend_for(table_ND.device, table_ND.dtype)
    if backend is None or not index_ML.numel():
        return plain.weighted_rows(index_ML, weight_ML, table_ND)
    return _WeightedRows.apply(index_ML, weight_ML, table_ND, table_gradient, backend)


def single_neuron_experts(
    x_MD: Tensor,
    index_ML: Tensor,
    gate_ML: Tensor,
    down_ND: Tensor,
    up_ND: Tensor,
    activation: str,
    table_gradient: TableGradient = TableGradient.DENSE,
) -> Tensor:
    """y_m = sum_l gate_ml sigma(down[i_ml] . x_m) up[i_ml], with i = index.

    Shapes in the suffixes, result (M, D). Gates multiply after the non-linearity. An expert chosen
    twice counts twice.

    Raises:
        IndexError, TypeError, ValueError: as `weighted_rows`; an unknown activation.

    Source: He 2024 (2407.04153), equations (3), (6), (7) and algorithm 1.
    """
    _check(index_ML, {"gate": gate_ML, "x": x_MD}, {"down": down_ND, "up": up_ND})
    if x_MD.shape != (len(index_ML), down_ND.shape[1]) or down_ND.shape != up_ND.shape:
        shapes = [tuple(t.shape) for t in (x_MD, index_ML, down_ND, up_ND)]
        raise ValueError(f"x, index, down and up do not fit together: {shapes}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown: {', '.join(ACTIVATIONS)}")
    backend = backend_for(down_ND.device, down_ND.dtype)
    if backend is None or not index_ML.numel():
        return plain.single_neuron_experts(x_MD, index_ML, gate_ML, down_ND, up_ND, activation)
    return _Experts.apply(
        x_MD, index_ML, gate_ML, down_ND, up_ND, activation, table_gradient, backend
    )


class _WeightedRows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        index_ML: Tensor,
        weight_ML: Tensor,
        table_ND: Tensor,
        form: TableGradient,
        backend: Backend,
    ) -> Tensor:
        ctx.save_for_backward(index_ML, weight_ML, table_ND)
        ctx.form, ctx.backend = form, backend
        return backend.bag(backend.group(index_ML, len(table_ND)), table_ND, weight_ML)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        index_ML, weight_ML, table_ND = ctx.saved_tensors
        picked = ctx.backend.group(index_ML, len(table_ND))
        grad_weight_ML, grad_table = None, None
        if ctx.needs_input_grad[1]:
            grad_weight_ML = ctx.backend.dots(picked, table_ND, grad_MD)
        if ctx.needs_input_grad[2]:
            grad_table = ctx.backend.table_gradient(picked, grad_MD, weight_ML, table_ND, ctx.form)
        return None, grad_weight_ML, grad_table, None, None


class _Experts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        index_ML: Tensor,
        gate_ML: Tensor,
        down_ND: Tensor,
        up_ND: Tensor,
        activation: str,
        form: TableGradient,
        backend: Backend,
    ) -> Tensor:
        y_MD, pre_ML = backend.experts(x_MD, index_ML, gate_ML, down_ND, up_ND, activation)
        ctx.save_for_backward(x_MD, index_ML, gate_ML, pre_ML, down_ND, up_ND)
        ctx.activation, ctx.form, ctx.backend = activation, form, backend
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = ctx.backend.experts_backward(grad_MD, *ctx.saved_tensors, ctx.activation, ctx.form)
        return found.x_MD, None, found.gate_ML, found.down_ND, found.up_ND, None, None, None


def _check(index_ML: Tensor, values: dict[str, Tensor], tables: dict[str, Tensor]) -> None:
    table_ND = next(iter(tables.values()))
    for name, tensor in (values | tables).items():
        if tensor.dtype != table_ND.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, the table {table_ND.dtype}")
        if tensor.device != index_ML.device:
            raise ValueError(f"{name} is on {tensor.device}, the index on {index_ML.device}")
        if tensor.ndim != 2:
            raise ValueError(f"{name} must have 2 dimensions, not {tuple(tensor.shape)}")
    if index_ML.dtype != torch.int64:
        raise TypeError(f"the index is {index_ML.dtype}, not int64")
    for name, tensor in values.items():
        if name != "x" and tensor.shape != index_ML.shape:
            shapes = f"{tuple(tensor.shape)} and {tuple(index_ML.shape)}"
            raise ValueError(f"{name} and index differ in shape: {shapes}")
    if index_ML.device.type == "cpu" and index_ML.numel():
        low, high = index_ML.aminmax()
        if low < 0 or high >= len(table_ND):
            raise IndexError(f"index {int(low)}..{int(high)} leaves the {len(table_ND)} table rows")
