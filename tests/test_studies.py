"""Studies from the command line: what runs, what is skipped, what an interruption leaves."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from commands import BIN, command, peer_train


def test_axes_are_axes_however_they_are_set(tmp_path):
    smoke = ["--config-name", "smoke", "ffw=dense", "size=d8_l2", "dry_run=true"]
    plan = peer_train(*smoke, "++seed=3", "++budget=3e9", folder=tmp_path).stdout.splitlines()
    assert plan[1].split()[2:4] == ["3e9", "3"]


def test_a_launch_of_a_part_keeps_the_rest_of_the_plan(tmp_path):
    smoke = ["--config-name", "smoke"]
    assert peer_train(*smoke, "data.max_epochs=0.001", folder=tmp_path).returncode == 0
    for record in (tmp_path / "runs" / "smoke").glob("*/record.json"):
        record.unlink()  # what was refused is now a cell that did not run
    assert peer_train(*smoke, "ffw=dense", "size=d8_l2", folder=tmp_path).returncode == 0
    status = command("peer-status", "smoke", "--json", folder=tmp_path)
    assert json.loads(status.stdout)["counts"] == {"done": 1, "missing": 7}


def test_a_study_with_wandb_is_started_again(tmp_path):
    """W&B leaves a link to its log in the user's cache in every run's folder."""
    smoke = ["--config-name", "smoke", "ffw=dense", "size=d8_l2", "tracker=wandb"]
    assert peer_train(*smoke, folder=tmp_path, WANDB_MODE="offline").returncode == 0
    assert list(tmp_path.glob("runs/smoke/*/wandb/offline-run-*/*.wandb"))
    again = peer_train(*smoke, folder=tmp_path, WANDB_MODE="offline")
    assert (again.returncode, again.stderr) == (0, "")
    more = peer_train(*smoke, "seed=0,1", folder=tmp_path, WANDB_MODE="offline")
    assert more.returncode == 0, more.stderr
    assert more.stdout.count("nats, perplexity") == 1


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


@pytest.mark.parametrize(
    ("how", "send"),
    [
        (signal.SIGINT, os.kill), (signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill), (signal.SIGKILL, os.kill),
    ],
)  # fmt: skip
def test_workers_end_with_their_launcher(tmp_path, how, send):
    """And start nothing on the way: the cells that ran stay without a record, and close W&B."""
    arguments = ["--config-name", "smoke", "ffw=dense,peer", "budget=2e11", "size=d8_l2,d12_l2"]
    study = tmp_path / "runs" / "smoke"
    with subprocess.Popen(
        [str(BIN / "peer-train"), *arguments, "data.max_epochs=1000", "hydra.launcher.workers=2", "tracker=wandb",
         "hydra.sweeper.canary=false"],
        cwd=tmp_path, env=os.environ | {"WANDB_MODE": "offline"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # A shell starts what runs in the background with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as launcher:  # fmt: skip
        try:
            wait_for(lambda: sum(p.stat().st_size > 0 for p in study.glob("*/history.jsonl")) == 2)
            send(launcher.pid, how)
            output, _ = launcher.communicate(timeout=60)
        except BaseException:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise
    wait_for(lambda: not members_of(launcher.pid))
    assert len(list(study.glob("*/history.jsonl"))) == 2
    assert not list(study.glob("*/record.json"))
    assert b"Traceback" not in output, output.decode()
    logs = list(study.glob("*/wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2
    assert all(log.stat().st_size > 1000 for log in logs), [log.stat().st_size for log in logs]
    if how is signal.SIGINT:
        assert launcher.returncode == 75
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


def test_what_went_wrong_before_a_record_is_said(tmp_path):
    smoke = ["--config-name", "smoke", "ffw=dense", "size=d8_l2"]
    assert peer_train(*smoke, folder=tmp_path).returncode == 0
    (run,) = (tmp_path / "runs" / "smoke").glob("dense-*")
    shutil.rmtree(run)
    run.write_text("in the way")
    result = peer_train(*smoke, folder=tmp_path)
    assert result.returncode == 1
    assert "ended without a record (FileExistsError: " in result.stderr


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
    *_, header, row, error = result.stderr.splitlines()
    assert header.split("  ")[0] == "run"
    assert re.match(r"dense-d8_l2-2e9-s0-\w+ +failed +1 +0 +IsADirectoryError: ", row)
    command = "  peer-train --config-name smoke variant=dense size=d8_l2 budget=2e9 seed=0"
    assert row.endswith(command)
    assert error.startswith("error: 1 of 2 cells have no result; the same command starts them")
    assert "dense d12_l2 2e9 s0: loss" in result.stdout, "the other cell ran"
