"""Evaluation of the table rows that a router has chosen: plain PyTorch, exact by construction.

Shape suffixes: M tokens, L choices per token (heads x kept per head), N table rows, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def weighted_rows(index_ML: Tensor, weight_ML: Tensor, table_ND: Tensor) -> Tensor:
    """y_m = sum_l weight_ml table[index_ml]: what a product-key memory returns.

    Shapes in the suffixes, result (M, D). A row chosen twice counts twice.

    Source: Lample et al. 2019 (1907.05242), equation (3).
    """
    rows_MLD = functional.embedding(index_ML, table_ND)
    return torch.einsum("ml,mld->md", weight_ML, rows_MLD)


def single_neuron_experts(
    x_MD: Tensor,
    index_ML: Tensor,
    weight_ML: Tensor,
    down_ND: Tensor,
    up_ND: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """y_m = sum_l weight_ml sigma(down[i_ml] . x_m) up[i_ml], with i = index.

    Shapes in the suffixes, result (M, D). Weights multiply after the non-linearity.

    Source: He 2024 (2407.04153), equations (3), (6), (7) and algorithm 1.
    """
    down_MLD = functional.embedding(index_ML, down_ND)
    hidden_ML = activation(torch.einsum("md,mld->ml", x_MD, down_MLD))
    return weighted_rows(index_ML, hidden_ML * weight_ML, up_ND)
