"""F09, F41: what does not change a result, does not change a bit of it."""

import os
import subprocess

import pytest
from torch import nn

from attempts import OPTIONS
from commands import BIN
from peer_scaling.record import RECORD, read_record
from peer_scaling.train import run_once
from planned_runs import BASE, SMALL, make_planned
from scorecard import report
from tiers import count

EVALUATIONS = ("eval.every=0.1", "eval.every=0.01", "eval.every=0")


def digest(folder, ffw, *options):
    record = run_once(make_planned(folder, "budget=7e8", "threads=1", *options, ffw=ffw))
    assert record.status == "done"
    return record.state_digest


@pytest.mark.parametrize("ffw", SMALL)
def test_how_often_it_evaluates(tmp_path, ffw):
    """F09."""
    chosen = EVALUATIONS[:: count(2, 1)]
    found = {digest(tmp_path / str(n), ffw, option) for n, option in enumerate(chosen)}
    assert len(found) == 1
    report("F09", f"{ffw}: every 10 %, every 1 %, never: 1 digest")


def test_control_an_evaluation_in_training_mode_is_found(tmp_path, monkeypatch):
    """The statistics of the query norm then take in the validation set."""
    never = digest(tmp_path / "never", "peer", "eval.every=0")
    monkeypatch.setattr(nn.Module, "eval", lambda self: self)
    assert digest(tmp_path / "often", "peer", "eval.every=0.1") != never


@pytest.mark.parametrize("ffw", SMALL if count(0, 1) else ["peer"])
def test_repeats_in_fresh_processes(tmp_path, ffw):
    """F41. The command each time, with its own hash seed."""
    repeats, found = count(2, 20), set()
    for number in range(repeats):
        arguments = [f"ffw={ffw}", *SMALL[ffw], *BASE, *OPTIONS, f"runs_dir={tmp_path}/{number}"]
        environment = os.environ | {"PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1"}
        command = [str(BIN / "peer-train"), *arguments]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        (path,) = (tmp_path / str(number)).rglob(RECORD)
        record = read_record(path)
        found.add((record.state_digest, record.loss, record.train_loss))
    assert len(found) == 1
    report("F41", f"{ffw}: {repeats} processes, 1 digest")


def test_control_another_seed_is_another_digest(tmp_path):
    assert digest(tmp_path, "peer") != digest(tmp_path, "peer", "seed=1")
