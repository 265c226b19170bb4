"""Product-key retrieval, shared by the product-key memory and PEER.

Shape suffixes: B batch, T time, M = B * T tokens, D model width, H heads, P = 2 halves,
S sub-keys per half (S * S = N keys), C width of a half key, K experts kept per head.
"""

from abc import abstractmethod
from dataclasses import dataclass
from math import inf, isqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from peer_scaling.cost import BYTES_PER_VALUE, Cost
from peer_scaling.distributed import ALONE, World, summed
from peer_scaling.errors import check
from peer_scaling.ffw.base import FFWConfig, ParamGroup, normal
from peer_scaling.kernels.product_keys import product_key_topk
from peer_scaling.kernels.segments import TableGradient

QUERY_NORMS = ("batch", "layer", "none")


@dataclass(frozen=True)
class ProductKeyConfig(FFWConfig):
    """Numbers that product-key layers have in common."""

    num_experts: int = 1024**2
    """Experts or memory slots N, a perfect square."""
    num_heads: int = 8
    experts_per_head: int = 16
    """Experts k that each head keeps; at most sqrt(N)."""
    key_dim: int = 256
    """Width of a whole key, both halves; the papers leave it open."""
    query_norm: str = "batch"
    """`batch` (per feature over all tokens), `layer` (per token and head) or `none`."""
    shared_keys: bool = True
    """Whether all heads search the same product keys."""
    table_lr_multiplier: float = 4.0
    """Learning rate of the tables over that of the rest. A row is read by few tokens of a step.
    4 is Lample et al.'s 1e-3 for values over 2.5e-4 for the rest; docs/log.md has our check."""
    table_gradient: str = "dense"
    """`dense`, as any optimiser takes it, or `rows`: sparse, the chosen rows alone."""

    def __post_init__(self) -> None:
        check(self._problems())

    def _problems(self) -> list[str]:
        problems = [
            f"{name}={getattr(self, name)} must be positive"
            for name in ("num_experts", "num_heads", "experts_per_head", "table_lr_multiplier")
            if not 0 < getattr(self, name) < inf
        ]
        root = isqrt(max(self.num_experts, 0))
        if root**2 != self.num_experts:
            near = f"{root**2} or {(root + 1) ** 2}"
            problems.append(f"num_experts={self.num_experts} is not a square; use {near}")
        elif self.experts_per_head > root:
            problems.append(
                f"experts_per_head={self.experts_per_head} exceeds sqrt(num_experts)={root}"
            )
        if self.key_dim < 2 or self.key_dim % 2:
            problems.append(f"key_dim={self.key_dim} must be even: a key has two halves")
        if self.query_norm not in QUERY_NORMS:
            problems.append(
                f"query_norm={self.query_norm!r} is unknown; choose one of {', '.join(QUERY_NORMS)}"
            )
        forms = [form.value for form in TableGradient]
        if self.table_gradient not in forms:
            problems.append(
                f"table_gradient={self.table_gradient!r} is unknown; choose one of "
                f"{', '.join(forms)}"
            )
        return problems

    @property
    def causal(self) -> bool:
        """True in eval mode, where batch normalisation uses its running statistics."""
        return True

    @property
    def batch_coupled(self) -> bool:
        """Batch normalisation in training uses the statistics of all tokens."""
        return self.query_norm == "batch"

    @property
    def num_sub_keys(self) -> int:
        """Sub-keys per half, sqrt(N)."""
        return isqrt(self.num_experts)

    @property
    @abstractmethod
    def num_tables(self) -> int:
        """Tables of num_experts rows of width d_model."""

    def cost(self, d_model: int) -> Cost:
        """Query network, sub-key scores and rows (He 2024 gives no count; see docs/flops.md)."""
        query_width = self.num_heads * self.key_dim
        key_sets = 1 if self.shared_keys else self.num_heads
        norm = {"batch": 2 * query_width, "layer": 2 * self.key_dim, "none": 0}[self.query_norm]
        router = d_model * query_width + norm + key_sets * self.num_sub_keys * self.key_dim
        lookup = self.num_tables * self.num_experts * d_model
        gathered = self.num_tables * self.num_heads * self.experts_per_head * d_model
        return Cost(
            num_params_total=router + lookup,
            num_params_active=router + gathered,
            num_params_lookup=lookup,
            flops_by_component={
                "query": 2.0 * d_model * query_width,
                "keys": 2.0 * self.num_sub_keys * query_width,
                "experts": 2.0 * gathered,
            },
            bytes_by_component={"experts": float(BYTES_PER_VALUE * gathered)},
        )


