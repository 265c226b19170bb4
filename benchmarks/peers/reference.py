"""Float64 definitions of the layers, written from the papers: no shortcut, no code of the package.

Shape suffixes: see peer_scaling/ffw/base.py; R table rows in use.
"""

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers.contender import Truth
from peer_scaling.ffw.dense import DenseFFW
from peer_scaling.ffw.moe import MoEFFW
from peer_scaling.ffw.peer import PEERFFW
from peer_scaling.ffw.pkm import PKMFFW


def product_key(layer: PEERFFW | PKMFFW, x_BTD: Tensor, grad_BTD: Tensor) -> Truth:
    """PEER (He 2024, equations 1 to 7) or product-key memory (Lample et al. 2019, section 3)."""
    config, router = layer.config, layer.router
    if config.query_norm != "none":
        raise ValueError("the reference normalises no queries")
    leaves = _leaves(x_BTD=x_BTD, query_QD=router.query_QD, keys_HPSC=router.keys_HPSC)
    x_MD = leaves["x_BTD"].flatten(0, 1)
    query_MHPC = (x_MD @ leaves["query_QD"].T).view(len(x_MD), config.num_heads, 2, -1)
    keys_HPSC = leaves["keys_HPSC"].expand(config.num_heads, -1, -1, -1)
    half_MHPS = torch.einsum("mhpc,hpsc->mhps", query_MHPC, keys_HPSC)
    index_MHK = _best_of_all(half_MHPS, config.experts_per_head)
    root = config.num_sub_keys
    first_MHK = half_MHPS[:, :, 0].gather(2, index_MHK // root)
    second_MHK = half_MHPS[:, :, 1].gather(2, index_MHK % root)
    weight_MHK = torch.softmax(first_MHK + second_MHK, -1)
    row_R, place_MHK = index_MHK.unique(return_inverse=True)
    tables = {name: table for name, table in layer.named_parameters() if name.endswith("_ND")}
    leaves |= _leaves(**{name: table.detach()[row_R] for name, table in tables.items()})
    if isinstance(layer, PEERFFW):
        hidden_MHK = torch.einsum("md,mhkd->mhk", x_MD, leaves["down_ND"][place_MHK])
        weight_MHK = weight_MHK * functional.gelu(hidden_MHK)
    values_RD = leaves["up_ND" if isinstance(layer, PEERFFW) else "value_ND"]
    y_MD = torch.einsum("mhk,mhkd->md", weight_MHK, values_RD[place_MHK])
    return _truth(y_MD, leaves, grad_BTD, row_R)


def token_choice(layer: MoEFFW, x_BTD: Tensor, grad_BTD: Tensor, normalise: bool) -> Truth:
    """Shazeer et al. 2017, dropless; gates are softmax scores, or these over their chosen sum."""
    leaves = _moe_leaves(layer, x_BTD)
    x_MD = leaves["x_BTD"].flatten(0, 1)
    score_ME = torch.softmax(x_MD @ leaves["router_ED"].T, -1)
    gate_MK, expert_MK = score_ME.topk(layer.config.top_k, -1)
    if normalise:
        gate_MK = gate_MK / gate_MK.sum(-1, keepdim=True)
    gate_ME = torch.zeros_like(score_ME).scatter(1, expert_MK, gate_MK)
    return _truth(_mixed(leaves, x_MD, gate_ME), leaves, grad_BTD)


def expert_choice(layer: MoEFFW, x_BTD: Tensor, grad_BTD: Tensor) -> Truth:
    """Zhou et al. 2022, section 3."""
    leaves = _moe_leaves(layer, x_BTD)
    x_MD = leaves["x_BTD"].flatten(0, 1)
    score_ME = torch.softmax(x_MD @ leaves["router_ED"].T, -1)
    token_CE = score_ME.topk(layer.config.capacity(len(x_MD)), 0).indices
    chosen_ME = torch.zeros_like(score_ME).scatter(0, token_CE, 1.0)
    return _truth(_mixed(leaves, x_MD, score_ME * chosen_ME), leaves, grad_BTD)


def dense(layer: DenseFFW, x_BTD: Tensor, grad_BTD: Tensor) -> Truth:
    """W_out gelu(W_in x)."""
    leaves = _leaves(x_BTD=x_BTD, in_FD=layer.in_FD, out_DF=layer.out_DF)
    hidden_BTF = functional.gelu(leaves["x_BTD"] @ leaves["in_FD"].T)
    return _truth(hidden_BTF @ leaves["out_DF"].T, leaves, grad_BTD)


def _mixed(leaves: dict[str, Tensor], x_MD: Tensor, gate_ME: Tensor) -> Tensor:
    """All experts for all tokens, weighted: gates are zero where a token skips an expert."""
    y_MD = torch.zeros_like(x_MD)
    for expert, (in_FD, out_DF) in enumerate(zip(leaves["in_EFD"], leaves["out_EDF"], strict=True)):
        y_MD = y_MD + gate_ME[:, expert, None] * (functional.gelu(x_MD @ in_FD.T) @ out_DF.T)
    return y_MD


def _best_of_all(half_MHPS: Tensor, k: int) -> Tensor:
    """The k best of all S * S keys, one token at a time: there can be millions."""
    best = []
    for half_HPS in half_MHPS.detach():
        sums_HN = (half_HPS[:, 0, :, None] + half_HPS[:, 1, None, :]).flatten(1)
        best.append(sums_HN.topk(k).indices)
    return torch.stack(best)


def _moe_leaves(layer: MoEFFW, x_BTD: Tensor) -> dict[str, Tensor]:
    weights = {"router_ED": layer.router_ED, "in_EFD": layer.in_EFD, "out_EDF": layer.out_EDF}
    return _leaves(x_BTD=x_BTD, **weights)


def _leaves(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}


def _truth(
    y: Tensor, leaves: dict[str, Tensor], grad_BTD: Tensor, row_R: Tensor | None = None
) -> Truth:
    y_BTD = y.view_as(grad_BTD)
    grads = torch.autograd.grad(y_BTD, list(leaves.values()), grad_BTD.double())
    return Truth(y_BTD.detach(), dict(zip(leaves, grads, strict=True)), row_R)
