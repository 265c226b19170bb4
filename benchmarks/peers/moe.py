"""Mixtures of experts: ours, st-moe-pytorch's and two blocks of transformers.

Expert choice stands alone: no package on PyPI has it as a layer.

Shape suffixes: see peer_scaling/ffw/base.py; E experts, F hidden width of one expert.
"""

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import reference
from benchmarks.peers.contender import Case, Contender, Peer, optional_module, ours
from peer_scaling.ffw.moe import MoE, MoEFFW

ROOM = 1.25
"""st-moe-pytorch: room in each expert over its even share; the package's own default."""
FULL_ROOM_TOKENS = 64
"""st-moe-pytorch: up to so many tokens, every expert has room for all, as the check needs."""
MIXTRAL_ENGINES = ("eager", "grouped_mm")


def top2_contenders(case: Case) -> list[Contender]:
    """Two experts per token."""
    layer = _layer(case, router="token_choice", top_k=2)
    truth = partial(reference.token_choice, layer, normalise=False)
    contenders = ours("ours", layer, truth, ())
    if (package := optional_module("st_moe_pytorch", "st-moe-pytorch")) is not None:
        note = f"gates over their sum, in the check too; timed with room {ROOM}: drops the overflow"
        normalised = partial(reference.token_choice, layer, normalise=True)
        module = PackageMoE(package.MoE, layer)
        contenders.append(Contender("st-moe-pytorch", module, normalised, note))
    if (block := optional_module("transformers", "transformers")) is not None:
        note = "not the same function: SwiGLU experts, at our number of FLOPs"
        for engine in MIXTRAL_ENGINES:
            module = MixtralBlock(block, layer, engine)
            contenders.append(Contender(f"Mixtral ({engine})", module, None, note))
    return contenders


def top1_contenders(case: Case) -> list[Contender]:
    """One expert per token, or one on average."""
    layer = _layer(case, router="token_choice", top_k=1)
    truth = partial(reference.token_choice, layer, normalise=False)
    contenders = ours("ours", layer, truth, ())
    if (block := optional_module("transformers", "transformers")) is not None:
        module = SwitchBlock(block, layer, case.tokens)
        contenders.append(Contender("Switch Transformers", module, truth))
    choice = _layer(case, router="expert_choice", capacity_factor=1.0)
    truth = partial(reference.expert_choice, choice)
    by_expert = ours("ours expert choice", choice, truth, ())
    return [*contenders, *by_expert]


def _layer(case: Case, **options: str | int | float) -> MoEFFW:
    config = MoE(num_experts=case.num_experts, **options)  # pyright: ignore[reportArgumentType]
    return config.build(case.d_model, generator=torch.Generator().manual_seed(0))


class PackageMoE(Peer):
    """`st_moe_pytorch.MoE` with our experts, no random routing and no straight-through gates."""

    def __init__(self, package_class: Any, layer: MoEFFW) -> None:
        super().__init__()
        num_experts, _, d_model = layer.in_EFD.shape
        experts = [
            nn.Sequential(_linear(in_FD), nn.GELU(), _linear(out_DF))
            for in_FD, out_DF in zip(layer.in_EFD, layer.out_EDF, strict=True)
        ]
        self.top_k = layer.config.top_k
        self.moe: Any = package_class(
            d_model,
            num_experts=num_experts,
            gating_top_n=self.top_k,
            experts=nn.ModuleList(experts),
            threshold_train=0.0,
            straight_through_dispatch_tensor=False,
        )
        self.moe.gate.to_gates.weight = _copy(layer.router_ED)
        self.num_experts = num_experts

    def forward(self, x_BTD: Tensor) -> Tensor:
        full = x_BTD.shape[1] <= FULL_ROOM_TOKENS
        self.moe.gate.capacity_factor_train = self.num_experts if full else ROOM * self.top_k
        return self.moe(x_BTD).outputs

    def gradients(self) -> dict[str, Tensor | None]:
        experts = list(self.moe.experts.experts)
        return {
            "router_ED": self.moe.gate.to_gates.weight.grad,
            "in_EFD": _stacked([expert[0].weight for expert in experts]),
            "out_EDF": _stacked([expert[2].weight for expert in experts]),
        }


class SwitchBlock(Peer):
    """The sparse layer of transformers' Switch Transformers with room for every token."""

    def __init__(self, package: ModuleType, layer: MoEFFW, tokens: int) -> None:
        super().__init__()
        num_experts, d_hidden, d_model = layer.in_EFD.shape
        config = package.SwitchTransformersConfig(
            d_model=d_model,
            d_ff=d_hidden,
            num_experts=num_experts,
            expert_capacity=tokens,
            router_jitter_noise=0.0,
            dropout_rate=0.0,
        )
        config.dense_act_fn = "gelu"
        family = package.models.switch_transformers.modeling_switch_transformers
        self.block = family.SwitchTransformersSparseMLP(config)
        self.block.router.classifier.weight = _copy(layer.router_ED)
        for number, (in_FD, out_DF) in enumerate(zip(layer.in_EFD, layer.out_EDF, strict=True)):
            expert = self.block.experts[f"expert_{number}"]
            expert.wi.weight, expert.wo.weight = _copy(in_FD), _copy(out_DF)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.block(x_BTD)

    def gradients(self) -> dict[str, Tensor | None]:
        experts = list(self.block.experts.values())
        return {
            "router_ED": self.block.router.classifier.weight.grad,
            "in_EFD": _stacked([expert.wi.weight for expert in experts]),
            "out_EDF": _stacked([expert.wo.weight for expert in experts]),
        }


class MixtralBlock(Peer):
    """The sparse layer of transformers' Mixtral; three matrices of 2/3 of our hidden width."""

    def __init__(self, package: ModuleType, layer: MoEFFW, engine: str) -> None:
        super().__init__()
        num_experts, d_hidden, d_model = layer.in_EFD.shape
        config = package.MixtralConfig(
            hidden_size=d_model,
            # 8: a multiple that grouped_mm takes; at most 2 % off the FLOPs from width 64 on.
            intermediate_size=8 * round(d_hidden / 12),
            num_local_experts=num_experts,
            num_experts_per_tok=layer.config.top_k,
            router_jitter_noise=0.0,
            experts_implementation=engine,
        )
        family = package.models.mixtral.modeling_mixtral
        self.block = family.MixtralSparseMoeBlock(config)
        self.block.gate.weight = _copy(layer.router_ED)
        generator = torch.Generator().manual_seed(0)
        for weight in self.block.experts.parameters():
            weight.data.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.block(x_BTD)

    def gradients(self) -> dict[str, Tensor | None]:
        return {}


def _copy(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone())


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = _copy(weight)
    return linear


def _stacked(weights: list[nn.Parameter]) -> Tensor:
    """Gradients side by side; an expert that no token chose has none."""
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    return torch.stack(grads)
