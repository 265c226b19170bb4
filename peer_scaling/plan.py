"""From a budget to steps, and from a study to cells. Pure: no files, no devices, no Hydra.

A cell is one point of an isoFLOP study: a variant, a backbone, a budget and a seed. Its tokens
follow from the budget: tokens = budget / training FLOPs per token of that very model.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peer_scaling.cost import Cost
from peer_scaling.errors import UserError, check, repeated
from peer_scaling.paths import name_problems
from peer_scaling.record import budget_label

T = TypeVar("T", int, float)
MAX_BUDGET_ERROR = 0.005
"""Realised FLOPs may differ from the budget by this share, so 100 steps are always enough."""


@dataclass(frozen=True)
class Plan:
    """How a budget is spent on one model."""

    budget: float
    """Training FLOPs asked for."""
    flops: float
    """Training FLOPs of `steps` steps, `matmul` convention."""
    steps: int
    batch_tokens: int
    """Tokens per optimiser step."""

    @property
    def tokens(self) -> int:
        """Training tokens, repeated ones included."""
        return self.steps * self.batch_tokens

    @property
    def error(self) -> float:
        """(realised - budget) / budget."""
        return self.flops / self.budget - 1.0


class InfeasibleError(UserError):
    """A budget that this model cannot spend as asked; a study records it and goes on."""


def make_plan(budget: float, cost: Cost, batch_tokens: int) -> Plan:
    """Spend `budget` training FLOPs on a model of `cost`: whole steps, rounded to the nearest.

    Raises:
        InfeasibleError: so few steps that rounding misses the budget by more than 0.5 %.
    """
    if not 0 < budget < float("inf"):
        raise UserError(f"budget={budget} must be a positive number of training FLOPs, as 1e13")
    flops_per_step = cost.flops_per_token * batch_tokens
    steps = round(budget / flops_per_step)
    plan = Plan(float(budget), steps * flops_per_step, steps, batch_tokens)
    if steps < 1 or abs(plan.error) > MAX_BUDGET_ERROR:
        safe = float(f"{0.51 / MAX_BUDGET_ERROR * flops_per_step:.2e}")
        raise InfeasibleError(
            f"budget={budget_label(budget)} is too small for this model: "
            f"{budget / flops_per_step:.3g} steps of {batch_tokens} tokens cannot meet it within "
            f"{MAX_BUDGET_ERROR:.1%}; use "
            f"budget={budget_label(safe)} or more, a smaller size or a smaller batch_size"
        )
    return plan


@dataclass(frozen=True)
class Rung:
    """The sizes that a study trains at one budget."""

    budget: float
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """What an isoFLOP study trains: every variant at every size of every budget, per seed."""

    ladder: tuple[Rung, ...]
    variants: Mapping[str, Mapping[str, Any]]
    """Label -> settings of the variant in this study (keys of its `ffw` config). The label is the
    variant's name, or anything with `ffw: <name>` among the settings."""
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        problems = []
        for name in ("ladder", "variants", "seeds"):
            if not getattr(self, name):
                problems.append(f"{name} is empty")
        budgets = [rung.budget for rung in self.ladder]
        sizes = [size for rung in self.ladder for size in rung.sizes]
        problems += repeated("budget", [budget_label(b) for b in budgets])
        problems += [
            f"budget {budget_label(r.budget)} has no sizes" for r in self.ladder if not r.sizes
        ]
        problems += repeated("seed", self.seeds)
        problems += name_problems("size", sizes) + name_problems("variant", self.variants)
        for rung in self.ladder:
            problems += repeated(f"size at budget {budget_label(rung.budget)}", rung.sizes)
        check(problems)


@dataclass(frozen=True)
class Cell:
    """One run of a study, before it is planned."""

    variant: str
    ffw: str
    size: str
    budget: float
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def axes(self) -> list[str]:
        """The cell as the restriction of its study to it."""
        own = [f"variant={self.variant}", f"size={self.size}"]
        return [*own, f"budget={budget_label(self.budget)}", f"seed={self.seed}"]

    def overrides(self) -> list[str]:
        """The cell as Hydra overrides: `peer-train` with these trains it."""
        own = [f"ffw={self.ffw}", f"size={self.size}"]
        own += [f"budget={budget_label(self.budget)}", f"seed={self.seed}"]
        own += [f"ffw.{name}={value}" for name, value in self.settings.items()]
        return own if self.variant == self.ffw else [*own, f"variant={self.variant}"]


def enumerate_cells(study: Study) -> list[Cell]:
    """All cells of a study: by budget, then size, then variant, then seed."""
    return [
        _cell(label, settings, size, rung.budget, seed)
        for rung in study.ladder
        for size in rung.sizes
        for label, settings in study.variants.items()
        for seed in study.seeds
    ]


def restrict(study: Study, axes: Mapping[str, tuple[str, ...]]) -> Study:
    """The study with some axes replaced, as the command line asks.

    `variant` selects by label, `ffw` by the name of the layer; a `budget` that is not the study's
    needs `size` beside it; `size` and `seed` replace.

    Raises:
        UserError: a variant or budget that the study does not have, a number that is none, or
            nothing left.
    """
    ffw_of = {label: _ffw_name(label, own) for label, own in study.variants.items()}
    labels = axes.get("variant", tuple(ffw_of))
    names = axes.get("ffw", tuple(ffw_of.values()))
    known = {rung.budget: rung for rung in study.ladder}
    problems = _unknown("variant", labels, ffw_of) + _unknown("ffw", names, ffw_of.values())
    budgets = _numbers("budget", axes, float, problems) if "budget" in axes else list(known)
    seeds = _numbers("seed", axes, int, problems) if "seed" in axes else study.seeds
    for budget in budgets:
        if budget not in known and "size" not in axes:
            have = ", ".join(budget_label(b) for b in known)
            label = budget_label(budget)
            problems.append(f"budget={label}: the study has sizes for {have} only; give size= too")
    if problems:
        raise UserError(*problems)
    chosen = [label for label in labels if ffw_of[label] in names]
    sizes = axes.get("size")
    try:
        return Study(
            ladder=tuple(Rung(b, sizes or known[b].sizes) for b in budgets),
            variants={label: study.variants[label] for label in chosen},
            seeds=tuple(seeds),
        )
    except ValueError as error:
        raise UserError(*str(error).splitlines()) from error


def _numbers(
    axis: str, axes: Mapping[str, tuple[str, ...]], kind: Callable[[str], T], problems: list[str]
) -> list[T]:
    numbers = []
    for text in axes[axis]:
        try:
            numbers.append(kind(text))
        except ValueError:
            problems.append(f"{axis}={text}: not a number")
    return numbers


def _unknown(axis: str, asked: Iterable[str], known: Iterable[str]) -> list[str]:
    choices = list(dict.fromkeys(known))
    return [
        f"{axis}={value}: not in this study; choose from {', '.join(choices)}"
        for value in asked
        if value not in choices
    ]


def _ffw_name(label: str, settings: Mapping[str, Any]) -> str:
    return str(settings.get("ffw", label))


def _cell(label: str, settings: Mapping[str, Any], size: str, budget: float, seed: int) -> Cell:
    own = {name: value for name, value in settings.items() if name != "ffw"}
    return Cell(label, _ffw_name(label, settings), size, budget, seed, own)
