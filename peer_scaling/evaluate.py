"""Validation loss over a fixed set of tokens, without a trace in the training state.

Shape suffixes: B sequences, T time, L choices, N experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp, log

import torch
from torch import nn

from peer_scaling.data import Windows
from peer_scaling.distributed import ALONE, World
from peer_scaling.ffw.base import Routing


@dataclass(frozen=True)
class EvalConfig:
    """The final evaluation."""

    tokens: int = 131_072
    """Validation tokens to predict, from the start of the split; fewer if it holds fewer. Rounded
    down to whole batches of a training step, which expert choice routes as it does in training."""
    every: float = 0.0
    """Evaluate after each such fraction of the run too; 0 means at the end only."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be positive")
        if not 0 <= self.every <= 1:
            raise ValueError(f"every={self.every} must be in [0, 1]")


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`."""

    loss: float
    """Mean cross-entropy, nats per token; auxiliary losses are no part of it."""
    tokens: int
    """Predicted tokens."""
    expert_usage: float | None
    """Share of the experts that got any router score (He 2024, section 3.3)."""
    expert_unevenness: float | None
    """KL divergence of the experts' shares of the router score from uniform, nats (ibid.)."""
    expert_usage_growth: Mapping[int, float] = field(default_factory=dict)
    """The usage after the first so many tokens, at each doubling of the batches and at the end."""

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss over all tokens."""
        return exp(self.loss) if self.loss < 700 else float("inf")

    def bits_per_byte(self, text_bytes: float | None) -> float | None:
        """Loss of all tokens in bits over the bytes of their text, comparable between
        tokenizers.
        """
        return text_bytes and self.loss * self.tokens / log(2) / text_bytes


def num_batches(config: EvalConfig, windows: Windows, batch_size: int) -> int:
    """Whole batches of the validation set that `evaluate` reads; 0 if it holds no whole one."""
    return min(config.tokens // windows.context, len(windows)) // batch_size


def evaluate(
    losses: nn.Module,
    windows: Windows,
    batches: int,
    batch_size: int,
    device: torch.device,
    autocast: torch.autocast,
    check: Callable[[], None] = lambda: None,
    world: World = ALONE,
    use: "ExpertUse | None" = None,
) -> Evaluation:
    """Mean loss over the first `batches * batch_size` windows, in eval mode, summed in float64.

    `losses` (parallel.py) makes a `LossOutput` of tokens; each rank of `world` has its share of
    every batch. The mode is restored and no random number is drawn, so training goes on as if this
    had not been called; also if `check`, which is called before each batch, raises. `use` is given
    what this rank's experts did.
    """
    was_training = losses.training
    losses.eval()
    own_B = world.own_sequences(batch_size, batch_size)
    total = torch.zeros((), dtype=torch.float64, device=device)
    usage, growth = use or ExpertUse(), {}
    try:
        with torch.no_grad(), autocast:
            for batch in range(batches):
                check()
                tokens_BT = torch.from_numpy(windows.read(batch * batch_size + own_B)).to(device)
                output = losses(tokens_BT)
                total += output.cross_entropy_sum
                usage.add(output.stats)
                if batch & (batch + 1) == 0:
                    growth[batch + 1] = usage.over(world, device).usage
    finally:
        losses.train(was_training)
    world.sum_(total)
    usage = usage.over(world, device)
    growth[batches] = usage.usage
    each = batch_size * windows.context
    tokens = batches * each
    by_tokens = {n * each: share for n, share in growth.items() if share is not None}
    loss = float(total) / tokens
    return Evaluation(loss, tokens, usage.usage, usage.unevenness, by_tokens)


class ExpertUse:
    """Router scores summed, and choices counted, per expert over evaluation batches; in float64."""

    def __init__(
        self, score_N: torch.Tensor | None = None, choices_N: torch.Tensor | None = None
    ) -> None:
        self._score_N, self._choices_N = score_N, choices_N

    def add(self, stats: Routing | None) -> None:
        """Count one forward pass; None for a layer without experts."""
        if stats is None:
            return
        # On the CPU, where the sum has one order: on a GPU it is not deterministic.
        expert_L, weight_L = stats.expert.flatten().cpu(), stats.weight.flatten().double().cpu()
        score_N = torch.bincount(expert_L, weight_L, minlength=stats.num_experts)
        choices_N = torch.bincount(expert_L, minlength=stats.num_experts).double()
        self._score_N = score_N if self._score_N is None else self._score_N + score_N
        self._choices_N = choices_N if self._choices_N is None else self._choices_N + choices_N

    def over(self, world: World, device: torch.device) -> "ExpertUse":
        """That of all ranks, whose tensors are on `device`."""
        if self._score_N is None or self._choices_N is None:
            return self
        both_2N = torch.stack([self._score_N, self._choices_N]).to(device)
        return ExpertUse(*world.sum_(both_2N).cpu())

    @property
    def score_N(self) -> torch.Tensor | None:
        """Sum of the router score of each expert, float64; None without experts."""
        return self._score_N

    @property
    def choices_N(self) -> torch.Tensor | None:
        """How often each expert was chosen, float64; None without experts."""
        return self._choices_N

    @property
    def usage(self) -> float | None:
        """Share of experts with a score above 0."""
        if self._score_N is None:
            return None
        return float((self._score_N > 0).double().mean())

    @property
    def unevenness(self) -> float | None:
        """Log N + sum z log z with z the experts' shares (He 2024, section 3.3; natural log)."""
        if self._score_N is None:
            return None
        share_N = self._score_N / self._score_N.sum()
        return float(log(len(share_N)) + torch.special.xlogy(share_N, share_N).sum())
