"""PEER and product-key memory: ours, the packages' and a plain one, all with the same weights.

The tables are not copied but shared, since at 2^20 experts each is a GiB or two. The packages'
queries and keys have other layouts and are copies.

Shape suffixes: see peer_scaling/ffw/base.py.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers import reference
from benchmarks.peers.contender import Case, Contender, Peer, optional_module, ours
from peer_scaling.ffw.peer import PEER, PEERFFW
from peer_scaling.ffw.pkm import PKM, PKMFFW


def peer_contenders(case: Case) -> list[Contender]:
    """PEER at the paper's 8 heads of 16 experts (He 2024, section 3.1), own keys for each head."""
    config = PEER(
        num_experts=case.num_experts,
        query_norm="none",
        shared_keys=False,
        table_gradient="rows",
    )
    layer = config.build(case.d_model, generator=torch.Generator().manual_seed(0))
    truth = partial(reference.product_key, layer)
    contenders = ours("ours", layer, truth, case.backends)
    if (package := optional_module("PEER_pytorch", "PEER-pytorch")) is not None:
        contenders.append(Contender("PEER-pytorch", PackagePEER(package.PEER, layer), truth))
    return [*contenders, Contender("naive", NaivePEER(layer), truth)]


def pkm_contenders(case: Case) -> list[Contender]:
    """Product-key memory at 8 heads of 32 values (He 2024, section 3.1)."""
    config = PKM(num_experts=case.num_experts, query_norm="none", table_gradient="rows")
    layer = config.build(case.d_model, generator=torch.Generator().manual_seed(0))
    truth = partial(reference.product_key, layer)
    contenders = ours("ours", layer, truth, case.backends)
    if (package := optional_module("product_key_memory", "product-key-memory")) is not None:
        module = PackagePKM(package.PKM, layer)
        note = "without its LayerNorm of half queries, which ours has not"
        contenders.append(Contender("product-key-memory", module, truth, note))
    return [*contenders, Contender("naive", NaivePKM(layer), truth)]


class PackagePEER(Peer):
    """`PEER_pytorch.PEER` with the options that make it the paper's layer."""

    def __init__(self, package_class: Any, layer: PEERFFW) -> None:
        super().__init__()
        config = layer.config
        with torch.device("meta"):  # its own initial weights would only be thrown away
            peer = package_class(
                layer.down_ND.shape[1],
                heads=config.num_heads,
                num_experts=config.num_experts,
                num_experts_per_head=config.experts_per_head,
                dim_key=config.key_dim // 2,
                non_competing_scores=False,
                pre_rmsnorm=False,
            )
        peer.to_queries[0].weight = _package_query(layer)
        peer.keys = _package_keys(layer)
        peer.weight_down_embed.weight, peer.weight_up_embed.weight = layer.down_ND, layer.up_ND
        self.peer: Any = peer

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.peer(x_BTD)

    def gradients(self) -> dict[str, Tensor | None]:
        peer = self.peer
        return {
            **_router_gradients(peer.to_queries[0].weight.grad, peer.keys.grad),
            "down_ND": peer.weight_down_embed.weight.grad,
            "up_ND": peer.weight_up_embed.weight.grad,
        }


class PackagePKM(Peer):
    """`product_key_memory.PKM` without its query norm.

    It has one LayerNorm over each half of a query, where ours, like the papers, normalises whole
    queries; its batch norm takes time for the features and fails for other lengths than dim_head.
    """

    def __init__(self, package_class: Any, layer: PKMFFW) -> None:
        super().__init__()
        config = layer.config
        with torch.device("meta"):
            memory = package_class(
                layer.value_ND.shape[1],
                heads=config.num_heads,
                num_keys=config.num_sub_keys,
                topk=config.experts_per_head,
                dim_head=config.key_dim // 2,
            )
        memory.norm = nn.Identity()
        memory.to_queries.weight = _package_query(layer)
        memory.keys = _package_keys(layer)
        memory.values.weight = layer.value_ND
        self.memory: Any = memory

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.memory(x_BTD)

    def gradients(self) -> dict[str, Tensor | None]:
        memory = self.memory
        router = _router_gradients(memory.to_queries.weight.grad, memory.keys.grad)
        return {**router, "value_ND": memory.values.weight.grad}


