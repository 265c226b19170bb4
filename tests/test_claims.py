import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from peer_scaling import claims
from peer_scaling.cells import write_plan
from peer_scaling.claims import ClaimConfig, HeldError, claim, find_holder
from peer_scaling.stop import LostRunError, StopFlag

SHORT = ClaimConfig(lease_seconds=0.4, hang_seconds=60)
LONG = ClaimConfig(lease_seconds=600, hang_seconds=600)


def as_another_machine(folder):
    """Rewrite the newest claim as one of a process that cannot be looked up here."""
    path = max(folder.glob("claim-*.json"))
    stat = path.stat()
    values = json.loads(path.read_text()) | {"machine": "elsewhere", "host": "elsewhere"}
    path.write_text(json.dumps(values))
    os.utime(path, (stat.st_mtime, stat.st_mtime))


def test_one_holds_and_the_next_has_a_higher_token(tmp_path):
    first = claim(tmp_path / "run", LONG)
    with pytest.raises(HeldError, match=f"process {os.getpid()}"):
        claim(tmp_path / "run", LONG)
    first.check()
    first.release()
    second = claim(tmp_path / "run", LONG)
    assert (first.token, second.token) == (1, 2)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["claim-000002.json"]
    second.release()


def test_a_lease_runs_out_without_heartbeats_and_not_with_them(tmp_path, monkeypatch):
    own = claim(tmp_path, SHORT)
    as_another_machine(tmp_path)
    time.sleep(3 * SHORT.lease_seconds)
    with pytest.raises(HeldError):
        claim(tmp_path, SHORT)
    monkeypatch.setattr(claims.os, "utime", lambda *_: None)  # heartbeats that change nothing
    time.sleep(2 * SHORT.lease_seconds)
    monkeypatch.undo()
    other = claim(tmp_path, SHORT)
    with pytest.raises(LostRunError):
        own.check()
    assert own.lost()
    assert not other.lost()
    other.check()
    own.release()  # changes nothing of the other's
    assert find_holder(tmp_path).is_live
    other.release()
    assert not find_holder(tmp_path).is_live


def test_a_run_without_steps_has_no_heartbeat(tmp_path):
    own = claim(tmp_path, ClaimConfig(lease_seconds=0.4, hang_seconds=0.4))
    as_another_machine(tmp_path)
    began = time.monotonic()
    while True:
        try:
            other = claim(tmp_path, SHORT)
            break
        except HeldError:
            time.sleep(0.02)
    waited = time.monotonic() - began
    assert 0.4 <= waited <= 1.2
    with pytest.raises(LostRunError):
        own.check()
    own.release()
    other.release()


def test_a_dead_process_holds_nothing(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from peer_scaling.claims import *;"
        "claim(Path(sys.argv[1]), ClaimConfig(lease_seconds=600)); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert find_holder(tmp_path).age < 60  # the lease has not run out
    own = claim(tmp_path, LONG)
    assert own.token == 2
    own.release()


@pytest.mark.parametrize("hours", [-1, 1])
def test_clocks_of_machines_do_not_matter(tmp_path, monkeypatch, hours):
    own = claim(tmp_path, LONG)
    as_another_machine(tmp_path)
    skewed = time.time() + 3600 * hours
    monkeypatch.setattr(claims.time, "time", lambda: skewed)
    with pytest.raises(HeldError):
        claim(tmp_path, LONG)
    monkeypatch.undo()
    os.utime(tmp_path / "claim-000001.json", (time.time() - 700,) * 2)
    monkeypatch.setattr(claims.time, "time", lambda: skewed)
    claim(tmp_path, LONG).release()
    own.release()


def test_a_damaged_claim_ends_after_a_lease(tmp_path):
    (tmp_path / "claim-000007.json").write_text("{")
    with pytest.raises(HeldError):
        claim(tmp_path, LONG)
    os.utime(tmp_path / "claim-000007.json", (time.time() - 121,) * 2)
    own = claim(tmp_path, LONG)
    assert own.token == 8
    own.release()


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / f".record.json.tmp-{'0' * 16}").write_text("half")
    (tmp_path / ".mine").write_text("")
    claim(tmp_path, LONG).release()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine", "claim-000001.json"]


def test_a_disk_that_fails_for_less_than_a_lease_loses_nothing(tmp_path, monkeypatch):
    own = claim(tmp_path, ClaimConfig(lease_seconds=0.8))
    monkeypatch.setenv("FAULT_AT", "claim.renew:1:EIO")
    time.sleep(0.3)
    assert not own.lost()
    time.sleep(1.0)
    assert own.lost()  # nobody can know who holds it
    monkeypatch.undo()
    own.release()


def test_a_lost_run_stops_at_its_next_step_and_a_signal_does_not_hide_it(tmp_path):
    own = claim(tmp_path, LONG)
    with StopFlag(lost=own.lost) as stop:
        stop.check()
        (tmp_path / "claim-000001.json").rename(tmp_path / "claim-000002.json")
        with pytest.raises(LostRunError):
            own.check()
        with pytest.raises(LostRunError):
            stop.check()
    own.release()


def test_several_launchers_write_the_plan_of_one_study(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_plan([], tmp_path, keep_missing=True), range(200)))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.csv"]
