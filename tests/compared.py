"""A study of two variants in which every condition of a claim holds, and its runs at other rates."""

import numpy as np
import pandas as pd

from analysis.load import as_frame
from drawn_surfaces import CHINCHILLA

BUDGETS = (1e18, 4e18, 16e18)
WIDTHS = (0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0)
NOISE = 0.001
RATES = (0.005, 0.01, 0.02)
CONVENTIONS = ("flops_chinchilla", "flops_6n_active", "flops_6n_total", "flops_non_embedding")


def study(gap=0.05, seeds=5, variants=("dense", "peer"), budgets=BUDGETS):
    """(frame, tuning): the second variant's losses are `gap` nats below the first's."""
    rng = np.random.default_rng(0)
    rows, tried = [], []
    for variant in variants:
        for C in budgets:
            for width in WIDTHS:
                for seed in range(seeds):
                    loss = CHINCHILLA.loss(CHINCHILLA.best(C) * width, C) + rng.normal(0, NOISE)
                    row = run(variant, C, width, seed, loss - gap * (variant != variants[0]))
                    rows.append(row)
                tried += [at_rate(row, lr) for lr in RATES if lr != row["lr"]]
    return framed(rows), framed(rows + tried)


def framed(rows):
    return as_frame(rows).astype({"causal": "object", "dropless": "object"})


def run(variant, C, width, seed, loss):
    N = CHINCHILLA.best(C) * width
    return {
        "study": "made", "variant": variant, "ffw": variant, "size": f"x{width}", "budget": C,
        "seed": seed, "status": "done", "causal": True, "dropless": True, "device": "H100",
        "num_params_total": N, "num_params_active": N, "tokens": C / (6 * N), "flops": C,
        "loss": loss, "epochs": 0.5, "lr": 0.01, "train_seconds": C / 1e15,
        "peak_memory_bytes": 16 * N, "run_id": f"{variant}-{C:g}-{width}-{seed}",
        **dict.fromkeys(CONVENTIONS, C),
    }  # fmt: skip


def at_rate(row, lr):
    return {**row, "study": f"made_lr{lr}", "lr": lr, "loss": row["loss"] + 0.02}


def changed(frame, column, value, variant="peer", **where):
    """A copy with another value in the rows of a variant, of a budget or a size if given."""
    rows = frame["variant"] == variant
    for name, wanted in where.items():
        rows &= frame[name] == wanted
    assert rows.any()
    copy = frame.copy()
    copy.loc[rows, column] = value(copy.loc[rows, column]) if callable(value) else value
    return copy


def extended(frame, **values):
    """With one more run, excluded if it is not done."""
    row = {**run("peer", BUDGETS[0], 1.0, 0, 3.0), "run_id": "another", **values}
    return pd.concat([frame, framed([row])], ignore_index=True)
