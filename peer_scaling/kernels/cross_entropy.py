"""Cross-entropy of a large vocabulary, in chunks of tokens: all logits never stand in memory.

The gradients of the summed loss are made in the forward pass, chunk by chunk, while the chunk's
logits are at hand (as Hsu et al. 2024, Liger Kernel, 2410.10989, section 3.2); the backward pass
only scales them. Nothing is computed twice, and what is kept is the size of the inputs.

Shape suffixes: M tokens, V vocabulary, D model width, C tokens of one chunk.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""Bytes of the logits of one chunk, by type of device; other types use the GPU's. On a CPU, 16 MiB
are reused from chunk to chunk without a page fault and stay near the cache; a GPU wants products
large enough to fill it."""


def cross_entropy_sum(x_MD: Tensor, head_VD: Tensor, target_M: Tensor) -> Tensor:
    """Summed cross-entropy, in nats, of the logits x head^T.

    Args:
        x_MD: final hidden states.
        head_VD: output head; float32 parameters may meet hidden states of autocast's type.
        target_M: int64 tokens in [0, V).

    Returns:
        A float64 scalar, differentiable once in `x_MD` and `head_VD`. Products are in autocast's
        type where autocast is on, the softmax in float32 at least, the sum in float64.
    """
    dtype = _product_dtype(x_MD, head_VD)
    if torch.is_grad_enabled() and (x_MD.requires_grad or head_VD.requires_grad):
        return cast(Tensor, _CrossEntropySum.apply(x_MD, head_VD, target_M, dtype))
    # Casts of parameters made without gradients must not enter autocast's cache.
    with torch.autocast(x_MD.device.type, enabled=False):
        x_MD, head_VD = x_MD.to(dtype), head_VD.to(dtype)
        losses = [_chunk_loss(chunk, head_VD)[0] for chunk in _chunks(x_MD, head_VD, target_M)]
    return torch.stack(losses).sum() if losses else x_MD.new_zeros((), dtype=torch.float64)


def cross_entropy_sum_reference(x_MD: Tensor, head_VD: Tensor, target_M: Tensor) -> Tensor:
    """The definition of `cross_entropy_sum`: all logits at once, gradients by autograd."""
    logits_MV = functional.linear(x_MD, head_VD)
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return functional.cross_entropy(logits_MV, target_M, reduction="none").double().sum()


def chunk_tokens(vocab_size: int, device: str) -> int:
    """Tokens of one chunk: as many as `CHUNK_BYTES` hold logits of in float32, at least 1."""
    return max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


class _Chunk(NamedTuple):
    start: int
    x_CD: Tensor
    target_C: Tensor


class _CrossEntropySum(torch.autograd.Function):
    """`cross_entropy_sum` with gradients; the arguments are its own and the products' type."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, head_VD: Tensor, target_M: Tensor, dtype: torch.dtype
    ) -> Tensor:
        needs_x, needs_head, *_ = ctx.needs_input_grad
        ctx.dtypes = x_MD.dtype, head_VD.dtype
        with torch.autocast(x_MD.device.type, enabled=False):
            x_MD, weight_VD = x_MD.to(dtype), head_VD.to(dtype)
            x_grad_MD = torch.empty_like(x_MD) if needs_x else None
            head_grad_VD = torch.zeros_like(head_VD) if needs_head else None
            total = torch.zeros((), dtype=torch.float64, device=x_MD.device)
            for chunk in _chunks(x_MD, weight_VD, target_M):
                loss, log_CV = _chunk_loss(chunk, weight_VD)
                total += loss
                grad_CV = _logits_gradient(log_CV, chunk.target_C).to(dtype)
                if x_grad_MD is not None:
                    rows = slice(chunk.start, chunk.start + len(chunk.x_CD))
                    x_grad_MD[rows] = torch.mm(grad_CV, weight_VD)
                if head_grad_VD is not None:
                    _add_product(head_grad_VD, grad_CV.T, chunk.x_CD)
        ctx.save_for_backward(x_grad_MD, head_grad_VD)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        scaled = [
            None if saved is None else (saved * grad.to(saved.dtype)).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def _chunks(x_MD: Tensor, head_VD: Tensor, target_M: Tensor) -> Iterator[_Chunk]:
    size = chunk_tokens(len(head_VD), x_MD.device.type)
    for start in range(0, len(x_MD), size):
        yield _Chunk(start, x_MD[start : start + size], target_M[start : start + size])


def _chunk_loss(chunk: _Chunk, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """The chunk's summed loss, and the log-probabilities that it came from."""
    logits_CV = torch.mm(chunk.x_CD, head_VD.T)
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    log_CV = torch.log_softmax(logits_CV, dim=-1, dtype=dtype)
    return -log_CV.gather(1, chunk.target_C[:, None]).double().sum(), log_CV


def _logits_gradient(log_CV: Tensor, target_C: Tensor) -> Tensor:
    """Softmax minus one-hot target, in the memory of the log-probabilities."""
    grad_CV = log_CV.exp_()
    grad_CV[torch.arange(len(target_C), device=target_C.device), target_C] -= 1
    return grad_CV


def _add_product(sum_VD: Tensor, a_VC: Tensor, b_CD: Tensor) -> None:
    """Sum += a b; in the sum's own type, where the factors have a shorter one."""
    if a_VC.dtype == sum_VD.dtype:
        sum_VD.addmm_(a_VC, b_CD)
    else:
        sum_VD += torch.mm(a_VC, b_CD)


def _product_dtype(x_MD: Tensor, head_VD: Tensor) -> torch.dtype:
    device = x_MD.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(x_MD.dtype, head_VD.dtype)
