"""What a backend does for the sparse layers, operation by operation.

A backend knows tensors, not autograd: `experts.py` and `product_keys.py` hold the derivatives and
`dispatch.py` picks the backend of a device. Every backend computes what `plain.py` defines.

Shape suffixes: M tokens, L choices per token, N table rows, R rows that were picked, D width;
H heads, P = 2 halves, S sub-keys per half, C width of a half key, K kept per head.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peer_scaling.kernels.activations import ACTIVATIONS, activation_gradient
from peer_scaling.kernels.segments import RowGradient, TableGradient

SCORE_BYTES = 2**21
"""Sub-key scores that stand in memory at a time: what stays in a core's second-level cache."""
SCORE_BYTES_CUDA = 2**28
"""On a GPU: enough tokens for a full matrix product."""


class ExpertGradients(NamedTuple):
    """Gradients of `Backend.experts`."""

    x_MD: Tensor
    gate_ML: Tensor
    down_ND: Tensor
    """In the form that was asked for, as the next one."""
    up_ND: Tensor


class Backend(ABC):
    """Look-ups in tables and the search for their rows."""

    name: str

    @abstractmethod
    def group(self, index_ML: Tensor, num_rows: int) -> Any:
        """Prepare an index; what the look-ups below take as `picked`."""

    @abstractmethod
    def dots(self, picked: Any, table_ND: Tensor, x_MD: Tensor) -> Tensor:
        """s_ml = table[index_ml] . x_m, shape (M, L)."""

    @abstractmethod
    def bag(self, picked: Any, table_ND: Tensor, weight_ML: Tensor) -> Tensor:
        """y_m = sum_l weight_ml table[index_ml], shape (M, D)."""

    @abstractmethod
    def row_sums(self, picked: Any, x_MD: Tensor, weight_ML: Tensor) -> RowGradient:
        """g_n = sum over the pairs with index_ml = n of weight_ml x_m: the gradient of a table."""

    def table_gradient(
        self, picked: Any, x_MD: Tensor, weight_ML: Tensor, table_ND: Tensor, form: TableGradient
    ) -> Tensor:
        """`row_sums` in the form that was asked for."""
        return self.row_sums(picked, x_MD, weight_ML).formed(len(table_ND), form)

    @abstractmethod
    def best_pairs(self, scores_MHPS: Tensor, k: int, score_MHK: Tensor, index_MHK: Tensor) -> None:
        """Write the k best sums of a first and a second half score, best first, and the numbers
        first * S + second. Scores that are not numbers give scores that are not.
        """

    def search(self, query_MHPC: Tensor, keys_HPSC: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the k best keys, each (M, H, K), some tokens at a time."""
        tokens, heads = query_MHPC.shape[:2]
        score_MHK = query_MHPC.new_empty(tokens, heads, k)
        index_MHK = torch.empty_like(score_MHK, dtype=torch.int64)
        per_token = heads * 2 * keys_HPSC.shape[2] * query_MHPC.element_size()
        limit = SCORE_BYTES_CUDA if query_MHPC.is_cuda else SCORE_BYTES
        chunk = max(1, limit // per_token)
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            scores_MHPS = sub_key_scores(query_MHPC[part], keys_HPSC)
            self.best_pairs(scores_MHPS, k, score_MHK[part], index_MHK[part])
        return score_MHK, index_MHK

    def experts(
        self,
        x_MD: Tensor,
        index_ML: Tensor,
        gate_ML: Tensor,
        down_ND: Tensor,
        up_ND: Tensor,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        """Output (M, D) of single-neuron experts, and their pre-activations (M, L)."""
        picked = self.group(index_ML, len(down_ND))
        pre_ML = self.dots(picked, down_ND, x_MD)
        return self.bag(picked, up_ND, ACTIVATIONS[activation](pre_ML).mul_(gate_ML)), pre_ML

    def experts_backward(
        self,
        grad_MD: Tensor,
        x_MD: Tensor,
        index_ML: Tensor,
        gate_ML: Tensor,
        pre_ML: Tensor,
        down_ND: Tensor,
        up_ND: Tensor,
        activation: str,
        form: TableGradient,
    ) -> ExpertGradients:
        """Gradients from that of the output; only the pre-activations are kept between the two."""
        picked = self.group(index_ML, len(down_ND))
        hidden_ML = ACTIVATIONS[activation](pre_ML)
        grad_weight_ML = self.dots(picked, up_ND, grad_MD)
        grad_pre_ML = activation_gradient(activation, pre_ML, grad_weight_ML * gate_ML)
        return ExpertGradients(
            self.bag(picked, down_ND, grad_pre_ML),
            grad_weight_ML.mul_(hidden_ML),
            self.table_gradient(picked, x_MD, grad_pre_ML, down_ND, form),
            self.table_gradient(picked, grad_MD, hidden_ML.mul_(gate_ML), up_ND, form),
        )


def sub_key_scores(query_MHPC: Tensor, keys_HPSC: Tensor) -> Tensor:
    """Inner products of both halves with all their sub-keys, a view (M, H, 2, S)."""
    tokens, heads, _, width = query_MHPC.shape
    num_sets, _, num_sub_keys, _ = keys_HPSC.shape
    if num_sets == 1:  # two products over the queries of all heads
        query_PMC = query_MHPC.permute(2, 0, 1, 3).reshape(2, tokens * heads, width)
        scores_PMS = torch.bmm(query_PMC, keys_HPSC[0].mT)
        return scores_PMS.view(2, tokens, heads, num_sub_keys).permute(1, 2, 0, 3)
    query_LMC = query_MHPC.permute(1, 2, 0, 3).reshape(2 * heads, tokens, width)
    scores_LMS = torch.bmm(query_LMC, keys_HPSC.flatten(0, 1).mT)
    return scores_LMS.view(heads, 2, tokens, num_sub_keys).permute(2, 0, 1, 3)
