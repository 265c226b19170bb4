"""What saving costs a run: at the default interval, and at the most that is ever allowed.

    python -m benchmarks.checkpointing [--quick]

A run that is shorter than the interval is never saved by time, so that a short run with the default
against one without shows nothing. Two measurements stand in for hours of training:

1. One save of a state with moments, as training makes it: digest, serialising, checksums, fsync,
   rename, reading back, and deleting the oldest. Its share of the time between two saves at the
   default interval, which stretches where a save would take more than `max_share` of it.
2. Whole runs in turns, without checkpoints and with an interval so short that `max_share` (2 %)
   alone decides when to save: as many saves as there can ever be. The ratio of their wall times is
   the most that a run can lose, and holds what the first number leaves out, as cold caches.

Files go to the current folder's disk. Quote ratios, not seconds.
"""

import argparse
import json
import statistics
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch

from peer_scaling.checkpoint import CheckpointConfig
from peer_scaling.data import DataConfig
from peer_scaling.display import table_text
from peer_scaling.evaluate import EvalConfig
from peer_scaling.ffw.base import FFWConfig
from peer_scaling.ffw.dense import Dense
from peer_scaling.ffw.peer import PEER
from peer_scaling.model import DecoderConfig
from peer_scaling.optim import OptimConfig, make_optimizer
from peer_scaling.planned import PlannedRun, plan_run
from peer_scaling.prepare import prepare
from peer_scaling.run import Run, Settings
from peer_scaling.saver import Saver
from peer_scaling.snapshot import TrainingState
from peer_scaling.step import Stepper, read_results
from peer_scaling.tokenizer import TokenizerConfig
from peer_scaling.track import TrackerConfig
from peer_scaling.train import run_once

CPU = torch.device("cpu")
SHORT_SECONDS = 0.01
"""An interval that never decides."""


def make_run(ffw: FFWConfig, decoder: DecoderConfig, vocab_size: int, folder: str) -> Run:
    """A run on synthetic tokens; `compare_runs` sets its budget."""
    tokenizer = TokenizerConfig(kind="none", vocab_size=vocab_size)
    return Run(
        settings=Settings(
            budget=1e18, batch_size=4, runs_dir=folder, progress="off", device="cpu", threads=1
        ),
        ffw_name=type(ffw).__name__.lower(),
        ffw=ffw,
        decoder=decoder,
        data=DataConfig(
            source="synthetic", tokenizer=tokenizer, context=64, num_tokens=2**17, max_epochs=1e6
        ),
        optim=OptimConfig(),
        eval=EvalConfig(tokens=2048),
        tracker=TrackerConfig(kind="off"),
    )


def stepped(run: Run, steps: int) -> tuple[TrainingState, float]:
    """A state after some updates, and the seconds that one takes at best."""
    model = run.model()
    state = TrainingState(model, make_optimizer(run.optim, model.optim_groups(), run.lr))
    stepper = Stepper(run, model, state.optimizer, CPU)
    rng = np.random.Generator(np.random.Philox(key=0))
    shape = run.settings.batch_size, run.data.context + 1
    seconds = []
    for _ in range(steps):
        tokens = rng.integers(run.data.tokenizer.vocab_size, size=shape)
        began = time.perf_counter()
        read_results([stepper.step(tokens, 1.0)])
        seconds.append(time.perf_counter() - began)
    return state, min(seconds)


def seconds_per_save(run: Run, repeats: int) -> list[float]:
    """Of saves one after the other; the first, which deletes none, is left out."""
    planned = plan_run(run, None)
    state, _ = stepped(run, 1)
    saver = Saver(planned, lambda: state)
    losses, seconds = [1.0], []
    for _ in range(repeats + run.checkpoint.keep):
        losses.append(1.0)
        began = time.perf_counter()
        if not saver.save(losses, "", {}):
            raise OSError("not saved: there is nothing to measure")
        seconds.append(time.perf_counter() - began)
    return seconds[run.checkpoint.keep :]


