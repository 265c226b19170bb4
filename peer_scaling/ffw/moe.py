"""Mixture of dense experts: expert choice, or token choice as a second router.

Expert choice (Zhou et al. 2022, 2202.09368, section 3): scores = softmax over experts of x W; each
expert takes the `capacity` tokens that score highest for it, with the score as gate. It looks at
all tokens of a forward pass, later ones included, so it is not causal: its loss is not comparable
with that of a causal layer (docs/deviations.md).

Where several ranks share a forward pass, its tokens are those of all of them: a rank computes its
own tokens' part of what one would.

Token choice (Shazeer et al. 2017, 1701.06538; Fedus et al. 2021, 2101.03961): each token takes its
`top_k` experts, dropless, with the balance loss of Fedus et al., equation (4).

Shape suffixes: B batch, T time, M = B * T tokens, D model width, E experts, F hidden width of one
expert, C tokens per expert, K experts per token, Q = M * K pairs of a token and an expert, sorted
by expert; W ranks.
"""

from dataclasses import dataclass
from math import ceil, isfinite

import torch
from torch import Tensor
from torch.nn import functional

from peer_scaling.cost import Cost
from peer_scaling.distributed import ALONE, World
from peer_scaling.errors import check
from peer_scaling.ffw.base import (
    ACTIVATIONS,
    FFW,
    FFWConfig,
    FFWOutput,
    ParamGroup,
    Routing,
    activation_problems,
    normal,
)
from peer_scaling.kernels.grouped import batched_linear, grouped_linear, permuted

ROUTERS = ("expert_choice", "token_choice")


