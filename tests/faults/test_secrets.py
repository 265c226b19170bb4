"""F32: secrets of the environment and of netrc are nowhere in what is written or printed."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest

from canaries import SECRETS, find, plant
from hostile import FAST
from scorecard import report
from tiers import count

WANDB = (*(a for a in FAST if a != "tracker=off"), "tracker=wandb")
OFFLINE = {"WANDB_MODE": "offline"}
ONLINE = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}
FULL = {"HYDRA_FULL_ERROR": "1"}
SCENARIOS = {
    "a run that succeeds, W&B offline": ("nowhere", WANDB, OFFLINE, 0),
    "a run that crashes, all tracebacks": ("training", WANDB, OFFLINE | FULL, 1),
    "a W&B that cannot be reached": ("nowhere", WANDB, ONLINE, 0),
    "a crash outside a run": ("planning", FAST, {}, 1),
    "a secret asked for": ("nowhere", (*FAST, "variant=${oc.env:HF_TOKEN}"), {}, 2),
    "a run that crashes, W&B offline": ("training", WANDB, OFFLINE, 1),
    "a crash outside a run, all tracebacks": ("planning", FAST, FULL, 1),
    "a W&B that fails and quotes": ("tracker", WANDB, OFFLINE, 0),
    "a multirun": ("nowhere", ("-m", "seed=0,1", *WANDB), OFFLINE, 0),
    "a secret asked for, all tracebacks": ("nowhere", (*FAST, "study=${oc.env:HF_TOKEN}"), FULL, 2),
    "a secret copied by Hydra": ("nowhere", (*FAST, "hydra.job.env_copy=[WANDB_API_KEY]"), {}, 2),
    "a choice that does not exist, all tracebacks": ("nowhere", ("ffw=mlp",), FULL, 1),
}


def run(where, arguments, folder, home, **environment):
    kept = {k: os.environ[k] for k in ("PATH", "PEER_SCALING_CACHE") if k in os.environ}
    return subprocess.run(
        [sys.executable, str(Path(__file__).parent / "crashing.py"), where, *arguments],
        cwd=folder,
        env=kept | plant(home) | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", list(SCENARIOS)[: count(5, len(SCENARIOS))])
def test_secrets_are_nowhere(tmp_path, name):
    where, arguments, environment, code = SCENARIOS[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    result = run(where, arguments, folder, tmp_path / "home", **environment)
    assert result.returncode == code, result.stderr
    places = find(folder, result.stdout, result.stderr)
    report("F32", f"{name}: found in {len(places)} places")
    assert places == []
    logs = list(folder.rglob("*.wandb"))
    assert bool(logs) == (environment.get("WANDB_MODE") is not None and where != "tracker"), logs
    if where in ("training", "planning"):
        assert "request failed" in result.stderr  # the exception was there, without its secrets
        assert "***" in result.stderr


def test_control_an_unprotected_crash_is_found(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    result = run("unprotected", FAST, folder, tmp_path / "home")
    names = {Path(place).name for place in find(folder, result.stdout, result.stderr)}
    assert {"failed-001.json", "error.txt", "text 1"} <= names


@pytest.mark.parametrize("shift", [b"", b"a", b"api:"])
def test_control_a_planted_secret_is_found(tmp_path, shift):
    secret = SECRETS["netrc"].encode()
    (tmp_path / "binary.wandb").write_bytes(b"\x00\xff" + secret + b"\x01")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "header").write_bytes(base64.b64encode(shift + secret + b"tail"))
    (tmp_path / "none").write_bytes(secret[:-1])
    assert {Path(place).name for place in find(tmp_path, "clean")} == {"binary.wandb", "header"}
    assert find(tmp_path / "deep", secret.decode())[-1] == "text 0"
