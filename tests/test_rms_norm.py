"""The CPU's normalisation against PyTorch's."""

import pytest
import torch

from peer_scaling.kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-6


def inputs(dtype, shape=(3, 5, 8)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    gain = torch.rand(shape[-1], dtype=torch.float64, generator=generator).to(dtype)
    return x, gain.requires_grad_()


def results(function, x, gain):
    y = function(x, gain, EPS)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = [y.detach(), x.grad, gain.grad]
    x.grad = gain.grad = None
    return found


def error(a, b):
    return float((a.double() - b).abs().max() / b.abs().max())


def test_it_equals_pytorchs_in_float64():
    x, gain = inputs(torch.float64)
    for a, b in zip(results(rms_norm, x, gain), results(rms_norm_reference, x, gain), strict=True):
        assert error(a, b) <= 1e-12


@pytest.mark.parametrize("shape", [(2, 512, 256), (1, 1, 4)])
def test_float32_errs_as_little_as_pytorchs(shape):
    x, gain = inputs(torch.float32, shape)
    exact = results(rms_norm_reference, *(t.detach().double().requires_grad_() for t in (x, gain)))
    ours, plain = (results(f, x, gain) for f in (rms_norm, rms_norm_reference))
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert error(a, truth) <= max(2 * error(b, truth), 2**-21)


def test_gradients_pass_pytorchs_check():
    x, gain = inputs(torch.float64, (2, 3, 4))
    assert torch.autograd.gradcheck(lambda x_, g: rms_norm(x_, g, EPS), (x, gain))
    assert torch.autograd.gradcheck(lambda x_: rms_norm(x_, None, EPS), (x,))