class NaivePEER(Peer):
    """He 2024, algorithm 1, as one would write it down."""

    def __init__(self, layer: PEERFFW) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_MD = x_BTD.flatten(0, 1)
        score_MHK, index_MHK = naive_search(self.layer, x_MD)
        down_MHKD = functional.embedding(index_MHK, self.layer.down_ND)
        up_MHKD = functional.embedding(index_MHK, self.layer.up_ND)
        hidden_MHK = functional.gelu(torch.einsum("md,mhkd->mhk", x_MD, down_MHKD))
        gated_MHK = hidden_MHK * torch.softmax(score_MHK, -1)
        return torch.einsum("mhk,mhkd->md", gated_MHK, up_MHKD).view_as(x_BTD)

    def gradients(self) -> dict[str, Tensor | None]:
        router, layer = self.layer.router, self.layer
        grads = {"query_QD": router.query_QD.grad, "keys_HPSC": router.keys_HPSC.grad}
        return {**grads, "down_ND": layer.down_ND.grad, "up_ND": layer.up_ND.grad}


class NaivePKM(Peer):
    """Lample et al. 2019, section 3, as one would write it down."""

    def __init__(self, layer: PKMFFW) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor) -> Tensor:
        score_MHK, index_MHK = naive_search(self.layer, x_BTD.flatten(0, 1))
        value_MHKD = functional.embedding(index_MHK, self.layer.value_ND)
        weight_MHK = torch.softmax(score_MHK, -1)
        return torch.einsum("mhk,mhkd->md", weight_MHK, value_MHKD).view_as(x_BTD)

    def gradients(self) -> dict[str, Tensor | None]:
        router = self.layer.router
        grads = {"query_QD": router.query_QD.grad, "keys_HPSC": router.keys_HPSC.grad}
        return {**grads, "value_ND": self.layer.value_ND.grad}


def naive_search(layer: PEERFFW | PKMFFW, x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and numbers of the k best keys of each head, among the k * k best pairs of halves."""
    k, keys_HPSC = layer.config.experts_per_head, layer.router.keys_HPSC
    query_MHPC = functional.linear(x_MD, layer.router.query_QD).view(
        len(x_MD), len(keys_HPSC), 2, -1
    )
    half_MHPK, sub_MHPK = torch.einsum("mhpc,hpsc->mhps", query_MHPC, keys_HPSC).topk(k, -1)
    sums_MHL = (half_MHPK[:, :, 0, :, None] + half_MHPK[:, :, 1, None, :]).flatten(2)
    first_MHK, second_MHK = sub_MHPK.unbind(2)
    pairs_MHL = (first_MHK[..., :, None] * keys_HPSC.shape[2] + second_MHK[..., None, :]).flatten(2)
    score_MHK, best_MHK = sums_MHL.topk(k, -1)
    return score_MHK, pairs_MHL.gather(2, best_MHK)


def _package_query(layer: PEERFFW | PKMFFW) -> nn.Parameter:
    """Our rows go (head, half, feature), those of both packages (half, head, feature)."""
    query_QD, heads = layer.router.query_QD.detach(), layer.config.num_heads
    return nn.Parameter(query_QD.unflatten(0, (heads, 2, -1)).transpose(0, 1).flatten(0, 2).clone())


def _package_keys(layer: PEERFFW | PKMFFW) -> nn.Parameter:
    """Ours are (head, half, sub-key, feature), theirs (head, sub-key, half, feature)."""
    return nn.Parameter(layer.router.keys_HPSC.detach().transpose(1, 2).contiguous())


def _router_gradients(
    query_grad: Tensor | None, keys_grad: Tensor | None
) -> dict[str, Tensor | None]:
    if query_grad is None or keys_grad is None:
        return {"query_QD": None, "keys_HPSC": None}
    by_half = query_grad.unflatten(0, (2, len(keys_grad), -1))
    query_QD = by_half.transpose(0, 1).flatten(0, 2)
    return {"query_QD": query_QD, "keys_HPSC": keys_grad.transpose(1, 2)}
