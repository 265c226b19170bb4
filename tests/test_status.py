"""What `peer-status` says of a study, from its folders alone, and while it runs."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial

import pytest

from commands import BIN
from conftest import ROOT
from peer_scaling.claims import ClaimConfig, claim
from peer_scaling.errors import EXIT_FAILED
from peer_scaling.plan_file import PLAN_HEADER
from peer_scaling.pool import Pool, Slot, Work
from peer_scaling.publish import write_record
from peer_scaling.record import RunRecord, read_record
from peer_scaling.status import study_status

LEASE = ClaimConfig(lease_seconds=60.0)
STATES = ("done", "diverged", "infeasible", "failed", "running", "silent", "interrupted", "missing")


def write_plan(folder, names, flops=1e9):
    folder.mkdir(exist_ok=True)
    rows = [[name, "dense", "d8_l2", "1e9", str(n), repr(flops), "", "missing", ""] for n, name in enumerate(names)]  # fmt: skip
    (folder / "plan.csv").write_text("".join(",".join(row) + "\n" for row in [PLAN_HEADER, *rows]))


def record_of(name, status, **more):
    reason = None if status == "done" else "a reason"
    return RunRecord(run_id=name, study="s", ffw="dense", variant="dense", size="d8_l2", seed=0, budget=1e9, status=status, reason=reason, **more)  # fmt: skip


def put(folder, state):
    """Make a run's folder what it is in a state."""
    if state in ("done", "diverged", "infeasible", "failed"):
        write_record(record_of(folder.name, state), folder)
    elif state in ("running", "silent"):
        own = claim(folder, LEASE)
        (folder / "history.jsonl").write_text('{"step": 30, "flops": 3e8}\n{"step": 4')
        if state == "silent":
            os.utime(folder / f"claim-{own.token:06d}.json", (1, 1))
    elif state == "interrupted":
        (folder / "checkpoints").mkdir(parents=True)


@pytest.fixture
def study(tmp_path):
    """One run in each state, and its folder of a name that says which."""
    write_plan(tmp_path / "s", STATES)
    for state in STATES:
        put(tmp_path / "s" / state, state)
    return tmp_path / "s"


def test_every_state_is_told_by_the_folder(study):
    status = study_status(study)
    assert status.counts == dict.fromkeys(STATES, 1)
    assert status.flops_left == 5e9
    assert not status.complete
    running, silent = status.held
    assert (running.run_id, running.pid) == ("running", os.getpid())
    assert (running.step, running.steps) == (30, 100)
    assert running.heartbeat_seconds < 30 < silent.heartbeat_seconds
    assert [p.split(":")[0] for p in status.problems] == ["diverged", "infeasible", "failed"]


def test_who_left_or_died_has_no_run(study):
    claim(study / "missing", LEASE).release()
    gone = study / "running" / "claim-000001.json"
    gone.write_text(json.dumps({**json.loads(gone.read_text()), "born": "0"}))
    counts = study_status(study).counts
    assert (counts["interrupted"], counts.get("running"), counts.get("missing")) == (3, None, None)


def test_a_failed_run_that_is_tried_again_is_running(study):
    own = claim(study / "failed", LEASE)
    assert study_status(study).counts["running"] == 2
    write_record(record_of("failed", "done", attempts=2), study / "failed")
    assert study_status(study).counts["done"] == 2
    own.release()


def test_what_ends_between_two_looks_has_its_record(study, monkeypatch):
    """At the look for a record there is none yet, at that for a holder there is none any more."""
    from peer_scaling import standing

    def ends(folder):
        if folder.name == "missing":
            write_record(record_of("missing", "done"), folder)

    monkeypatch.setattr(standing, "find_holder", ends)
    assert study_status(study).counts["done"] == 2


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"host": [], "pid": 1, "machine": "", "born": "", "lease_seconds": "x"}', "\0"]
)  # fmt: skip
def test_claims_and_histories_are_data(study, text):
    (study / "running" / "claim-000001.json").write_text(text)
    (study / "silent" / "history.jsonl").write_text(text + '\n{"step": 1e999, "flops": 1}\n')
    (study / "missing").mkdir()
    os.mkfifo(study / "missing" / "claim-000001.json")
    status = study_status(study)
    assert status.counts["running"] == 2, "alien claims hold for a default lease"
    assert [run.step for run in status.held] == [30, None, None]


