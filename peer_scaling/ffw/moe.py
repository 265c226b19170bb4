"""Mixture of dense experts: expert choice, or token choice as a second router.

Expert choice (Zhou et al. 2022, 2202.09368, section 3): scores = softmax over experts of x W; each
expert takes the `capacity` tokens of a group that score highest for it, with the score as gate. It
compares a token with others, later ones included, so it is not causal: its loss is not comparable
with that of a causal layer (docs/deviations.md). In evaluation it can also be asked to route
causally: `threshold`, each token to the experts for which it scores at least as high as what they
took in training, or `top1`, each token to its best expert.

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
    CALIBRATION,
    FFW,
    THRESHOLD,
    FFWConfig,
    FFWOutput,
    ParamGroup,
    Routing,
    activation_problems,
    later,
    normal,
)
from peer_scaling.kernels.grouped import batched_linear, grouped_linear, permuted

ROUTERS = ("expert_choice", "token_choice")
GROUPS = ("batch", "sequence", "position")
TOP_1 = "top1"


@dataclass(frozen=True)
class MoE(FFWConfig):
    """`num_experts` dense experts, each the size of the dense layer (He 2024, section 3.1)."""

    num_experts: int = 128
    router: str = "expert_choice"
    capacity_factor: float = 1.0
    """Expert choice: mean number of experts per token. He 2024 leaves it open; 1 keeps the layer's
    active parameters at those of the dense layer."""
    group: str = later("batch")
    """Expert choice: which tokens an expert chooses among. `batch`: all of a forward pass (Zhou et
    al.); `sequence`: those of one sequence; `position`: those at one position of all sequences
    (Krajewski et al. 2024, 2402.07871), where no token meets its own future, but other texts."""
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
        if self.group not in GROUPS:
            problems.append(f"group={self.group!r} is unknown; use {', '.join(GROUPS)}")
        for name in ("capacity_factor", "top_k"):
            if getattr(self, name) > self.num_experts:
                limit = f"num_experts={self.num_experts}"
                problems.append(f"{name}={getattr(self, name)} exceeds {limit}")
        check(problems)

    @property
    def causal(self) -> bool:
        """Only token choice is; expert choice compares a token with others."""
        return self.router == "token_choice"

    @property
    def causal_routes(self) -> tuple[str, ...]:
        """Expert choice: by threshold, or each token to its best expert."""
        return () if self.causal else (THRESHOLD, TOP_1)

    @property
    def batch_coupled(self) -> bool:
        """Expert choice compares the tokens of all sequences, unless each is a group."""
        return self.router == "expert_choice" and self.group != "sequence"

    @property
    def micro_batch_matters(self) -> bool:
        """The balance loss is a product of two means over the tokens of a forward pass."""
        return self.batch_coupled or (self.router == "token_choice" and self.balance_loss > 0)

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that a token passes through."""
        return self.capacity_factor if self.router == "expert_choice" else float(self.top_k)

    def capacity(self, tokens: int) -> int:
        """Tokens that each expert takes of a group of `tokens` (Zhou et al., k = n c / e), at least
        1.
        """
        return min(tokens, max(1, ceil(tokens * self.capacity_factor / self.num_experts)))

    def cost_problem(self, sequences: int, context: int) -> str | None:
        """Expert choice costs what `cost` says only if the capacity is a whole number."""
        sizes = {"batch": sequences * context, "sequence": context, "position": sequences}
        where = {"batch": "forward pass"}.get(self.group, self.group)
        tokens = sizes[self.group]
        exact = tokens * self.capacity_factor / self.num_experts
        if self.router == "token_choice" or self.capacity(tokens) == exact:
            return None
        return (
            f"{tokens} tokens per {where} give each of {self.num_experts} experts {exact:g} "
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
        self._route: str | None = None
        self._cutoff_E: Tensor | None = None
        self.activation = ACTIVATIONS[config.activation]
        num_experts, d_hidden = config.num_experts, config.ratio * d_model
        self.router_ED = normal((num_experts, d_model), d_model**-0.5, generator)
        self.in_EFD = normal((num_experts, d_hidden, d_model), d_model**-0.5, generator)
        out_std = out_scale * d_hidden**-0.5
        self.out_EDF = normal((num_experts, d_model, d_hidden), out_std, generator)

    def forward(self, x_BTD: Tensor) -> FFWOutput:
        """Route as the configuration says, or as `take_route` was told."""
        x_MD = x_BTD.flatten(0, 1)
        logits_ME = functional.linear(x_MD, self.router_ED)
        score_ME = torch.softmax(logits_ME, dim=-1, dtype=_at_least_float32(logits_ME))
        time = x_BTD.shape[1]
        if self._cutoff_E is not None:
            y_MD, aux_loss, stats = self._pairs(x_MD, score_ME, (score_ME >= self._cutoff_E).T)
        elif self.config.router == "token_choice" or self._route == TOP_1:
            y_MD, aux_loss, stats = self._token_choice(x_MD, score_ME)
        elif self.world.size > 1:
            y_MD, aux_loss, stats = self._expert_choice_of_ranks(x_MD, score_ME, time)
        else:
            y_MD, aux_loss, stats = self._expert_choice(x_MD, score_ME, time)
        return FFWOutput(y_MD.view_as(x_BTD), aux_loss, stats)

    def take_route(self, route: str | None, cutoff_N: Tensor | None = None) -> None:
        """See `FFW.take_route`."""
        assert route in (None, CALIBRATION, *self.config.causal_routes)
        self._route = route
        self._cutoff_E = cutoff_N if route == THRESHOLD else None

    def _chosen(self, score_ME: Tensor, time: int) -> Tensor:
        """The tokens that each expert takes, int64 (E, tokens), ascending: the result does not
        depend on how top-k breaks ties in its ordering.
        """
        if self.config.group == "batch" or self._route == CALIBRATION:
            capacity = self.config.capacity(len(score_ME))
            return score_ME.T.topk(capacity, dim=-1).indices.sort(dim=-1).values
        score_EBT = score_ME.T.unflatten(1, (-1, time))
        number_BT = torch.arange(len(score_ME), device=score_ME.device).view(-1, time)
        along = 2 if self.config.group == "sequence" else 1
        capacity = self.config.capacity(score_EBT.shape[along])
        place = score_EBT.topk(capacity, dim=along).indices
        token = number_BT.expand_as(score_EBT).gather(along, place)
        return token.flatten(1).sort(dim=-1).values

    def _expert_choice(self, x_MD: Tensor, score_ME: Tensor, time: int) -> FFWOutput:
        token_EC = self._chosen(score_ME, time)
        gate_EC = score_ME.T.gather(1, token_EC)
        hidden_ECF = self.activation(batched_linear(x_MD[token_EC], self.in_EFD))
        out_ECD = batched_linear(hidden_ECF, self.out_EDF)
        out_ECD = out_ECD * gate_EC[..., None].to(out_ECD.dtype)
        y_MD = out_ECD.new_zeros(x_MD.shape).index_add(0, token_EC.flatten(), out_ECD.flatten(0, 1))
        expert_EC = torch.arange(len(token_EC), device=x_MD.device)[:, None].expand_as(token_EC)
        stats = Routing(expert_EC, gate_EC.detach(), self.config.num_experts)
        return FFWOutput(y_MD, x_MD.new_zeros(()), stats)

    def _expert_choice_of_ranks(self, x_MD: Tensor, score_ME: Tensor, time: int) -> FFWOutput:
        """Each expert chooses among the tokens of all ranks; own tokens' pairs are computed."""
        score_all = torch.cat(self.world.gather(score_ME.detach()))
        token_EC = self._chosen(score_all, time)
        taken_EM = torch.zeros_like(score_all.T, dtype=torch.bool).scatter(1, token_EC, True)
        return self._pairs(
            x_MD, score_ME, taken_EM.narrow(1, self.world.rank * len(x_MD), len(x_MD))
        )

    def _pairs(self, x_MD: Tensor, score_ME: Tensor, taken_EM: Tensor) -> FFWOutput:
        """The experts' outputs for the tokens they take, any number each. Waits for the device: how
        many there are is data.
        """
        end_E = taken_EM.sum(dim=1).cumsum(0).to(torch.int32)
        expert_Q, token_Q = taken_EM.nonzero().unbind(1)
        gate_Q = score_ME[token_Q, expert_Q]
        hidden_QF = self.activation(grouped_linear(x_MD[token_Q], self.in_EFD, end_E))
        out_QD = grouped_linear(hidden_QF, self.out_EDF, end_E)
        out_QD = out_QD * gate_Q[:, None].to(out_QD.dtype)
        y_MD = out_QD.new_zeros(x_MD.shape).index_add(0, token_Q, out_QD)
        stats = Routing(expert_Q, gate_Q.detach(), self.config.num_experts)
        return FFWOutput(y_MD, x_MD.new_zeros(()), stats)

    def _token_choice(self, x_MD: Tensor, score_ME: Tensor) -> FFWOutput:
        top_k = 1 if self._route == TOP_1 else self.config.top_k
        gate_MK, expert_MK = score_ME.topk(top_k, dim=-1)
        # Stable: the pairs of one expert stay in the order of their tokens.
        expert_Q, pair_Q = expert_MK.flatten().sort(stable=True)
        place_Q = pair_Q.argsort()
        number_E = torch.arange(self.config.num_experts, device=x_MD.device)
        end_E = torch.searchsorted(expert_Q, number_E, right=True, out_int32=True)
        x_MKD = x_MD[:, None].expand(-1, top_k, -1)
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
