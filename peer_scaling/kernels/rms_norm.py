"""Root-mean-square normalisation that a CPU computes in few passes over memory.

Shape suffixes: M tokens, D model width.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, gain_D: Tensor | None, eps: float) -> Tensor:
    """X / sqrt(mean(x^2) + eps) over the last dimension, times the gain if there is one.

    Same shape and type as `x`. PyTorch's own kernel on a GPU; on a CPU PyTorch has none for the
    gradient and composes it of many operations, so there it is written out.

    Source: Zhang and Sennrich 2019 (1910.07467), equation (4).
    """
    if x.device.type != "cpu":
        return rms_norm_reference(x, gain_D, eps)
    y_MD = cast(Tensor, _RMSNorm.apply(x.flatten(0, -2), gain_D, eps))
    return y_MD.view_as(x)


def rms_norm_reference(x: Tensor, gain_D: Tensor | None, eps: float) -> Tensor:
    """The definition of `rms_norm`, as PyTorch has it."""
    return functional.rms_norm(x, x.shape[-1:], gain_D, eps)


class _RMSNorm(torch.autograd.Function):
    """`rms_norm` of (M, D) with its gradients; `scale` is one over the root mean square."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, gain_D: Tensor | None, eps: float) -> Tensor:
        norm_M1 = torch.linalg.vector_norm(x_MD, dim=1, keepdim=True)
        scale_M1 = norm_M1.square_().div_(x_MD.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_MD, gain_D, scale_M1)
        y_MD = x_MD * scale_M1
        return y_MD if gain_D is None else y_MD.mul_(gain_D)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_MD: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        x_MD, gain_D, scale_M1 = ctx.saved_tensors
        product_MD = grad_MD * x_MD
        if gain_D is None:
            gain_grad_D, dot_M1 = None, product_MD.sum(1, keepdim=True)
            x_grad_MD = grad_MD * scale_M1
        else:
            dot_M1 = torch.mv(product_MD, gain_D)[:, None]
            # Not as a product: over many tokens, `sum` rounds less.
            gain_grad_D = product_MD.mul_(scale_M1).sum(0)
            x_grad_MD = (grad_MD * gain_D).mul_(scale_M1)
        # d(scale)/dx = -scale^3 x / D
        x_grad_MD.addcmul_(x_MD, dot_M1 * scale_M1.pow(3), value=-1 / x_MD.shape[1])
        return x_grad_MD, gain_grad_D, None