class Retrieved(NamedTuple):
    """Experts of each token, all heads side by side (L = H * K)."""

    index_ML: Tensor
    gate_ML: Tensor
    """Softmax over the K scores of each head (He 2024, figure 2 and algorithm 1)."""


class ProductKeyRouter(nn.Module):
    """Query network, product keys and the softmax over each head's choices."""

    def __init__(
        self, config: ProductKeyConfig, d_model: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.config = config
        query_width = config.num_heads * config.key_dim
        self.query_QD = normal((query_width, d_model), d_model**-0.5, generator)
        self.norm = _query_norm(config)
        half = config.key_dim // 2
        key_sets = 1 if config.shared_keys else config.num_heads
        # Uniform(+-half^-0.5), as the notebook that He 2024 cites (XLM, PKM-layer.ipynb).
        keys_HPSC = torch.empty(key_sets, 2, config.num_sub_keys, half)
        self.keys_HPSC = nn.Parameter(
            keys_HPSC.uniform_(-(half**-0.5), half**-0.5, generator=generator)
        )

    def forward(self, x_MD: Tensor) -> Retrieved:
        """The experts of (tokens, d_model) and their gates, each (tokens, heads * kept)."""
        query_MQ = functional.linear(x_MD, self.query_QD)
        # Statistics and scores stay in float32 under autocast: bfloat16 scores tie too often.
        with torch.autocast(x_MD.device.type, enabled=False):
            query_MHPC = self._normed(query_MQ.to(self.keys_HPSC.dtype))
            top = product_key_topk(query_MHPC, self.keys_HPSC, self.config.experts_per_head)
            gate_MHK = torch.softmax(top.score_MHK, dim=-1)
        return Retrieved(top.index_MHK.flatten(1), gate_MHK.flatten(1))

    def spread(self, world: World) -> None:
        """Normalise over the tokens of all ranks."""
        if isinstance(self.norm, QueryBatchNorm):
            self.norm.world = world

    def _normed(self, query_MQ: Tensor) -> Tensor:
        heads, width = self.config.num_heads, self.config.key_dim
        if self.config.query_norm == "layer":
            query_MQ = self.norm(query_MQ.unflatten(1, (heads, width))).flatten(1)
        else:
            query_MQ = self.norm(query_MQ)
        return query_MQ.view(-1, heads, 2, width // 2)

    def optim_groups(self) -> list[ParamGroup]:
        """Query weights and keys decay, the norm does not."""
        return [
            ParamGroup((self.query_QD, self.keys_HPSC), decay=True),
            ParamGroup(tuple(self.norm.parameters()), decay=False),
        ]


class QueryBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the tokens of all ranks, which have as many each.

    As `torch.nn.SyncBatchNorm`, which knows no CPU: to rounding what one rank does with all tokens,
    running statistics included.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.world = ALONE

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        """Normalise (tokens, features)."""
        if self.world.size == 1 or not self.training:
            return super().forward(input)
        mean_Q = summed(input.mean(dim=0)) / self.world.size
        centred_MQ = input - mean_Q
        variance_Q = summed(centred_MQ.square().mean(dim=0)) / self.world.size
        self._track(mean_Q.detach(), variance_Q.detach(), len(input) * self.world.size)
        scale_Q = self.weight * torch.rsqrt(variance_Q + self.eps)
        return torch.addcmul(self.bias, centred_MQ, scale_Q)

    def _track(self, mean_Q: Tensor, variance_Q: Tensor, tokens: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_Q, self.momentum)
        self.running_var.lerp_(variance_Q * (tokens / max(1, tokens - 1)), self.momentum)


def _query_norm(config: ProductKeyConfig) -> nn.Module:
    if config.query_norm == "batch":
        return QueryBatchNorm(config.num_heads * config.key_dim)
    if config.query_norm == "layer":
        return nn.LayerNorm(config.key_dim)
    return nn.Identity()
