"""The published runs of `$PEER_SCALING_DATA/scaling`, and surfaces made up to stand in for them."""

import json

import numpy as np
import pandas as pd
import pytest

CHINCHILLA_ROWS = 245
SURFACE = {"A": 480.0, "B": 2100.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}


def scaling(folder, name):
    """A folder of runs; the test is skipped without it."""
    base = folder / "scaling" / name
    if not base.is_dir():
        pytest.skip(f"no runs at {base}; set PEER_SCALING_DATA")
    return base


def gemstones(folder, name):
    """(N, D, L) of one of the gemstones tables, and what was published of it if anything was."""
    base = scaling(folder, "gemstones")
    frame = pd.read_json(base / f"wandb_df_for_fitting_{name}.jsonl", lines=True)
    published = json.loads((base / f"published_a3_delta1e-3_{name}.json").read_text())
    columns = ("params_active_precise", "tokens", "final_loss")
    return [frame[column].to_numpy(dtype=float) for column in columns], published


def chinchilla(folder):
    """(N, D, L) of the digitised Chinchilla table without its five largest losses."""
    base = scaling(folder, "gemstones")
    for path in sorted(base.glob("*chinchilla*.jsonl")):
        frame = pd.read_json(path, lines=True)
        if len(frame) == CHINCHILLA_ROWS:
            kept = frame.sort_values("final_loss").iloc[:-5]
            N = kept["params_active_precise"].to_numpy(dtype=float)
            return N, kept["FLOPs"].to_numpy(dtype=float) / (6 * N), kept["final_loss"].to_numpy()
    pytest.skip(f"no digitised Chinchilla table of {CHINCHILLA_ROWS} runs in {base}")


def table(folder, name, file):
    return pd.read_csv(scaling(folder, name) / file)


def surface_runs(num_runs=240, noise=0.006, seed=0):
    """(N, D, L) around `SURFACE`, spread over five decades of C as Chinchilla's are."""
    rng = np.random.default_rng(seed)
    C = 10 ** rng.uniform(18, 22, num_runs)
    N = np.sqrt(C / 6) * 10 ** rng.uniform(-1, 0.6, num_runs)
    D = C / (6 * N)
    L = SURFACE["E"] + SURFACE["A"] * N ** -SURFACE["alpha"] + SURFACE["B"] * D ** -SURFACE["beta"]
    return N, D, L * np.exp(noise * rng.standard_t(3, num_runs))
