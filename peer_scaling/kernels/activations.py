"""Non-linearities by the name that configs and kernels use."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}
"""`gelu` is the exact (erf) form."""


def activation_gradient(name: str, x: Tensor, grad: Tensor) -> Tensor:
    """`grad` times the derivative of the non-linearity at `x`, element by element."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (result,) = torch.autograd.grad(ACTIVATIONS[name](leaf), leaf, grad)
    return result
