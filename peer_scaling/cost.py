"""What a model costs: the one place that says how FLOPs, parameters and bytes are counted.

FLOPs. A matrix product of (m, k) with (k, n) costs 2 m k n: two per multiply-add (Kaplan et al.
2020, 2001.08361, section 2.1). The primary convention, `matmul`, counts every matrix product that
the forward pass executes: attention projections, attention scores and values over the full T x T
(no discount for the causal mask, as in Hoffmann et al. 2022, 2203.15556, appendix F), feed-forward
layers, routers, query networks, sub-key scores, expert dot products and accumulations, and the
output head. Embedding look-ups, norms, activations, softmax and top-k cost 0. The backward pass
costs twice the forward one, so training is 3 x forward.

Parameters. Stored, active (those that take part in the computation of one token), lookup (expert
and memory tables, of which a token reads a few rows) and embedding (input and output vocabulary
tables) are kept apart, because papers disagree on which of them "N" is. A token
embedding that is also the output head (tied) is active as a whole, since the head multiplies with
all of it; an untied input embedding contributes the one row that a token reads.

Bytes. `bytes_by_component` is the parameter data a token gathers from lookup tables in the forward
pass, at 4 bytes a value: what the memory system moves when no two tokens share a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

BYTES_PER_VALUE = 4
"""Parameters are stored in float32; autocast changes arithmetic, not storage."""

TRAINING_FLOPS_PER_FORWARD = 3
"""Forward once, backward twice: one product each for the input's and the weight's gradient."""

CONVENTIONS = ("matmul", "chinchilla", "6n_active", "6n_total", "non_embedding")
"""Ways of counting training FLOPs, the primary one first; `flops_by_convention` defines them."""


@dataclass(frozen=True)
class Cost:
    """Cost of a layer or a model, per token.

    `num_params_*` are counts; `flops_by_component` is forward FLOPs per token in the `matmul`
    convention; `extra_flops_by_component` is what only the `chinchilla` convention adds;
    `bytes_by_component` is bytes gathered per token in the forward pass.
    """

    num_params_total: int
    num_params_active: int
    num_params_lookup: int = 0
    num_params_embedding: int = 0
    num_params_embedding_active: int = 0
    flops_by_component: Mapping[str, float] = field(default_factory=dict)
    extra_flops_by_component: Mapping[str, float] = field(default_factory=dict)
    bytes_by_component: Mapping[str, float] = field(default_factory=dict)

    @property
    def forward_flops_per_token(self) -> float:
        """Forward FLOPs per token, `matmul` convention."""
        return float(sum(self.flops_by_component.values()))

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token, forward and backward, `matmul` convention."""
        return TRAINING_FLOPS_PER_FORWARD * self.forward_flops_per_token

    @property
    def bytes_per_token(self) -> float:
        """Bytes gathered from lookup tables per token in the forward pass."""
        return float(sum(self.bytes_by_component.values()))

    def __add__(self, other: "Cost") -> "Cost":
        """Costs of two parts of one model; components of the same name are summed."""
        return Cost(
            num_params_total=self.num_params_total + other.num_params_total,
            num_params_active=self.num_params_active + other.num_params_active,
            num_params_lookup=self.num_params_lookup + other.num_params_lookup,
            num_params_embedding=self.num_params_embedding + other.num_params_embedding,
            num_params_embedding_active=(
                self.num_params_embedding_active + other.num_params_embedding_active
            ),
            flops_by_component=_summed(self.flops_by_component, other.flops_by_component),
            extra_flops_by_component=_summed(
                self.extra_flops_by_component, other.extra_flops_by_component
            ),
            bytes_by_component=_summed(self.bytes_by_component, other.bytes_by_component),
        )

    def named(self, prefix: str) -> "Cost":
        """The same cost with every component called `<prefix>.<component>`."""
        return replace(
            self,
            flops_by_component=_prefixed(prefix, self.flops_by_component),
            extra_flops_by_component=_prefixed(prefix, self.extra_flops_by_component),
            bytes_by_component=_prefixed(prefix, self.bytes_by_component),
        )


def flops_by_convention(cost: Cost, tokens: int) -> dict[str, float]:
    """Training FLOPs of a run on `tokens` tokens under each of `CONVENTIONS`.

    - `matmul`: 3 x executed forward matrix products (module docstring).
    - `chinchilla`: Hoffmann et al. 2022, appendix F: `matmul`, plus the embedding look-up counted
    as
      a product with a one-hot vector (2 V d) and the attention softmax (3 per score), x 3.
    - `6n_active`: 6 x active parameters, embeddings included (Hoffmann's C = 6 N D with N as they
      count it; for sparse layers only what a token uses).
    - `6n_total`: 6 x stored parameters: what a tool that does not know of sparsity would print.
    - `non_embedding`: 6 x active parameters less input and output embeddings (Kaplan et al. 2020,
      section 2.1, C = 6 N with N non-embedding).
    """
    matmul = cost.flops_per_token
    extra = TRAINING_FLOPS_PER_FORWARD * float(sum(cost.extra_flops_by_component.values()))
    non_embedding = cost.num_params_active - cost.num_params_embedding_active
    per_token = {
        "matmul": matmul,
        "chinchilla": matmul + extra,
        "6n_active": 6.0 * cost.num_params_active,
        "6n_total": 6.0 * cost.num_params_total,
        "non_embedding": 6.0 * non_embedding,
    }
    return {name: per_token[name] * float(tokens) for name in CONVENTIONS}


def training_flops_by_component(cost: Cost, tokens: int) -> dict[str, float]:
    """Training FLOPs of a run on `tokens` tokens, split by component, `matmul` convention."""
    factor = TRAINING_FLOPS_PER_FORWARD * float(tokens)
    return {name: factor * flops for name, flops in cost.flops_by_component.items()}


def _summed(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in {**a, **b}}


def _prefixed(prefix: str, parts: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}.{name}": value for name, value in parts.items()}
