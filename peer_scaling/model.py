"""The decoder that every variant shares, and the one place where a feed-forward is swapped.

Pre-norm blocks: x + attention(norm(x)), then x + feed_forward(norm(x)). The feed-forward of the
middle block is the variant's; every other block is dense. The middle of n blocks is block n / 2
counted from 1 (He 2024, section 3.1: block 6 of 12), rounded up where n is odd.

Shape suffixes: B batch, T time, D model width, H heads, A width of one head, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from peer_scaling.cost import Cost
from peer_scaling.errors import check
from peer_scaling.ffw.base import FFW, FFWConfig, FFWOutput, ParamGroup, Routing, normal
from peer_scaling.ffw.dense import Dense
from peer_scaling.kernels.cross_entropy import cross_entropy_sum

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
            f"{n}={getattr(self, n)} must be positive" for n in positive if getattr(self, n) <= 0
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
    config: DecoderConfig, ffw: FFWConfig, vocab_size: int, context: int, seed: int
) -> "Decoder":
    """The model with initial weights that depend on `seed` alone, on the CPU, in float32."""
    generator = torch.Generator().manual_seed(seed)
    return Decoder(config, ffw, vocab_size, context, generator)


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
            block_ffw = ffw if number == config.swapped_block else config.ffw
            layer = block_ffw.build(config.d_model, out_scale=out_scale, generator=generator)
            self.blocks.append(Block(config, layer, out_scale, generator))
        self.norm = _norm(config)
        cos_TA, sin_TA = _rotary_table(config, context)
        self.cos_TA: Tensor
        self.sin_TA: Tensor
        self.register_buffer("cos_TA", cos_TA, persistent=False)
        self.register_buffer("sin_TA", sin_TA, persistent=False)

    def forward(self, tokens_BT: Tensor) -> DecoderOutput:
        """Next-token hidden states and head for int64 tokens of at most `context` positions."""
        time = tokens_BT.shape[1]
        if time > len(self.cos_TA):
            raise ValueError(f"{time} tokens exceed the model's context of {len(self.cos_TA)}")
        rotary = (self.cos_TA[:time], self.sin_TA[:time])
        x_BTD = self._embed(tokens_BT)
        aux_loss, stats = x_BTD.new_zeros(()), None
        for block in self.blocks:
            x_BTD, output = block(x_BTD, rotary)
            aux_loss = aux_loss + output.aux_loss
            stats = stats if output.stats is None else output.stats
        head_VD = self.embedding_VD if self.head_VD is None else self.head_VD
        return DecoderOutput(self.norm(x_BTD), head_VD, aux_loss, stats)

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = functional.embedding(tokens_BT, self.embedding_VD)
        if self.config.normalize_embeddings:
            return functional.rms_norm(x_BTD, x_BTD.shape[-1:], eps=NORM_EPS)
        return x_BTD

    def optim_groups(self) -> list[ParamGroup]:
        """Every parameter once: matrices decay; norms, biases and vocabulary tables do not."""
        tables = tuple(t for t in (self.embedding_VD, self.head_VD) if t is not None)
        groups = [ParamGroup(tables, decay=False), ParamGroup(tuple(self.norm.parameters()), False)]
        for block in self.blocks:
            assert isinstance(block, Block)
            groups += block.optim_groups()
        return groups


class Block(nn.Module):
    """Attention and a feed-forward, each on a normalised residual stream."""

    def __init__(
        self, config: DecoderConfig, ffw: FFW, out_scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config, out_scale, generator)
        self.ffw_norm = _norm(config)
        self.ffw = ffw

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, FFWOutput]:
        """The residual stream after the block, and what the feed-forward reported."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary)
        output = self.ffw(self.ffw_norm(x_BTD))
        return x_BTD + output.y_BTD, output

    def optim_groups(self) -> list[ParamGroup]:
        """The attention's, the norms' and the feed-forward's groups."""
        norms = (*self.attention_norm.parameters(), *self.ffw_norm.parameters())
        return [
            *self.attention.optim_groups(),
            ParamGroup(norms, decay=False),
            *self.ffw.optim_groups(),
        ]


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: DecoderConfig, out_scale: float, generator: torch.Generator) -> None:
        super().__init__()
        d_model, std = config.d_model, config.d_model**-0.5
        self.num_heads = config.num_heads
        self.qkv_ED = normal((3 * d_model, d_model), std, generator)
        self.out_DD = normal((d_model, d_model), out_scale * std, generator)
        self.qkv_bias_E = nn.Parameter(torch.zeros(3 * d_model)) if config.bias else None
        self.out_bias_D = nn.Parameter(torch.zeros(d_model)) if config.bias else None

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Mix each token with itself and earlier ones; same shape as the input."""
        qkv_BTE = functional.linear(x_BTD, self.qkv_ED, self.qkv_bias_E)
        heads_BTPHA = qkv_BTE.unflatten(-1, (3, self.num_heads, -1))
        q_BHTA, k_BHTA, v_BHTA = heads_BTPHA.permute(2, 0, 3, 1, 4).unbind(0)
        y_BHTA = functional.scaled_dot_product_attention(
            _rotate(q_BHTA, rotary), _rotate(k_BHTA, rotary), v_BHTA, is_causal=True
        )
        return functional.linear(y_BHTA.transpose(1, 2).flatten(2), self.out_DD, self.out_bias_D)

    def optim_groups(self) -> list[ParamGroup]:
        """Weights decay, biases do not."""
        biases = tuple(b for b in (self.qkv_bias_E, self.out_bias_D) if b is not None)
        return [ParamGroup((self.qkv_ED, self.out_DD), decay=True), ParamGroup(biases, False)]


def _norm(config: DecoderConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=NORM_EPS)
    return nn.LayerNorm(config.d_model, bias=False)


def _rotary_table(config: DecoderConfig, context: int) -> tuple[Tensor, Tensor]:
    """Cos and sin of t * base^(-2 i / A), each (context, A), pairs (i, i + A / 2) alike."""
    width = config.d_model // config.num_heads
    frequency_A = config.rotary_base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_TA = torch.outer(torch.arange(context, dtype=torch.float64), frequency_A).repeat(1, 2)
    return angle_TA.cos().float(), angle_TA.sin().float()


def _rotate(x_BHTA: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of channels by its position's angle (Su et al. 2021, 2104.09864, eq. 34)."""
    cos_TA, sin_TA = rotary
    first, second = x_BHTA.chunk(2, dim=-1)
    turned_BHTA = torch.cat((-second, first), dim=-1)
    return (x_BHTA * cos_TA + turned_BHTA * sin_TA).to(x_BHTA.dtype)
