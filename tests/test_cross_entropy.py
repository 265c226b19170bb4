"""The chunked cross-entropy against its definition: loss, gradients, memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from peer_scaling.ffw.dense import Dense
from peer_scaling.kernels import cross_entropy
from peer_scaling.kernels.cross_entropy import (
    chunk_tokens,
    cross_entropy_sum,
    cross_entropy_sum_reference,
)
from peer_scaling.model import DecoderConfig, build_model

SHAPES = [(64, 6, 11), (37, 5, 13), (3, 8, 16), (1, 4, 7)]
"""Tokens, width, vocabulary; chunks of 8 tokens: whole ones, a rest, less than one, one token."""


@pytest.fixture(autouse=True)
def _chunks_of_8(monkeypatch):
    monkeypatch.setattr(cross_entropy, "chunk_tokens", lambda *_: 8)


def inputs(shape, dtype, seed=0):
    tokens, width, vocab = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    head = torch.randn(vocab, width, dtype=torch.float64, generator=generator)
    target = torch.randint(vocab, (tokens,), generator=generator)
    return x.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), target


def results(function, x, head, target):
    loss = function(x, head, target)
    (loss / 7).backward()
    found = [loss.detach().double(), x.grad.double(), head.grad.double()]
    x.grad = head.grad = None
    return found


def error(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_equal_the_definition_in_float64(shape):
    arguments = inputs(shape, torch.float64)
    ours, plain = (results(f, *arguments) for f in (cross_entropy_sum, cross_entropy_sum_reference))
    assert max(error(a, b) for a, b in zip(ours, plain, strict=True)) <= 1e-10


@pytest.mark.parametrize("shape", [(256, 32, 301), *SHAPES])
def test_float32_errs_as_little_as_the_plain_path(shape):
    arguments = inputs(shape, torch.float32)
    ours, plain = (results(f, *arguments) for f in (cross_entropy_sum, cross_entropy_sum_reference))
    exact_inputs = [a.detach().double().requires_grad_() for a in arguments[:2]]
    exact = results(cross_entropy_sum_reference, *exact_inputs, arguments[2])
    for a, b, truth in zip(ours, plain, exact, strict=True):
        # Of few numbers, an error of 0 is luck: two roundings of float32 are always allowed.
        assert error(a, truth) <= max(2 * error(b, truth), 2**-22)


def test_gradients_pass_pytorchs_check():
    x, head, target = inputs((19, 3, 5), torch.float64)
    assert torch.autograd.gradcheck(lambda x_, h: cross_entropy_sum(x_, h, target), (x, head))


def test_only_the_gradients_that_are_asked_for():
    x, head, target = inputs((19, 3, 5), torch.float64)
    both = results(cross_entropy_sum, x, head, target)
    cross_entropy_sum(x, head.detach(), target).backward()
    cross_entropy_sum(x.detach(), head, target).backward()
    assert torch.allclose(x.grad, 7 * both[1])
    assert torch.allclose(head.grad, 7 * both[2])


def test_evaluation_gives_the_same_bits_and_keeps_nothing():
    x, head, target = inputs((19, 3, 5), torch.float32)
    with torch.no_grad():
        evaluated = cross_entropy_sum(x, head, target)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, cross_entropy_sum(x, head, target).detach())


def test_autocast_rounds_products_alone():
    x, head, target = inputs((64, 32, 100), torch.float32)
    exact = results(cross_entropy_sum, x, head, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy_sum(x, head, target)
        plain = cross_entropy_sum_reference(x, head, target)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, plain)
    (loss / 7).backward()
    assert x.grad.dtype == head.grad.dtype == torch.float32
    assert error(x.grad, exact[1]) < 0.05
    assert error(head.grad, exact[2]) < 0.05


def test_a_tied_head_collects_both_gradients():
    config = DecoderConfig(d_model=8, num_layers=1, num_heads=2)
    model = build_model(config, Dense(), 20, 16, seed=0).double()
    tokens = torch.arange(17)[None] % 20
    model(tokens[:, :-1]).cross_entropy_sum(tokens[:, 1:]).backward()
    ours = model.embedding_VD.grad.clone()
    model.zero_grad()
    logits = model(tokens[:, :-1]).logits_BTV[0]
    torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").backward()
    assert error(ours, model.embedding_VD.grad) <= 1e-10


def test_the_backward_pass_keeps_no_logits():
    x, head, target = inputs((512, 8, 1000), torch.float32)

    def kept(function):
        sizes = []
        with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            function(x, head, target)
        return sum(sizes)

    assert kept(cross_entropy_sum) == x.numel() + head.numel()
    assert kept(cross_entropy_sum_reference) > 512 * 1000


def test_chunks_follow_the_bytes_of_their_logits(monkeypatch):
    monkeypatch.undo()
    assert cross_entropy.chunk_tokens(8192, "cpu") == 512
    assert chunk_tokens(32_000, "cuda") == 2097
    assert chunk_tokens(10**9, "cpu") == 1
