"""AdamW that takes the gradient of a table as rows, and the norm of such gradients.

Decoupled weight decay (Loshchilov and Hutter 2019, 1711.05101, algorithm 2), at step t with rate a:

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,
    w <- (1 - a decay) w - a (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

A gradient that arrives as rows (a sparse tensor) leaves two choices for the other rows, of g = 0:

- `dense`: what the formula says. Moments of every row decay and every row goes on moving along its
  own. The C++ kernel does it in one pass; without it, the table is walked in slices, each with its
  part of the gradient in a small buffer, and the result has `torch.optim.AdamW`'s bits. Neither
  makes a gradient the size of the table.
- `lazy`: they stay as they are, moments and all, until a token picks them again; t counts all
  steps. Cost follows the rows picked, not the table. It is another optimiser: a row moves only when
  picked, so it moves less; docs/log.md has what that costs in loss. As `torch.optim.SparseAdam`,
  with the decay applied to the rows picked.

Shape suffixes: N rows of a table, R rows of a gradient, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from peer_scaling.kernels.dispatch import backend_for
from peer_scaling.kernels.native_adamw import Rates, adamw_rows
from peer_scaling.kernels.segments import RowGradient
from peer_scaling.shards import local

TABLE_UPDATES = ("dense", "lazy")
SLICE_BYTES = 2**24
"""Gradient buffer of a slice of a table. Smaller ones stay nearer to a core, but cost a meeting of
all threads each."""
SLICE_BYTES_CUDA = 2**26


@final
class AdamW(torch.optim.Optimizer):
    """Fused AdamW for dense gradients; `table_update` says what a sparse one does.

    If the attribute `found_inf` (a scalar tensor, as `torch.amp.GradScaler` sets it) is 1, a step
    changes nothing, and the host does not wait to know.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        table_update: str = "dense",
    ) -> None:
        """Groups as any PyTorch optimiser takes them, each with `lr` and `weight_decay`."""
        super().__init__(groups, {"betas": betas, "eps": eps})
        self._update_rows = {"dense": _update_all_rows, "lazy": _update_picked_rows}[table_update]
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """One update of every parameter that has a gradient; `closure` computes it first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            dense = [p for p in with_grad if not p.grad.is_sparse]
            states = [_local_state(self.state_of(p)) for p in dense]
            parts, grads = [local(p) for p in dense], [local(p.grad) for p in dense]
            _fused(group, parts, grads, states, self.found_inf)
            for p in with_grad:
                if p.grad.is_sparse:
                    self._update_rows(group, p, self.state_of(p), self.found_inf)
        return loss

    def state_of(self, p: Tensor) -> dict[str, Tensor]:
        """Count of updates and moments of a parameter; zeros before its first update."""
        if not self.state[p]:
            self.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        return self.state[p]


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    total_norm: Callable[[Sequence[Tensor]], Tensor] = torch.nn.utils.get_total_norm,
) -> Tensor:
    """Scale gradients so that their norm, of all together, is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, for sparse gradients too: rows that two micro-batches both
    picked are summed first, so the norm is that of the dense gradient.

    Args:
        parameters: those without a gradient are left out.
        max_norm: the limit.
        total_norm: the norm of all gradients given, which ranks may have in parts.

    Returns:
        The norm before, a scalar on the device of the gradients.
    """
    values = list(_gradient_values(parameters))
    norm = total_norm(values)
    if values:  # multiplied by 1 too: to ask would be to wait for the device
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        parts = [local(value) for value in values]
        torch._foreach_mul_(parts, coefficient)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def _update_all_rows(
    group: dict[str, Any], p_ND: Tensor, state: dict[str, Tensor], found_inf: Tensor | None
) -> None:
    if _update_natively(group, p_ND, state, found_inf, lazy=False):
        return
    row_R, grad_RD = _rows_of(p_ND)
    size = _slice_rows(p_ND)
    starts = range(0, len(p_ND), size)
    bounds = torch.searchsorted(row_R, torch.tensor([*starts, len(p_ND)], device=row_R.device))
    grad_ND = torch.zeros_like(p_ND[:size])
    for start, (begin, end) in zip(starts, pairwise(bounds.tolist()), strict=True):
        part = slice(start, start + size)
        here_ND, picked = grad_ND[: len(p_ND[part])], row_R[begin:end] - start
        here_ND.index_copy_(0, picked, grad_RD[begin:end])
        moments = {name: state[name][part] for name in ("exp_avg", "exp_avg_sq")}
        step = {"step": state["step"].clone()}
        _fused(group, [p_ND[part]], [here_ND], [moments | step], found_inf)
        here_ND.index_fill_(0, picked, 0.0)
    _count_step(state, found_inf)


def _update_picked_rows(
    group: dict[str, Any], p_ND: Tensor, state: dict[str, Tensor], found_inf: Tensor | None
) -> None:
    if _update_natively(group, p_ND, state, found_inf, lazy=True):
        return
    row_R, grad_RD = _rows_of(p_ND)
    tables = (p_ND, state["exp_avg"], state["exp_avg_sq"])
    for row_r, grad_rD in zip(
        row_R.split(_slice_rows(p_ND)), grad_RD.split(_slice_rows(p_ND)), strict=True
    ):
        rows, mean, square = (table.index_select(0, row_r) for table in tables)
        moments = {"step": state["step"].clone(), "exp_avg": mean, "exp_avg_sq": square}
        _fused(group, [rows], [grad_rD], [moments], found_inf)
        for table, new in zip(tables, (rows, mean, square), strict=True):
            table.index_copy_(0, row_r, new)
    _count_step(state, found_inf)


def _update_natively(
    group: dict[str, Any],
    p_ND: Tensor,
    state: dict[str, Tensor],
    found_inf: Tensor | None,
    *,
    lazy: bool,
) -> bool:
    """One pass in C++, where that is what computes for such a table; whether it was."""
    backend = backend_for(p_ND.device, p_ND.dtype)
    if backend is None or backend.name != "native" or not p_ND.is_contiguous():
        return False
    if found_inf is None or not found_inf:
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step = int(state["step"])
        rates = Rates(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], step)
        tables = (p_ND, state["exp_avg"], state["exp_avg_sq"])
        adamw_rows(tables, RowGradient(*_rows_of(p_ND)), rates, lazy=lazy)
    return True


def _fused(
    group: dict[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    found_inf: Tensor | None,
) -> None:
    if parameters:
        adamw(
            parameters,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _local_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: local(value) for name, value in state.items()}


def _count_step(state: dict[str, Tensor], found_inf: Tensor | None) -> None:
    state["step"] += 1 if found_inf is None else 1 - found_inf


def _rows_of(p: Tensor) -> tuple[Tensor, Tensor]:
    assert p.grad is not None
    grad = coalesced(p.grad)
    return grad.indices()[0], grad.values()


def coalesced(grad: Tensor) -> Tensor:
    """A sparse gradient with each row once, ascending.

    Autograd forgets that it is, and to sort it again costs as much as the update: rows that ascend
    are as they should be.
    """
    row_R = grad._indices()[0]
    if grad.is_coalesced() or not bool((row_R[1:] > row_R[:-1]).all()):
        return grad.coalesce()
    return torch.sparse_coo_tensor(
        row_R[None], grad._values(), grad.shape, is_coalesced=True, check_invariants=False
    )


def _slice_rows(p_ND: Tensor) -> int:
    limit = SLICE_BYTES_CUDA if p_ND.is_cuda else SLICE_BYTES
    return max(1, limit // (p_ND.shape[1] * p_ND.element_size()))


def _gradient_values(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """The numbers of each gradient, to be changed in place."""
    for p in parameters:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            p.grad = coalesced(p.grad)
            yield p.grad.values()
        else:
            yield p.grad
