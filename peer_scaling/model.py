"""The decoder that every variant shares, and the one place where a feed-forward is swapped.

Pre-norm blocks: x + attention(norm(x)), then x + feed_forward(norm(x)). The feed-forward of the
middle block is the variant's; every other block is dense. The middle of n blocks is block n / 2
counted from 1 (He 2024, section 3.1: block 6 of 12), rounded up where n is odd.

Shape suffixes: B batch, T time, D model width, A width of one head, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from peer_scaling.attention import Attention, Rotary, per_head, rotary_table
from peer_scaling.cost import Cost
from peer_scaling.errors import check
from peer_scaling.ffw.base import FFW, FFWConfig, FFWOutput, ParamGroup, Routing, normal
from peer_scaling.ffw.dense import Dense
from peer_scaling.kernels.cross_entropy import cross_entropy_sum
from peer_scaling.kernels.rms_norm import rms_norm

NORMS = ("rms", "layer")
NORM_EPS = 1e-6
EMBEDDING_STD = 0.02
"""GPT-2's. Small, so that an untrained tied head predicts a nearly uniform distribution."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and choices of the backbone; everything but the swapped feed-forward."""

    d_model: int
    num_layers: int
    num_heads: int
    norm: str = "rms"
    """`rms` (Zhang and Sennrich 2019) or `layer`, both with a learned gain and no bias."""
    rotary_base: float = 10_000.0
    """Base of the rotary positions (Su et al. 2021)."""
    bias: bool = False
    tie_embeddings: bool = True
    normalize_embeddings: bool = True
    """Scale each token's embedding to unit mean square before the first block, without a gain, so
    that the residual stream starts at the scale of what blocks add to it."""
    ffw: Dense = field(default_factory=Dense)
    """The feed-forward of the blocks that are not swapped."""

    def __post_init__(self) -> None:
        positive = ("d_model", "num_layers", "num_heads", "rotary_base")
        problems = [
            f"{n}={getattr(self, n)} must be positive"
            for n in positive
            if not 0 < getattr(self, n) < inf
        ]
        if not problems and self.d_model % self.num_heads:
            problems.append(f"num_heads={self.num_heads} does not divide d_model={self.d_model}")
        elif not problems and (self.d_model // self.num_heads) % 2:
            problems.append(
                f"d_model / num_heads = {self.d_model // self.num_heads} must be even: "
                f"rotary positions turn pairs"
            )
        if self.norm not in NORMS:
            problems.append(f"norm={self.norm!r} is unknown; choose one of {', '.join(NORMS)}")
        check(problems)

    @property
    def swapped_block(self) -> int:
        """0-based number of the block whose feed-forward is the variant's."""
        return (self.num_layers + 1) // 2 - 1


@dataclass(frozen=True)
class DecoderOutput:
    """What the decoder returns for (batch, time) tokens."""

    hidden_BTD: Tensor
    """Normalised output of the last block."""
    head_VD: Tensor
    """Output head: the parameter itself."""
    aux_loss: Tensor
    """Scalar to add to the training loss."""
    stats: Routing | None
    """Expert choices of the swapped feed-forward."""

    @property
    def logits_BTV(self) -> Tensor:
        """Next-token logits, computed on each access: all of them at once, for small inputs."""
        return functional.linear(self.hidden_BTD, self.head_VD)

    def cross_entropy_sum(self, target_BT: Tensor) -> Tensor:
        """Summed cross-entropy with int64 (batch, time) next tokens: nats, float64, a scalar."""
        return cross_entropy_sum(self.hidden_BTD.flatten(0, 1), self.head_VD, target_BT.flatten())


def build_model(
    config: DecoderConfig,
    ffw: FFWConfig,
    vocab_size: int,
    context: int,
    seed: int,
    *,
    activation_checkpointing: bool = False,
) -> "Decoder":
    """The model with initial weights that depend on `seed` alone, on the CPU, in float32.

    With `activation_checkpointing`, the backward pass computes attention and dense feed-forwards a
    second time instead of keeping what is inside them: the same bits, less memory, more time. The
    swapped feed-forward is left out: a second forward pass would move the running statistics of a
    batch norm twice.
    """
    generator = torch.Generator().manual_seed(seed)
    return Decoder(config, ffw, vocab_size, context, generator, activation_checkpointing)


def model_cost(config: DecoderConfig, ffw: FFWConfig, vocab_size: int, context: int) -> Cost:
    """Cost per token of `build_model`'s result at full context, by component."""
    d_model, layers = config.d_model, config.num_layers
    num_norms = 2 * layers + 1
    embedding = vocab_size * d_model
    tables = 1 if config.tie_embeddings else 2
    head_and_norms = Cost(
        num_params_total=tables * embedding + num_norms * d_model,
        num_params_active=embedding + (tables - 1) * d_model + num_norms * d_model,
        num_params_embedding=tables * embedding,
        num_params_embedding_active=embedding + (tables - 1) * d_model,
        flops_by_component={"head": 2.0 * embedding},
        extra_flops_by_component={
            "embedding": 2.0 * embedding,
            "attention_softmax": 3.0 * layers * config.num_heads * context,
        },
    )
    projections = 4 * d_model**2 * layers
    biases = 4 * d_model * layers if config.bias else 0
    attention = Cost(
        num_params_total=projections + biases,
        num_params_active=projections + biases,
        flops_by_component={
            "attention_projections": 2.0 * projections,
            "attention_scores": 2.0 * context * d_model * layers,
            "attention_values": 2.0 * context * d_model * layers,
        },
    )
    total = head_and_norms + attention + ffw.cost(d_model).named("swapped_ffw")
    for _ in range(layers - 1):
        total = total + config.ffw.cost(d_model).named("ffw")
    return total


class Decoder(nn.Module):
    """Next-token distributions from tokens."""

    def __init__(
        self,
        config: DecoderConfig,
        ffw: FFWConfig,
        vocab_size: int,
        context: int,
        generator: torch.Generator,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        out_scale = (2 * config.num_layers) ** -0.5  # GPT-2: one part in 2 L residual branches
        self.embedding_VD = normal((vocab_size, config.d_model), EMBEDDING_STD, generator)
        self.head_VD = (
            None
            if config.tie_embeddings
            else normal((vocab_size, config.d_model), EMBEDDING_STD, generator)
        )
        self.blocks = nn.ModuleList()
        for number in range(config.num_layers):
            swapped = number == config.swapped_block
            block_ffw = ffw if swapped else config.ffw
            layer = block_ffw.build(config.d_model, out_scale=out_scale, generator=generator)
            parts = Checkpointed(activation_checkpointing, activation_checkpointing and not swapped)
            self.blocks.append(Block(config, layer, out_scale, generator, parts))
        self.norm = _norm(config)
        cos_TA, sin_TA = rotary_table(
            config.d_model // config.num_heads, config.rotary_base, context
        )
        self.cos_TA: Tensor
        self.sin_TA: Tensor
        self.register_buffer("cos_TA", cos_TA, persistent=False)
        self.register_buffer("sin_TA", sin_TA, persistent=False)

    def forward(self, tokens_BT: Tensor) -> DecoderOutput:
        """Next-token hidden states and head for int64 tokens of at most `context` positions."""
        time = tokens_BT.shape[1]
        if time > len(self.cos_TA):
            raise ValueError(f"{time} tokens exceed the model's context of {len(self.cos_TA)}")
        rotary = per_head(self.cos_TA[:time], self.sin_TA[:time], self.config.num_heads)
        x_BTD = self._embed(tokens_BT)
        aux_loss, stats = x_BTD.new_zeros(()), None
        for block in self.blocks:
            output = block(x_BTD, rotary)
            x_BTD = output.y_BTD
            aux_loss = aux_loss + output.aux_loss
            stats = stats if output.stats is None else output.stats
        head_VD = self.embedding_VD if self.head_VD is None else self.head_VD
        return DecoderOutput(self.norm(x_BTD), head_VD, aux_loss, stats)

    @property
    def swapped(self) -> FFW:
        """The feed-forward that is the variant's."""
        return cast(Block, self.blocks[self.config.swapped_block]).ffw

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = functional.embedding(tokens_BT, self.embedding_VD)
        return rms_norm(x_BTD, None, NORM_EPS) if self.config.normalize_embeddings else x_BTD

    def optim_groups(self) -> list[ParamGroup]:
        """Every parameter once: matrices decay; norms, biases and vocabulary tables do not."""
        tables = tuple(t for t in (self.embedding_VD, self.head_VD) if t is not None)
        groups = [ParamGroup(tables, decay=False), ParamGroup(tuple(self.norm.parameters()), False)]
        for block in self.blocks:
            assert isinstance(block, Block)
            groups += block.optim_groups()
        return groups


class Checkpointed(NamedTuple):
    """The parts of a block that the backward pass computes a second time."""

    attention: bool
    ffw: bool


class Block(nn.Module):
    """Attention and a feed-forward, each on a normalised residual stream."""

    def __init__(
        self,
        config: DecoderConfig,
        ffw: FFW,
        out_scale: float,
        generator: torch.Generator,
        checkpointed: Checkpointed,
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.attention_norm = _norm(config)
        self.attention = Attention(
            config.d_model, config.num_heads, config.bias, out_scale, generator
        )
        self.ffw_norm = _norm(config)
        self.ffw = ffw

    def forward(self, x_BTD: Tensor, rotary: Rotary) -> FFWOutput:
        """The residual stream after the block, as `y`, and what the feed-forward reported."""
        x_BTD = x_BTD + _call(self.checkpointed.attention, self._attend, x_BTD, rotary)
        output = _call(self.checkpointed.ffw, self._feed_forward, x_BTD)
        return output._replace(y_BTD=x_BTD + output.y_BTD)

    def _attend(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        return self.attention(self.attention_norm(x_BTD), rotary)

    def _feed_forward(self, x_BTD: Tensor) -> FFWOutput:
        return self.ffw(self.ffw_norm(x_BTD))

    def optim_groups(self) -> list[ParamGroup]:
        """The attention's, the norms' and the feed-forward's groups."""
        norms = (*self.attention_norm.parameters(), *self.ffw_norm.parameters())
        return [
            *self.attention.optim_groups(),
            ParamGroup(norms, decay=False),
            *self.ffw.optim_groups(),
        ]


class RMSNorm(nn.Module):
    """`rms_norm` with a learned gain that starts at 1."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each token to unit mean square, times the gain."""
        return rms_norm(x_BTD, self.weight, NORM_EPS)


def _call(checkpointed: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, kept or computed again in the backward pass. No part draws random
    numbers, so their state need not be kept either.
    """
    if not (checkpointed and torch.is_grad_enabled()):
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _norm(config: DecoderConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.d_model)
    return nn.LayerNorm(config.d_model, bias=False)
