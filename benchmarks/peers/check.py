"""Exactness: outputs and all gradients of an implementation against float64, before any timing."""

import torch
from torch import Tensor

from benchmarks.peers.backends import forced
from benchmarks.peers.contender import Case, Contender, Truth, inputs

TOKENS = 16
"""Few enough for a search over all keys and for no near-ties between float32 scores."""
TOLERANCE = 1e-4
"""Largest relative error: float32 sums over some hundred terms are good to about 1e-6."""


def relative_error(contender: Contender, case: Case) -> float | None:
    """The largest error over the output and each gradient; None for a function of its own."""
    if contender.truth is None:
        return None
    x_BTD, grad_BTD = inputs(case, TOKENS)
    truth = contender.truth(x_BTD, grad_BTD)
    with forced(contender.backend):
        y_BTD = contender.module(x_BTD)
        y_BTD.backward(grad_BTD)
    found = {**contender.module.gradients(), "x_BTD": x_BTD.grad}
    errors = [_error(y_BTD, truth.y_BTD)]
    errors += [_gradient_error(found[name], name, truth) for name in truth.grads]
    contender.module.zero_grad(set_to_none=True)
    return max(errors)


def _gradient_error(grad: Tensor | None, name: str, truth: Truth) -> float:
    expected = truth.grads[name]
    if grad is None:
        return float("inf")
    grad = grad.to_dense() if grad.is_sparse else grad
    if truth.row_R is None or not name.endswith("_ND"):
        return _error(grad, expected)
    # No dense difference: a table can be a GiB.
    size_N = torch.linalg.vector_norm(grad, dim=1)
    outside = float(size_N.index_fill(0, truth.row_R, 0.0).max() / expected.abs().max())
    return max(_error(grad[truth.row_R], expected), outside)


def _error(found: Tensor, expected: Tensor) -> float:
    difference = (found.detach().double() - expected).abs().max() / expected.abs().max()
    return float(difference) if difference.isfinite() else float("inf")
