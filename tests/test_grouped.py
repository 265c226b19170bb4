"""Grouped products against one product after the other: outputs, gradients, empty groups, types."""

import pytest
import torch
from torch.nn.functional import linear

from peer_scaling.kernels.grouped import (
    batched_linear,
    grouped_linear,
    grouped_linear_reference,
    permuted,
)

SIZES = [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [2, 2, 2, 3]]


def inputs(sizes, dtype, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(sizes), 12, width, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.tensor(sizes).cumsum(0).int()


def results(function, x, weight, *end, sign=1.0):
    y = function(x, weight, *end)
    ramp = torch.linspace(-1, sign, y.numel(), dtype=y.dtype).view_as(y)
    (y * ramp).sum().backward()
    found = [y.detach(), x.grad, weight.grad]
    x.grad = weight.grad = None
    return found


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [8, 6])  # PyTorch's grouped product refuses rows of 24 bytes
def test_grouped_products_equal_the_definition(sizes, dtype, width):
    x, weight, end = inputs(sizes, dtype, width)
    ours = results(grouped_linear, x, weight, end)
    for a, b in zip(ours, results(grouped_linear_reference, x, weight, end), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)
    empty = [n for n, size in enumerate(sizes) if not size]
    assert torch.count_nonzero(ours[2][empty]) == 0


def test_each_row_has_the_bits_of_its_experts_product():
    x, weight, end = inputs([3, 0, 5, 1], torch.float32)
    y = grouped_linear(x, weight, end)
    assert torch.equal(y[3:8], linear(x[3:8], weight[2]))


@pytest.mark.parametrize("gradient", [lambda y: y.sum(), lambda y: y.T.square().sum()])
def test_a_gradient_of_any_layout_is_taken(gradient):
    x, weight, end = inputs([3, 0, 5, 1], torch.float32)
    gradient(grouped_linear(x, weight, end)).backward()
    ours, x.grad = x.grad, None
    gradient(grouped_linear_reference(x, weight, end)).backward()
    assert torch.allclose(ours, x.grad, atol=1e-4)


def test_batches_equal_pytorchs_product_and_keep_the_weights_layout():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(3, 7, 4, dtype=torch.float64, generator=generator).requires_grad_()
    ours = results(batched_linear, x, weight)
    for a, b in zip(ours, results(lambda x_, w: torch.bmm(x_, w.mT), x, weight), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(batched_linear, (x, weight))
    assert ours[2].is_contiguous()


@pytest.mark.parametrize("product", ["grouped", "batched"])
def test_autocast_reaches_products_and_returns_float32_gradients(product):
    x, weight, end = inputs([2, 2, 2, 2], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if product == "grouped":
            y = grouped_linear(x, weight, end)
        else:
            y = batched_linear(x.view(4, 2, 8), weight)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_permutations_are_undone_in_the_gradient():
    order = torch.tensor([2, 0, 3, 1])
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(permuted(x, order, order.argsort()), x[order])
    assert torch.autograd.gradcheck(lambda x_: permuted(x_, order, order.argsort()), (x,))
