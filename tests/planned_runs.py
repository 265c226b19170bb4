"""Small planned runs for tests."""

import torch
from hydra import compose, initialize_config_dir

from peer_scaling.config import run_from
from peer_scaling.data import TrainingBatches, Windows
from peer_scaling.optim import make_optimizer
from peer_scaling.paths import config_folder
from peer_scaling.planned import plan_run
from peer_scaling.prepare import prepare
from peer_scaling.step import Stepper

SMALL = {
    "dense": [],
    "moe": ["ffw.num_experts=4"],
    "pkm": ["ffw.num_experts=64", "ffw.num_heads=2", "ffw.experts_per_head=4", "ffw.key_dim=8"],
    "peer": ["ffw.num_experts=64", "ffw.num_heads=2", "ffw.experts_per_head=4", "ffw.key_dim=8"],
}
BASE = [
    "data=synthetic", "tracker=off", "size=d8_l2", "budget=1e9", "batch_size=4", "eval.tokens=2048",
    "progress=off", "device=cpu", "data.num_tokens=100000",
]  # fmt: skip


def make_run(runs_dir, *overrides, ffw="peer"):
    with initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        chosen = [f"ffw={ffw}", *SMALL[ffw], *BASE, f"runs_dir={runs_dir}", *overrides]
        return run_from(compose("train", chosen))


def make_planned(runs_dir, *overrides, ffw="peer"):
    run = make_run(runs_dir, *overrides, ffw=ffw)
    return plan_run(run, prepare(run.data))


def stepper_of(planned):
    run = planned.run
    model = run.model()
    optimizer = make_optimizer(run.optim, model.optim_groups(), run.lr)
    return Stepper(run, model, optimizer, torch.device("cpu")), model, optimizer


def batch_of(planned, step=0):
    run = planned.run
    windows = Windows(prepare(run.data), "train", run.data.context)
    return TrainingBatches(windows, run.settings.batch_size, run.data.seed, run.data.order).batch(
        step
    )