def share_of_default(seconds: float) -> float:
    """Of the time from a save to the end of the next one."""
    default = CheckpointConfig()
    assert default.every_seconds is not None
    wait = max(default.every_seconds, seconds / default.max_share)
    return seconds / (wait + seconds)


def compare_runs(run: Run, seconds: float, rounds: int) -> tuple[list[float], list[int]]:
    """Wall time with as many saves as allowed over that without, per round; saves per run."""
    _, per_step = stepped(run, 8)
    steps = max(100, round(seconds / per_step))
    budget = run.cost().flops_per_token * run.batch_tokens * steps
    run = replace(run, settings=replace(run.settings, budget=budget))
    planned = plan_run(run, prepare(run.data))
    configs = {
        "off": CheckpointConfig(every_seconds=None),
        "on": CheckpointConfig(every_seconds=SHORT_SECONDS),
    }
    ratios, saves = [], []
    for number in range(rounds):
        wall = {}
        for name in sorted(configs, reverse=number % 2 == 1):
            wall[name], count = _timed(planned, configs[name], f"{number}-{name}")
            saves += [count] if name == "on" else []
        ratios.append(wall["on"] / wall["off"])
    return ratios, saves


def _timed(planned: PlannedRun, config: CheckpointConfig, study: str) -> tuple[float, int]:
    """Seconds of one whole run, and how often it was saved."""
    settings = replace(planned.run.settings, study=study)
    run = replace(planned.run, settings=settings, checkpoint=config)
    with (
        patch.object(Saver, "save", autospec=True, side_effect=Saver.save) as save,
        redirect_stdout(StringIO()),
    ):
        record = run_once(replace(planned, run=run))
    assert record.status == "done"
    assert record.wall_seconds is not None
    return record.wall_seconds, save.call_count


def main() -> None:
    """Print the tables and the JSON line."""
    arguments = _arguments()
    torch.set_num_threads(1)
    quick = arguments.quick
    with TemporaryDirectory(dir=Path.cwd(), prefix=".checkpointing-") as folder:
        decoder = DecoderConfig(64, 2, 4) if quick else DecoderConfig(256, 6, 4)
        vocab_size, experts = (1024, 64**2) if quick else (8192, 256**2)
        runs = {
            "dense": make_run(Dense(), decoder, vocab_size, folder),
            "peer": make_run(PEER(num_experts=experts), decoder, vocab_size, folder),
        }
        ratios = _print_saves(runs, 3 if quick else 5)
        decoder = DecoderConfig(64, 2, 4) if quick else DecoderConfig(128, 4, 4)
        ffw = PEER(num_experts=32**2 if quick else 64**2)
        run = make_run(ffw, decoder, 64, folder)
        rounds = 1 if quick else arguments.rounds
        slower, saves = compare_runs(run, 2.0 if quick else 40.0, rounds)
    print(f"runs in turns: {saves} saves, wall time with over without {slower}")
    ratios["wall_with_most_saves_over_without"] = statistics.median(slower)
    print(json.dumps({name: round(ratio, 6) for name, ratio in ratios.items()}))


def _print_saves(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    rows, ratios = [], {}
    for name, run in runs.items():
        seconds = seconds_per_save(run, repeats)
        params = run.cost().num_params_total
        share = share_of_default(statistics.median(seconds))
        ratios[f"{name}_share_of_default_interval"] = share
        ratios[f"{name}_share_slowest"] = share_of_default(max(seconds))
        rows.append(
            [
                name,
                f"{params / 1e6:.1f}",
                f"{12 * params / 2**20:.0f}",
                f"{statistics.median(seconds):.2f}",
                f"{max(seconds):.2f}",
                f"{100 * share:.3f} %",
            ]
        )
    columns = "state", "M params", "MiB", "s per save", "slowest", "of the default interval"
    print(table_text(columns, rows))
    return ratios


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
