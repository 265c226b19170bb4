"""What seeing later tokens is worth to a layer that is not causal: its loss with each causal route
less that with the routing of its training, on the same weights and tokens, nats per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.load import routings, usable
from analysis.records import TOP_1
from peer_scaling.record import budget_label

TITLE = "What the leak is worth"
COLUMNS = ("variant", "budget", "routing", "runs", "nats above as trained", "from", "to")
EXPLAINED = (
    "Loss with a causal routing less that with the routing of training, which sees later tokens: "
    "mean over the runs of all sizes, and its range over them. The first routing ranks the "
    "variant, fixed in advance; others are reported."
)


@dataclass(frozen=True)
class Leak:
    """Of one variant at one budget by one causal route."""

    variant: str
    budget: float
    routing: str
    ranked: bool
    """Whether the variant is ranked by it."""
    num_runs: int
    mean: float
    """Over those runs, nats, as are the others."""
    least: float
    most: float


def find_leaks(frame: pd.DataFrame) -> list[Leak]:
    """By budget, then variant; the routing that ranks first. Of runs that are used and have both
    losses.

    Args:
        frame: as `load_runs` returns it.
    """
    return [leak for case in _cells(frame) for leak in case]


def _cells(frame: pd.DataFrame) -> Iterator[list[Leak]]:
    rows = usable(frame)
    rows = rows.loc[rows["routing"].notna()]
    by_variant = routings(frame)
    for (budget, variant), cell in rows.groupby(["budget", "variant"]):
        name, first = str(variant), by_variant[str(variant)]
        columns = {first: "loss"} | ({} if first == TOP_1 else {TOP_1: "loss_top1"})
        found = [
            _leak(name, float(str(budget)), routing, routing == first, cell, column)
            for routing, column in columns.items()
        ]
        yield [leak for leak in found if leak.num_runs]


def _leak(
    variant: str, budget: float, routing: str, ranked: bool, cell: pd.DataFrame, column: str
) -> Leak:
    above_U = (cell[column] - cell["loss_as_trained"]).dropna().to_numpy()
    ends = (np.mean, np.min, np.max)
    numbers = [float(of(above_U)) if len(above_U) else float("nan") for of in ends]
    return Leak(variant, budget, routing, ranked, len(above_U), *numbers)


def leak_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The leaks as text, indexed by variant; empty if no run has them."""
    rows = [
        (
            leak.variant,
            budget_label(leak.budget),
            leak.routing + ("" if leak.ranked else " (not ranked)"),
            str(leak.num_runs),
            *(f"{nats:+.4f}" for nats in (leak.mean, leak.least, leak.most)),
        )
        for leak in find_leaks(frame)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS)).set_index("variant")