@dataclass(frozen=True)
class MoE(FFWConfig):
    """`num_experts` dense experts, each the size of the dense layer (He 2024, section 3.1)."""

    num_experts: int = 128
    router: str = "expert_choice"
    capacity_factor: float = 1.0
    """Expert choice: mean number of experts per token. He 2024 leaves it open; 1 keeps the layer's
    active parameters at those of the dense layer."""
    top_k: int = 1
    """Token choice: experts per token."""
    balance_loss: float = 0.01
    """Token choice: coefficient of the balance loss."""
    ratio: int = 4
    """Hidden width of one expert over model width."""
    activation: str = "gelu"

    def __post_init__(self) -> None:
        problems = activation_problems(self.activation)
        problems += [
            f"{name}={getattr(self, name)} must be positive"
            for name in ("num_experts", "capacity_factor", "top_k", "ratio")
            if not getattr(self, name) > 0
        ]
        if not isfinite(self.balance_loss):
            problems.append(f"balance_loss={self.balance_loss} must be a number")
        if self.router not in ROUTERS:
            problems.append(f"router={self.router!r} is unknown; use {' or '.join(ROUTERS)}")
        for name in ("capacity_factor", "top_k"):
            if getattr(self, name) > self.num_experts:
                limit = f"num_experts={self.num_experts}"
                problems.append(f"{name}={getattr(self, name)} exceeds {limit}")
        check(problems)

    @property
    def causal(self) -> bool:
        """Only token choice is; expert choice compares a token with later ones."""
        return self.router == "token_choice"

    @property
    def batch_coupled(self) -> bool:
        """Expert choice compares the tokens of all sequences."""
        return self.router == "expert_choice"

    @property
    def micro_batch_matters(self) -> bool:
        """The balance loss is a product of two means over the tokens of a forward pass."""
        return self.batch_coupled or self.balance_loss > 0

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that a token passes through."""
        return self.capacity_factor if self.router == "expert_choice" else float(self.top_k)

    def capacity(self, tokens: int) -> int:
        """Tokens that each expert takes out of `tokens` (Zhou et al., k = n c / e), at least 1."""
        return min(tokens, max(1, ceil(tokens * self.capacity_factor / self.num_experts)))

    def cost_problem(self, tokens: int) -> str | None:
        """Expert choice costs what `cost` says only if the capacity is a whole number."""
        exact = tokens * self.capacity_factor / self.num_experts
        if self.router == "token_choice" or self.capacity(tokens) == exact:
            return None
        return (
            f"{tokens} tokens per forward pass give each of {self.num_experts} experts {exact:g} "
            f"tokens, not a whole number: choose batch_size, context or micro_batch so that they "
            f"are a multiple of {self.num_experts / self.capacity_factor:g}, or fewer experts"
        )

    def build(
        self, d_model: int, *, out_scale: float = 1.0, generator: torch.Generator | None = None
    ) -> "MoEFFW":
        """The layer; experts drawn like a dense layer, the router from N(0, 1 / d_model)."""
        return MoEFFW(self, d_model, out_scale, generator)

    def cost(self, d_model: int) -> Cost:
        """Router, and `experts_per_token` dense layers."""
        router = d_model * self.num_experts
        expert = 2 * self.ratio * d_model**2
        active = expert * self.experts_per_token
        return Cost(
            num_params_total=router + self.num_experts * expert,
            num_params_active=router + round(active),
            flops_by_component={"router": 2.0 * router, "experts": 2.0 * active},
        )


class MoEFFW(FFW):
    """The module that `MoE` builds."""

    def __init__(
        self, config: MoE, d_model: int, out_scale: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.config = config
        self.world = ALONE
        self.activation = ACTIVATIONS[config.activation]
        num_experts, d_hidden = config.num_experts, config.ratio * d_model
        self.router_ED = normal((num_experts, d_model), d_model**-0.5, generator)
        self.in_EFD = normal((num_experts, d_hidden, d_model), d_model**-0.5, generator)
        out_std = out_scale * d_hidden**-0.5
        self.out_EDF = normal((num_experts, d_model, d_hidden), out_std, generator)

    def forward(self, x_BTD: Tensor) -> FFWOutput:
        """Route all B * T tokens as one group."""
        x_MD = x_BTD.flatten(0, 1)
        logits_ME = functional.linear(x_MD, self.router_ED)
        score_ME = torch.softmax(logits_ME, dim=-1, dtype=_at_least_float32(logits_ME))
        if self.config.router == "token_choice":
            y_MD, aux_loss, stats = self._token_choice(x_MD, score_ME)
        elif self.world.size > 1:
            y_MD, aux_loss, stats = self._expert_choice_of_ranks(x_MD, score_ME)
        else:
            y_MD, aux_loss, stats = self._expert_choice(x_MD, score_ME)
        return FFWOutput(y_MD.view_as(x_BTD), aux_loss, stats)

    def _expert_choice(self, x_MD: Tensor, score_ME: Tensor) -> FFWOutput:
        capacity = self.config.capacity(len(x_MD))
        token_EC = score_ME.T.topk(capacity, dim=-1).indices
        # In token order: the result does not depend on how top-k breaks ties in its ordering.
        token_EC = token_EC.sort(dim=-1).values
        gate_EC = score_ME.T.gather(1, token_EC)
        hidden_ECF = self.activation(batched_linear(x_MD[token_EC], self.in_EFD))
        out_ECD = batched_linear(hidden_ECF, self.out_EDF)
        out_ECD = out_ECD * gate_EC[..., None].to(out_ECD.dtype)
        y_MD = out_ECD.new_zeros(x_MD.shape).index_add(0, token_EC.flatten(), out_ECD.flatten(0, 1))
        expert_EC = torch.arange(len(token_EC), device=x_MD.device)[:, None].expand_as(token_EC)
        stats = Routing(expert_EC, gate_EC.detach(), self.config.num_experts)
        return FFWOutput(y_MD, x_MD.new_zeros(()), stats)

    def _expert_choice_of_ranks(self, x_MD: Tensor, score_ME: Tensor) -> FFWOutput:
        """Each expert chooses among the tokens of all ranks; the pairs of own tokens are computed.
        Waits for the device: how many there are is data.
        """
        scores_EM = torch.cat(self.world.gather(score_ME.detach())).T
        token_EC = scores_EM.topk(self.config.capacity(scores_EM.shape[1]), dim=-1).indices
        token_EC = token_EC.sort(dim=-1).values - self.world.rank * len(x_MD)
        own_EC = (token_EC >= 0) & (token_EC < len(x_MD))
        end_E = own_EC.sum(dim=1).cumsum(0).to(torch.int32)
        expert_Q, place_Q = own_EC.nonzero().unbind(1)
        token_Q = token_EC[expert_Q, place_Q]
        gate_Q = score_ME[token_Q, expert_Q]
        hidden_QF = self.activation(grouped_linear(x_MD[token_Q], self.in_EFD, end_E))
        out_QD = grouped_linear(hidden_QF, self.out_EDF, end_E)
        out_QD = out_QD * gate_Q[:, None].to(out_QD.dtype)
        y_MD = out_QD.new_zeros(x_MD.shape).index_add(0, token_Q, out_QD)
        stats = Routing(expert_Q, gate_Q.detach(), self.config.num_experts)
        return FFWOutput(y_MD, x_MD.new_zeros(()), stats)

    def _token_choice(self, x_MD: Tensor, score_ME: Tensor) -> FFWOutput:
        gate_MK, expert_MK = score_ME.topk(self.config.top_k, dim=-1)
        # Stable: the pairs of one expert stay in the order of their tokens.
        expert_Q, pair_Q = expert_MK.flatten().sort(stable=True)
        place_Q = pair_Q.argsort()
        number_E = torch.arange(self.config.num_experts, device=x_MD.device)
        end_E = torch.searchsorted(expert_Q, number_E, right=True, out_int32=True)
        x_MKD = x_MD[:, None].expand(-1, self.config.top_k, -1)
        x_QD = permuted(x_MKD.flatten(0, 1), pair_Q, place_Q)
        hidden_QF = self.activation(grouped_linear(x_QD, self.in_EFD, end_E))
        out_QD = grouped_linear(hidden_QF, self.out_EDF, end_E)
        out_MKD = permuted(out_QD, place_Q, pair_Q).view_as(x_MKD)
        y_MD = (out_MKD * gate_MK[..., None].to(out_MKD.dtype)).sum(1)
        stats = Routing(expert_MK, gate_MK.detach(), self.config.num_experts)
        return FFWOutput(y_MD, self._balance_loss(score_ME, expert_MK), stats)

    def _balance_loss(self, score_ME: Tensor, expert_MK: Tensor) -> Tensor:
        """Coefficient x E x sum_e (share of choices) (mean score): Fedus et al., equation (4).

        Shares are those of all ranks, mean scores a rank's own: the mean over ranks is the loss.
        """
        num_experts = self.config.num_experts
        count_E = self.world.sum_(torch.bincount(expert_MK.flatten(), minlength=num_experts))
        chosen_E = count_E / (expert_MK.numel() * self.world.size)
        mean_score_E = score_ME.mean(dim=0)
        return self.config.balance_loss * num_experts * (chosen_E * mean_score_E).sum()

    def spread(self, world: World) -> None:
        """Choose among the tokens of all ranks."""
        self.world = world

    @property
    def compiles(self) -> bool:
        """Unless it asks other ranks."""
        return self.world.size == 1

    def optim_groups(self) -> list[ParamGroup]:
        """Everything is a matrix and decays."""
        return [ParamGroup((self.router_ED, self.in_EFD, self.out_EDF), decay=True)]


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
