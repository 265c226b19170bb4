"""AdamW, the learning-rate rule by width, and schedules as functions of the step."""

from collections import defaultdict
from dataclasses import dataclass
from math import cos, inf, pi

from torch import nn
from torch.optim import Optimizer

from peer_scaling.adamw import TABLE_UPDATES, AdamW
from peer_scaling.errors import check
from peer_scaling.ffw.base import ParamGroup

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019, 1711.05101) and its schedule."""

    lr: float | None = None
    """Peak learning rate; by default the rule min(lr_max, lr_scale / d_model)."""
    lr_max: float = 0.02
    lr_scale: float = 0.4
    """Fitted by hand to widths 8 to 64 on `sotu` (docs/log.md, 2026-11-22): the 1 / width of muP
    (Yang et al. 2022, 2203.03466) for Adam."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    schedule: str = "cosine"
    """`cosine`, `wsd` (warm-up, stable, linear decay) or `constant`."""
    warmup: float = 0.02
    """Warm-up as a fraction of the run's tokens."""
    decay: float = 0.2
    """`wsd`: decay as a fraction of the run's tokens."""
    final: float = 0.1
    """Learning rate of the last step over the peak, for `cosine` and `wsd`."""
    table_update: str = "dense"
    """What happens to the rows of a table that no token picked: `dense` is AdamW, `lazy` leaves
    them as they are (adamw.py)."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be positive"
            for name in ("lr_max", "lr_scale", "eps", "clip")
            if not 0 < getattr(self, name) < inf
        ]
        problems += [
            f"{name}={getattr(self, name)} must be in [0, 1)"
            for name in ("beta1", "beta2", "warmup", "decay")
            if not 0 <= getattr(self, name) < 1
        ]
        if self.lr is not None and not 0 < self.lr < inf:
            problems.append(f"lr={self.lr} must be positive")
        if not 0 <= self.weight_decay < inf:
            problems.append(f"weight_decay={self.weight_decay} must not be negative")
        if not 0 <= self.final <= 1:
            problems.append(f"final={self.final} must be in [0, 1]")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            problems.append(f"warmup={self.warmup} and decay={self.decay} exceed the run together")
        if self.schedule not in SCHEDULES:
            problems.append(f"schedule={self.schedule!r} is unknown; use {', '.join(SCHEDULES)}")
        if self.table_update not in TABLE_UPDATES:
            choices = ", ".join(TABLE_UPDATES)
            problems.append(f"table_update={self.table_update!r} is unknown; use {choices}")
        check(problems)


def peak_lr(config: OptimConfig, d_model: int) -> float:
    """The peak learning rate of a model of width `d_model`."""
    return min(config.lr_max, config.lr_scale / d_model) if config.lr is None else config.lr


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of a step (counted from 0) over the peak.

    Linear warm-up that reaches the peak at its end; then `cosine` falls to `final` at the last step
    (Hoffmann et al. 2022: the cycle's length is the run's), `wsd` stays and falls linearly over the
    last `decay` of the run (Haegele et al. 2024, 2405.18392), `constant` stays.
    """
    warmup_steps = max(1, round(config.warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "constant":
        return 1.0
    start = warmup_steps
    if config.schedule == "wsd":
        start = max(warmup_steps, steps - round(config.decay * steps))
    progress = max(0.0, (step - start + 1) / max(1, steps - start))
    if config.schedule == "wsd":
        return 1.0 - (1.0 - config.final) * progress
    return config.final + (1.0 - config.final) * 0.5 * (1.0 + cos(pi * progress))


def make_optimizer(config: OptimConfig, groups: list[ParamGroup], lr: float) -> AdamW:
    """AdamW over all groups, merged by decay and learning rate."""
    merged: defaultdict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for group in groups:
        merged[group.decay, group.lr_multiplier].extend(group.params)
    return AdamW(
        [
            {
                "params": params,
                "lr": lr * multiplier,
                "peak_lr": lr * multiplier,
                "weight_decay": config.weight_decay if decay else 0.0,
            }
            for (decay, multiplier), params in merged.items()
            if params
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        table_update=config.table_update,
    )


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
