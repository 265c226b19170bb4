"""The backend of CUDA devices: Triton kernels behind the contract of backend.py.

A dense table gradient is summed by atomic additions, which is faster and waits for nothing, unless
PyTorch was told to be deterministic; rows are always summed in order.

Shape suffixes: see backend.py.
"""

from typing import cast, final

import torch
from torch import Tensor

from peer_scaling.kernels import torch_backend, triton_rows
from peer_scaling.kernels.backend import Backend, ExpertGradients
from peer_scaling.kernels.segments import RowGradient, TableGradient
from peer_scaling.kernels.triton_scatter import table_gradients


@final
class TritonBackend(Backend):
    """Fused kernels for float32 and bfloat16."""

    name = "triton"

    def group(self, index_ML: Tensor, num_rows: int) -> Tensor:
        """The index itself."""
        del num_rows
        return index_ML.contiguous()

    def dots(self, picked: Tensor, table_ND: Tensor, x_MD: Tensor) -> Tensor:
        """One program per token."""
        return triton_rows.dots(picked, table_ND, x_MD.contiguous(), x_MD.dtype)

    def bag(self, picked: Tensor, table_ND: Tensor, weight_ML: Tensor) -> Tensor:
        """One program per token."""
        return triton_rows.bag_forward(picked, weight_ML.contiguous(), table_ND)

    def row_sums(self, picked: Tensor, x_MD: Tensor, weight_ML: Tensor) -> RowGradient:
        """One program per picked row, after a sort."""
        return cast(RowGradient, self._sums(picked, x_MD, weight_ML, x_MD, compact=True))

    def table_gradient(
        self, picked: Tensor, x_MD: Tensor, weight_ML: Tensor, table_ND: Tensor, form: TableGradient
    ) -> Tensor:
        """Rows in order, or a dense gradient by atomic additions where that is allowed."""
        compact = form is TableGradient.ROWS
        found = self._sums(picked, x_MD, weight_ML, table_ND, compact=compact)
        return found.sparse(len(table_ND)) if isinstance(found, RowGradient) else found

    def _sums(
        self, picked: Tensor, x_MD: Tensor, weight_ML: Tensor, table_ND: Tensor, *, compact: bool
    ) -> RowGradient | Tensor:
        term = (x_MD.contiguous(), weight_ML.contiguous(), table_ND)
        (found,) = table_gradients(picked, term, compact=compact, atomic=_atomic())
        return found

    def best_pairs(self, scores_MHPS: Tensor, k: int, score_MHK: Tensor, index_MHK: Tensor) -> None:
        """PyTorch's top-k."""
        torch_backend.best_pairs(scores_MHPS, k, score_MHK, index_MHK)

    def experts(
        self,
        x_MD: Tensor,
        index_ML: Tensor,
        gate_ML: Tensor,
        down_ND: Tensor,
        up_ND: Tensor,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        """One program per token, from the inner products to the sum."""
        vectors = (x_MD.contiguous(), index_ML.contiguous(), gate_ML.contiguous())
        return triton_rows.experts_forward(*vectors, down_ND, up_ND, activation)

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
        """One program per token, then the table gradients."""
        x, gate, *tables = triton_rows.experts_backward(
            grad_MD.contiguous(),
            x_MD.contiguous(),
            index_ML.contiguous(),
            gate_ML.contiguous(),
            pre_ML,
            down_ND,
            up_ND,
            activation,
            compact=form is TableGradient.ROWS,
            atomic=_atomic(),
        )
        down, up = (t.sparse(len(up_ND)) if isinstance(t, RowGradient) else t for t in tables)
        return ExpertGradients(x, gate, down, up)


def _atomic() -> bool:
    return not torch.are_deterministic_algorithms_enabled()
