"""The commands as a user types them, in their own processes and folders."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
FAST = ["data=synthetic", "tracker=off", "size=d8_l2", "budget=7e8", "ffw=dense", "batch_size=4"]


def command(name, *arguments, folder, **environment):
    keep = {"PATH", "HOME", "PEER_SCALING_CACHE", "LANG", "TMPDIR"}
    env = {k: v for k, v in os.environ.items() if k in keep}
    env |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(BIN / name), *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def peer_train(*arguments, folder, **environment):
    return command("peer-train", *arguments, folder=folder, **environment)


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
    assert {p.name for p in run.iterdir()} == {"record.json", "history.jsonl", "model.safetensors"}
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


def test_two_labels_for_one_model_are_refused(tmp_path):
    twin = "+hydra.sweeper.variants.twin={ffw: dense}"
    result = peer_train("--config-name", "smoke", twin, folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: variants dense and twin are the same model; drop one"
    assert not list(tmp_path.iterdir())


def test_the_command_line_beats_the_study(tmp_path):
    arguments = ["--config-name", "smoke", "ffw=peer", "size=d8_l2", "dry_run=true"]
    params = [
        peer_train(*arguments, *more, folder=tmp_path).stdout.splitlines()[1].split()[4]
        for more in ([], ["ffw.num_experts=64"])
    ]
    assert params[0] != params[1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_launcher(tmp_path, how):
    """And start nothing on the way: the cells that ran stay without a record."""
    arguments = ["--config-name", "smoke", "ffw=dense,peer", "budget=2e11", "size=d8_l2,d12_l2"]
    study = tmp_path / "runs" / "smoke"
    with subprocess.Popen(
        [str(BIN / "peer-train"), *arguments, "data.max_epochs=1000", "threads=1", "hydra.launcher.workers=2"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        # A shell starts what runs in the background with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as launcher:  # fmt: skip
        try:
            wait_for(lambda: len(list(study.glob("*/history.jsonl"))) == 2)
            os.kill(launcher.pid, how)
            output, _ = launcher.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    wait_for(lambda: not members_of(launcher.pid))
    assert len(list(study.glob("*/history.jsonl"))) == 2
    assert not list(study.glob("*/record.json"))
    assert b"Traceback" not in output, output.decode()
    if how is signal.SIGINT:
        assert launcher.returncode == 130
        assert b"the same command continues" in output


def members_of(session):
    """Living processes of a session."""
    listing = subprocess.run(
        ["ps", "-eo", "sid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in listing.splitlines()]
    return [sid for sid, state in rows if int(sid) == session and not state.startswith("Z")]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_study_says_how_often_it_reads_its_data(tmp_path):
    smoke = ["--config-name", "smoke", "ffw=dense", "size=d8_l2", "data.num_tokens=20000"]
    result = peer_train(*smoke, "data.max_epochs=20", folder=tmp_path)
    (line,) = [line for line in result.stdout.splitlines() if "epochs" in line]
    with (tmp_path / "runs" / "smoke" / "plan.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert f"up to {float(row['epochs']):.2f} epochs of the data" in line
    assert float(row["epochs"]) > 4
    refused = peer_train(*smoke, "dry_run=true", folder=tmp_path)
    assert "epochs of data=synthetic" in refused.stdout
    assert "above data.max_epochs=4" in refused.stdout


def test_a_refusal_is_forgotten_when_it_no_longer_holds(tmp_path):
    smoke = ["--config-name", "smoke", "ffw=dense", "size=d8_l2"]
    refused = peer_train(*smoke, "data.max_epochs=0.001", folder=tmp_path)
    assert "1 infeasible" in refused.stdout
    assert peer_train(*smoke, folder=tmp_path).returncode == 0
    status = command("peer-status", "smoke", folder=tmp_path)
    assert status.stdout.strip() == "smoke: 1 cells: 1 done"
    assert len(list((tmp_path / "runs" / "smoke").glob("*/record.json"))) == 1


def test_help_and_config_are_hydras(tmp_path):
    text = peer_train("--help", folder=tmp_path).stdout
    assert "ffw: dense, moe, peer, pkm" in text
    assert "peer-train --config-name isoflop_laptop" in text
    config = peer_train("--cfg", "job", "ffw=pkm", folder=tmp_path).stdout
    assert "experts_per_head: 32" in config


def test_a_study_runs_once_shows_its_state_and_is_analysed(tmp_path):
    missing = command("peer-status", "smoke", folder=tmp_path)
    assert missing.returncode == 2
    assert "no plan.csv" in missing.stderr

    plan = peer_train("--config-name", "smoke", "dry_run=true", folder=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert "smoke: 8 cells, 8 missing" in plan.stdout
    assert not list(tmp_path.iterdir())

    part = peer_train("--config-name", "smoke", "ffw=dense", "size=d8_l2", folder=tmp_path)
    assert part.returncode == 0, part.stderr
    assert "smoke: 1 cells, 1 missing" in part.stdout

    first = peer_train("--config-name", "smoke", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "smoke: 8 cells, 1 done, 7 missing" in first.stdout
    assert first.stdout.count("perplexity") == 7

    second = peer_train("--config-name", "smoke", folder=tmp_path)
    assert second.returncode == 0
    assert "smoke: 8 cells, 8 done" in second.stdout
    assert second.stdout.count("perplexity") == 0

    status = command("peer-status", "smoke", "--json", folder=tmp_path)
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["counts"] == {"done": 8}

    with (tmp_path / "runs" / "smoke" / "plan.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["variant"], r["size"]) for r in rows} == {
        (v, s) for v in ("dense", "moe", "pkm", "peer") for s in ("d8_l2", "d12_l2")
    }
    assert all((tmp_path / "runs" / "smoke" / r["run_id"] / "record.json").is_file() for r in rows)

    analysis = command("peer-analyze", "isoflop", "runs/smoke", folder=tmp_path)
    assert analysis.returncode == 0, analysis.stderr
    assert "too few sizes" in analysis.stdout
    assert (tmp_path / "runs" / "smoke" / "analysis" / "isoflop.png").is_file()

    nothing = command("peer-analyze", "isoflop", "runs/nothing", folder=tmp_path)
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("error: runs/nothing: no such folder")


def test_a_refused_cell_is_recorded_and_the_rest_runs(tmp_path):
    axes = ["size=d8_l2,d128_l4", "ffw=dense"]
    result = peer_train("--config-name", "smoke", *axes, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "smoke: 2 cells, 1 missing, 1 infeasible" in result.stdout
    status = command("peer-status", "smoke", folder=tmp_path)
    assert "1 done, 1 infeasible" in status.stdout
    assert "too small for this model" in status.stdout


def test_the_plan_keeps_cells_of_earlier_launches_that_have_records(tmp_path):
    for axes in (["ffw=dense", "size=d8_l2"], ["ffw=moe", "size=d8_l2"]):
        assert peer_train("--config-name", "smoke", *axes, folder=tmp_path).returncode == 0
    with (tmp_path / "runs" / "smoke" / "plan.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["dense", "moe"]
    status = command("peer-status", "smoke", "--json", folder=tmp_path)
    assert json.loads(status.stdout)["counts"] == {"done": 2}


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


def test_a_failed_cell_is_named_with_the_command_that_repeats_it(tmp_path):
    blocked = tmp_path / "runs" / "smoke"
    blocked.mkdir(parents=True)
    plan = peer_train("--config-name", "smoke", "ffw=dense", "size=d8_l2", folder=tmp_path)
    assert plan.returncode == 0
    (run,) = blocked.glob("dense-*")
    for path in run.iterdir():
        path.unlink()
    (run / "history.jsonl").mkdir()  # the history cannot be opened
    result = peer_train("--config-name", "smoke", "ffw=dense", folder=tmp_path)
    assert result.returncode == 1
    assert "failed: IsADirectoryError" in result.stderr
    assert (
        "again with: peer-train --config-name smoke variant=dense size=d8_l2 budget=2e9 seed=0"
        in (result.stderr)
    )
    assert "dense d12_l2 2e9 s0: loss" in result.stdout, "the other cell ran"
