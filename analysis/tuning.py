"""Whether variants were tuned, and as much as one another: their runs at other learning rates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.conditions import Condition, Settle, Status, command
from analysis.evidence import Study
from analysis.profile import Profile
from peer_scaling.record import budget_label

MIN_LEARNING_RATES = 3
"""Fewer cannot have an optimum between them."""


def learning_rates_interior(study: Study, profile: Profile) -> Condition:
    """At this budget the variant was trained at several learning rates, and the best of them is
    never the smallest or the largest. A run that diverged counts as an infinite loss.
    """
    cells = losses_by_learning_rate(study, profile.variant, profile.budget)
    tried = {size: found for size, found in cells.items() if len(found) >= MIN_LEARNING_RATES}
    if not tried:
        rates = ", ".join(
            f"{lr:g}" for lr in sorted({lr for found in cells.values() for lr in found})
        )
        why = f"fewer than {MIN_LEARNING_RATES} learning rates per size ({rates or 'none known'})"
        steps = _other_rates(study, profile, cells.get(profile.best_size, {}))
        return Condition(Status.UNKNOWN, f"{profile.variant}: {why}", steps)
    ends = [size for size, found in tried.items() if best_at_an_end(found)]
    if not ends:
        return Condition(Status.MET, f"{profile.variant}: interior at {', '.join(sorted(tried))}")
    why = f"the best learning rate of {', '.join(sorted(ends))} is at an end of those tried"
    steps = _other_rates(study, profile, tried[ends[0]], ends[0])
    return Condition(Status.NOT_MET, f"{profile.variant}: {why}", steps)


def losses_by_learning_rate(
    study: Study, variant: str, budget: float
) -> dict[str, dict[float, float]]:
    """Mean loss by size and learning rate, whether or not the isoFLOP fit may use the runs; models
    of other parameter counts are other variants under one label.
    """
    runs, same = study.tuning, set(study.rows(variant)["num_params_total"])
    own = runs.loc[(runs["variant"] == variant) & (runs["budget"] == budget)]
    own = own.loc[own["num_params_total"].isin(same)]
    losses: dict[str, dict[float, dict[Any, float]]] = {}
    columns = [own[name].tolist() for name in ("size", "lr", "seed", "loss", "status")]
    for u, (size, lr, seed, loss, status) in enumerate(zip(*columns, strict=True)):
        value = np.inf if status == "diverged" else loss
        if np.isfinite(lr) and not np.isnan(value):
            losses.setdefault(size, {}).setdefault(lr, {})[
                f"run {u}" if pd.isna(seed) else seed
            ] = value
    return {size: _means(found) for size, found in losses.items()}


def _means(found: dict[float, dict[Any, float]]) -> dict[float, float]:
    """Over the seeds that all learning rates have, over those of each where there are none."""
    shared = set.intersection(*(set(by_seed) for by_seed in found.values()))
    return {
        lr: float(np.mean([by_seed[seed] for seed in shared or by_seed]))
        for lr, by_seed in found.items()
    }


def best_at_an_end(found: dict[float, float]) -> bool:
    """Whether the rate of the lowest loss is the smallest or the largest of those tried."""
    rates = sorted(found)
    return min(rates, key=found.__getitem__) in (rates[0], rates[-1])


def _other_rates(
    study: Study, profile: Profile, found: dict[float, float], size: str = ""
) -> tuple[Settle, ...]:
    """Half and double the best learning rate, in studies of their own: a cell is there once."""
    if not found:
        return (Settle("a column `lr` with the learning rate of every run"),)
    best = min(found, key=found.__getitem__)
    size = size or profile.best_size
    lines = [
        command(
            study.name, variant=profile.variant, size=size, budget=budget_label(profile.budget),
            seed=0, optim__lr=f"{lr:g}", study=f"{study.name}_lr{lr:g}",
        )
        for lr in (best / 2, 2 * best)
        if lr not in found
    ]  # fmt: skip
    what = f"{size} of {profile.variant} at other learning rates"
    return tuple(Settle(what, 1, profile.budget, line) for line in lines)


def equal_tuning(study: Study, variants: Sequence[str]) -> Condition:
    """Both variants were tried at as many learning rates beyond the first of a cell."""
    tried = {variant: _num_tried(study, variant) for variant in variants}
    text = ", ".join(f"{variant} {num}" for variant, num in tried.items())
    text = f"settings tried beyond the first of a cell: {text}"
    if not any(tried.values()):
        return Condition(
            Status.UNKNOWN, text, (Settle("the runs that learning_rates_interior asks for"),)
        )
    if len(set(tried.values())) == 1:
        return Condition(Status.MET, text)
    fewer = min(tried, key=tried.__getitem__)
    lacking = max(tried.values()) - tried[fewer]
    cost = lacking * float(np.mean(study.rows(fewer)["budget"].to_numpy()))
    return Condition(
        Status.NOT_MET, text, (Settle(f"{lacking} more settings of {fewer}", lacking, cost),)
    )


def _num_tried(study: Study, variant: str) -> int:
    budgets = [p.budget for p in study.fit.profiles if p.variant == variant]
    cells = [losses_by_learning_rate(study, variant, budget) for budget in budgets]
    return sum(len(found) - 1 for cell in cells for found in cell.values())
