"""Products of groups of rows, each group with its own matrix: experts without a loop over them.

Shape suffixes: M rows, sorted by expert, E experts, F and D widths, C rows of one expert.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

ALIGNMENT = 16
"""Bytes that a row must be a multiple of for `torch.nn.functional.grouped_mm`."""
GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that it knows; tests use float64."""


def grouped_linear(x_MD: Tensor, weight_EFD: Tensor, end_E: Tensor) -> Tensor:
    """y_m = weight[e_m] x_m, with the rows of expert e at [end[e - 1], end[e]).

    Args:
        x_MD: rows, those of one expert together, in the order of the experts.
        weight_EFD: one matrix per expert.
        end_E: int32, where each expert's rows end; the last is M. An expert may have none.

    Returns:
        (M, F), in autocast's type where autocast is on; each row has the bits of
        `linear(rows of its expert, its matrix)`. An expert without rows gets a gradient of 0.

    PyTorch's grouped product, where it knows the type and the widths; the definition elsewhere.
    """
    x_MD, weight_EFD = _cast(x_MD, weight_EFD)
    if not _supported(x_MD, weight_EFD):
        return grouped_linear_reference(x_MD, weight_EFD, end_E)
    y_MF = functional.grouped_mm(x_MD.contiguous(), weight_EFD.mT, offs=end_E)
    return cast(Tensor, _ContiguousGradient.apply(y_MF))


def grouped_linear_reference(x_MD: Tensor, weight_EFD: Tensor, end_E: Tensor) -> Tensor:
    """The definition of `grouped_linear`: one product after the other. Waits for the device."""
    sizes = torch.diff(end_E, prepend=end_E.new_zeros(1)).tolist()
    parts = zip(x_MD.split(sizes), weight_EFD.unbind(), strict=True)
    return torch.cat([functional.linear(x_CD, weight_FD) for x_CD, weight_FD in parts])


def batched_linear(x_ECD: Tensor, weight_EFD: Tensor) -> Tensor:
    """(E, C, F): the rows of each expert times its matrix, as many rows for each, in autocast's
    type where autocast is on. As `torch.bmm`, but the gradient of the weights comes in their own
    layout; PyTorch's comes transposed and is copied, for 128 experts almost half of the time.
    """
    return cast(Tensor, _BatchedLinear.apply(*_cast(x_ECD, weight_EFD)))


def permuted(x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
    """Rows `x[order]`; `inverse` undoes `order`, so the gradient is a gather too, without the sums
    that PyTorch expects of an index that might repeat.
    """
    return cast(Tensor, _Permuted.apply(x_MD, order_M, inverse_M))


class _ContiguousGradient(torch.autograd.Function):
    """The identity. The grouped product's own backward pass refuses, for example, the gradient of
    a sum, which is one number with strides of 0 (PyTorch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, x_MF: Tensor) -> Tensor:
        return x_MF.view_as(x_MF)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_MF: Tensor
    ) -> Tensor:
        return grad_MF.contiguous()


class _BatchedLinear(torch.autograd.Function):
    """`batched_linear` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x_ECD: Tensor, weight_EFD: Tensor) -> Tensor:
        ctx.save_for_backward(x_ECD, weight_EFD)
        return torch.bmm(x_ECD, weight_EFD.mT)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_ECF: Tensor
    ) -> tuple[Tensor, Tensor]:
        x_ECD, weight_EFD = ctx.saved_tensors
        return torch.bmm(grad_ECF, weight_EFD), torch.bmm(grad_ECF.mT, x_ECD)


class _Permuted(torch.autograd.Function):
    """`permuted` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD.index_select(0, order_M)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_MD: Tensor
    ) -> tuple[Tensor, None, None]:
        (inverse_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, inverse_M), None, None


def _cast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's type, which knows neither our functions nor PyTorch's grouped product."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype)


def _supported(x_MD: Tensor, weight_EFD: Tensor) -> bool:
    if x_MD.dtype != weight_EFD.dtype or x_MD.dtype not in GROUPED_TYPES or not len(x_MD):
        return False
    widths = weight_EFD.shape[1:]
    return all(width * x_MD.element_size() % ALIGNMENT == 0 for width in widths)
