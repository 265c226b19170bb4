"""W&B is a mirror: complete offline, optional, and never in the way."""

import json
import subprocess
import sys
from pathlib import Path

from pandas.testing import assert_frame_equal

from analysis.load import load_runs, usable
from peer_scaling import track
from peer_scaling.record import SUMMARY_KEY, parse_record
from peer_scaling.train import run_once
from planned_runs import make_planned


def test_wandb_offline_holds_what_the_record_holds(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    planned = make_planned(tmp_path, "tracker=wandb", "budget=7e8", "study=mine", ffw="dense")
    record = run_once(planned)
    folders = list((planned.folder / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    (log,) = folders[0].glob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = text.replace(" ", "")
    assert f'"{planned.run_id}"' in text
    for part in ("mine", "d8_l2", "dense", "7e8", "train/loss", "eval/loss", "tokens", "flops"):
        assert part in text
    shown = subprocess.run([*command, "--summary"], capture_output=True, text=True, check=True)
    summary = json.loads(shown.stdout)["summary"]
    assert parse_record(summary[SUMMARY_KEY], log) == record
    assert summary["num_params_total"] == record.num_params_total
    from_records, mirrored = load_runs(planned.folder), load_runs(f"wandb-offline:{tmp_path}")
    assert_frame_equal(mirrored, from_records, check_exact=True)
    assert usable(from_records)["loss"].tolist() == [record.loss]


def test_wandb_goes_online_only_with_a_key(tmp_path, monkeypatch):
    from peer_scaling.track import TrackerConfig, wandb_mode

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_mode(TrackerConfig()) == "offline"
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password x\n")
    netrc.chmod(0o600)
    assert wandb_mode(TrackerConfig()) == "online"
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode(TrackerConfig()) == "online"
    assert wandb_mode(TrackerConfig(mode="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(TrackerConfig()) == "disabled"


def test_wandb_that_cannot_start_online_is_kept_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(track, "INIT_TIMEOUT_SECONDS", 1.0)
    planned = make_planned(tmp_path, "tracker=wandb", "budget=7e8", ffw="dense")
    record = run_once(planned)
    assert record.status == "done"
    assert f"{planned.run_id}: W&B (online) did not start: " in capsys.readouterr().out
    assert list((planned.folder / "wandb").glob("offline-run-*"))


def test_a_run_goes_on_without_a_tracker_that_cannot_start(tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise OSError("no room\nfor details")

    monkeypatch.setattr(track, "WandbTracker", broken)
    monkeypatch.setenv("WANDB_MODE", "offline")
    planned = make_planned(tmp_path, "tracker=wandb", "budget=7e8", ffw="dense")
    assert run_once(planned).status == "done"
    assert "W&B (offline) did not start: no room\n" in capsys.readouterr().out


def test_a_tracker_that_dies_does_not_take_the_run_with_it(tmp_path, monkeypatch, capsys):
    import wandb

    def dead(*arguments, **named):
        raise ConnectionResetError("Connection lost")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb.Run, "log", dead)
    planned = make_planned(tmp_path, "tracker=wandb", "budget=7e8", "seed=7", ffw="dense")
    assert run_once(planned).status == "done"
    assert capsys.readouterr().out.count("W&B stopped: Connection lost\n") == 1


def test_tracker_off_does_not_import_wandb(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; import planned_runs as r;"
        "from peer_scaling.train import run_once;"
        f"run_once(r.make_planned(Path({str(tmp_path)!r}), 'budget=7e8', ffw='dense'));"
        "assert 'wandb' not in sys.modules"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)
