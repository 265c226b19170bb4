"""Single runs and what users get wrong, from the command line."""

import subprocess
import sys
import time

import pytest

from commands import peer_train

FAST = ["data=synthetic", "tracker=off", "size=d8_l2", "budget=7e8", "ffw=dense", "batch_size=4"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ffw=mlp"], ["ffw=mlp: unknown; choose one of dense, moe, peer, pkm"]),
        (["bugdet=1e9"], ["bugdet: no such key; did you mean budget?"]),
        (
            ["ffw=mlp", "size=d7", "sead=1", "ffw.num_head=2"],
            ["ffw=mlp: unknown", "size=d7: unknown", "sead: no such key; did you mean seed?", "ffw.num_head: no such key; did you mean ffw.num_heads?"],
        ),
        (["+ffw.num_headz=2", "ffw=peer"], ["ffw.num_headz: no such key; did you mean num_heads?"]),
        (["budget=1e6"], ["budget=1e6 is too small for this model"]),
        (["data=local", "data.path=nowhere.txt"], ["data.path=nowhere.txt: no such file"]),
        (["ffw=peer", "ffw.num_experts=1000"], ["ffw.num_experts=1000 is not a square; use 961 or 1024"]),
        (["size.num_heads=3"], ["num_heads=3 does not divide d_model=8"]),
        (
            ["seed=abc", "budget=much", "ffw=peer", "ffw.num_experts=7", "ffw.key_dim=3", "optim.clip=-1", "threads=0"],
            ["seed=abc:", "budget=much:", "ffw.num_experts=7 is not a square", "ffw.key_dim=3 must be even", "optim.clip=-1", ],
        ),
        (["--config-name", "isoflop_labtop"], ["--config-name isoflop_labtop: unknown; choose one of", "isoflop_laptop"]),
        (["device=gpu9"], ["device=gpu9:"]),
        (["study=../escape"], ["study='../escape' must be the name of a folder"]),
        (["ffw=peer", "ffw.num_experts="], ["ffw.num_experts="]),
        (["--config-name", "smoke", "ffw=mlp"], ["ffw=mlp: unknown; choose one of dense, moe, peer, pkm"]),
        (["--config-name", "smoke", "variant=mlp", "budget=1e8"], ["variant=mlp: not in this study; choose from dense, moe, pkm, peer", "budget=1e8: the study has sizes for 2e9 only"]),
        (["--config-name", "smoke", "optim.lr=1,2"], ["optim.lr: a study sweeps over variant, ffw, size, budget, seed only"]),
        (["--config-name", "smoke", "threads=abc"], ["threads=abc:"]),
        (["--config-name", "smoke", "hydra.launcher.workers=-1"], ["hydra.launcher.workers=-1 must be in 1 to"]),
        (["--config-name", "smoke", "seed=0,0"], ["seed 0 occurs twice"]),
        (["--config-name", "smoke", "ffw=dense", "ffw.num_experts=4"], ["ffw.num_experts: no such key"]),
        (["size=null"], ["size=null:"]),
        (["optim.lr=nan", "data.seed=-1", "seed=99999999999999999999", "data.shard_tokens=60"], ["optim.lr=nan must be positive", "data.seed=-1 must be in", "seed=99999999999999999999 must be in", "data.shard_tokens=60 must exceed"]),
        (["-m", "ffw=dense,mlp"], ["ffw=mlp: unknown"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_each_exit_code_2_and_nothing_written(tmp_path, arguments, expected):
    fast = (
        []
        if "--config-name" in arguments
        else [f for f in FAST if f.split("=")[0] not in {a.split("=")[0] for a in arguments}]
    )
    result = peer_train(*arguments, *fast, folder=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines), lines
    for text in expected:
        assert any(text in line for line in lines), (text, lines)
    if "-m" not in arguments:
        assert not list(tmp_path.iterdir())


def test_a_traceback_is_shown_when_asked_for(tmp_path):
    result = peer_train("ffw=mlp", folder=tmp_path, HYDRA_FULL_ERROR="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_one_run_and_again(tmp_path):
    first = peer_train(*FAST, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "loss" in first.stdout
    (run,) = (tmp_path / "runs" / "default").iterdir()
    assert run.name.startswith("dense-d8_l2-7e8-s0-")
    files = {"record.json", "history.jsonl", "model.safetensors", "claim-000001.json"}
    assert {p.name for p in run.iterdir()} == files
    again = peer_train(*FAST, "log_lines=5", folder=tmp_path)
    assert "done before, not trained again" in again.stdout
    module = subprocess.run(
        [sys.executable, "-m", "peer_scaling.train", *FAST],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "done before" in module.stdout


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    result = peer_train(*FAST, "dry_run=true", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    header, row = result.stdout.strip().splitlines()[:2]
    for column in ("params", "active", "tokens/param", "steps", "FLOPs", "error", "est. time"):
        assert column in header
    assert "missing" in row
    assert not list(tmp_path.iterdir())


def test_a_plain_hydra_multirun_works(tmp_path):
    fast = [f for f in FAST if not f.startswith(("ffw", "seed"))]
    result = peer_train("-m", *fast, "ffw=dense", "seed=0,1", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "runs" / "default").glob("dense-*"))) == 2


def test_a_plain_multirun_in_worker_processes_keeps_the_exit_code(tmp_path):
    fast = [f for f in FAST if not f.startswith("seed")]
    local = ["-m", "hydra/launcher=local", *fast, "seed=0,1"]
    good = peer_train(*local, folder=tmp_path)
    assert good.returncode == 0, good.stderr
    assert len(list((tmp_path / "runs" / "default").glob("dense-*"))) == 2
    bad = peer_train(*local, "budget=1e6", folder=tmp_path)
    assert bad.returncode == 2


def test_help_and_config_are_hydras(tmp_path):
    text = peer_train("--help", folder=tmp_path).stdout
    assert "ffw: dense, moe, peer, pkm" in text
    assert "peer-train --config-name isoflop_laptop" in text
    config = peer_train("--cfg", "job", "ffw=pkm", folder=tmp_path).stdout
    assert "experts_per_head: 32" in config


def test_a_hub_that_does_not_answer_is_one_line_at_once(tmp_path):
    began = time.monotonic()
    arguments = ["data=c4", "size=d64_l4", "budget=2e14", "tracker=off", "ffw=dense"]
    result = peer_train(*arguments, folder=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: data=c4 cannot be reached")
    assert "data=sotu" in line
    assert "data=local" in line
    # 2 s on an idle machine; the tokenizer's own download would retry for 45 s.
    assert time.monotonic() - began < 15
    assert not list(tmp_path.iterdir())