class Cells(Work):
    def ended(self, number, exit_code, error, hung):
        self.exit_codes[number] = exit_code
        return 0.0 if exit_code == EXIT_FAILED else None


def train(folder):
    """Fails once, then ends well; as `train.run_once` and `attempt.make_attempt` do it."""
    own = claim(folder, LEASE)
    (folder / "history.jsonl").touch()
    time.sleep(0.03)
    attempts = 1 + len(list(folder.glob("failed-*.json")))
    status = "done" if attempts > 1 or folder.name < "r15" else "failed"
    write_record(record_of(folder.name, status, attempts=attempts), folder)
    own.release()
    return 0 if status == "done" else EXIT_FAILED


def test_it_is_right_at_every_moment_of_a_launch(tmp_path):
    """Every look counts each run once, and what is done stays so."""
    names = [f"r{n:02d}" for n in range(20)]
    write_plan(tmp_path, names)
    looks, over = [], threading.Event()

    def look():
        while not over.is_set():
            looks.append(study_status(tmp_path))
            time.sleep(0.002)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        Pool([Slot(), Slot()]).run(Cells([partial(train, tmp_path / name) for name in names]))
    finally:
        over.set()
        watcher.join()
    counts = [Counter(status.counts) for status in [*looks, study_status(tmp_path)]]
    assert counts[-1] == {"done": 20}
    assert all(sum(count.values()) == 20 for count in counts)
    done = [count["done"] for count in counts]
    assert done == sorted(done)
    assert any(count["running"] for count in counts)
    assert not set.union(*map(set, counts)) - {
        "done",
        "failed",
        "running",
        "interrupted",
        "missing",
    }


@pytest.fixture(scope="module")
def large_study(tmp_path_factory):
    """2,000 runs: 1,200 done, whose records are a study's, and 200 of each other sort."""
    folder = tmp_path_factory.mktemp("large") / "s"
    source = read_record(next((ROOT / "docs" / "figures" / "isoflop_laptop").glob("*/record.json")))
    states = ["done"] * 1200 + [s for s in ("running", "failed", "interrupted", "missing") for _ in range(200)]  # fmt: skip
    names = [f"{state}-{n}" for n, state in enumerate(states)]
    write_plan(folder, names)
    make_first(folder, names, states, source)
    return folder


def make_first(folder, names, states, source):
    first = {}
    for name, state in zip(names, states, strict=True):
        if state == "missing":
            continue
        if state in first:
            shutil.copytree(folder / first[state], folder / name)
            continue
        first[state] = name
        put(folder / name, state)
        if state == "done":
            (folder / name / "record.json").write_text(json.dumps({**vars(source), "run_id": name}))


def test_two_thousand_runs_take_under_a_second(large_study):
    """As a command, with the start of the interpreter; processor time, which others do not change."""
    code = (
        "import os, sys; from peer_scaling import status\n"
        "try: status.main()\n"
        "except SystemExit: print(sum(os.times()[:2]), 'torch' in sys.modules)"
    )
    seconds = []
    for _ in range(5):
        command = [sys.executable, "-c", code, str(large_study), "--json"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        status, last = text.splitlines()
        counts = json.loads(status)["counts"]
        assert counts == {"done": 1200, **dict.fromkeys(("running", "failed", "interrupted", "missing"), 200)}  # fmt: skip
        assert last.endswith("False")
        seconds.append(float(last.split()[0]))
    assert statistics.median(seconds) < 1.0


def test_the_text_names_who_has_a_run(study):
    result = subprocess.run([BIN / "peer-status", str(study)], capture_output=True, text=True)
    assert result.returncode == 1
    assert "s: 8 cells: 1 diverged, 1 done, 1 failed, 1 infeasible, 1 interrupted, 1 missing" in result.stdout  # fmt: skip
    assert f"running: running, step 30 of 100, process {os.getpid()} on" in result.stdout


def test_a_study_that_still_chooses_is_not_complete(tmp_path):
    write_plan(tmp_path / "s", ["done"])
    put(tmp_path / "s" / "done", "done")
    asked, stop = '{"action": "start", "seed": 0}\n', '{"action": "stop", "seed": null}\n'
    for text, complete in (
        (asked, False),
        (asked + stop, True),
        ("no JSON", True),
        (asked + "{", False),
    ):
        (tmp_path / "s" / "decisions.jsonl").write_text(text)
        assert study_status(tmp_path / "s").complete is complete, text
