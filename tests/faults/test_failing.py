"""F19, F20, F21: a run that fails, in whatever way, ends alone, and is tried again by its kind."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from commands import command
from failing_study import flaky_kills
from peer_scaling.errors import StudyIncompleteError
from peer_scaling.jobs import check_results
from peer_scaling.policy import RETRIED, FailurePolicy
from peer_scaling.pool import LOOK_SECONDS, Pool, Slot
from peer_scaling.record import RECORD, find_record, find_records, read_record
from peer_scaling.work import CallWork, CellWork
from planned_runs import make_planned
from scorecard import report
from tiers import count
from toys import FAILURES, Toy, failed, job_of, run, seeds_of, starts

CLAIM = {"lease_seconds": 2.0, "hang_seconds": 1.0}
FREE = {"lease_seconds": 60.0, "hang_seconds": 60.0}
WAYS = ("exception", "SIGSEGV", "SIGKILL", "hang", "nothing")


def study(folder, number, **claim):
    """Planned runs of one study."""
    planned = make_planned(folder, "checkpoint.every_seconds=null", "threads=1", ffw="dense")
    return seeds_of(planned, range(number), **claim)


def launch(planned, ways=None, policy=None, slots=4, seconds=0.0):
    """What a launcher does with a study; `ways`: number of a run -> how its first starts end."""
    jobs, ways = [job_of(each) for each in planned], ways or {}
    calls = [Toy(each, seconds, ways.get(n, ())) for n, each in enumerate(planned)]
    work = CellWork(jobs, calls, policy or FailurePolicy(first_seconds=0.01))
    Pool([Slot()] * slots).run(work)
    return work.results()


def done(planned):
    """Numbers of the runs that have a record that says so."""
    records = [find_record(each.folder) for each in planned]
    return [n for n, record in enumerate(records) if record and record.status == "done"]


@pytest.mark.parametrize("way", WAYS)
def test_one_run_of_many_fails(tmp_path, way):
    """F19. And once more by the command, below."""
    number, retries, bad = count(6, 32), count(1, 3), 3
    claim = CLAIM if way == "hang" else FREE
    planned = study(tmp_path, number, **claim)
    policy = FailurePolicy(retries, first_seconds=0.01)
    results = launch(planned, {bad: [way] * 99}, policy)
    kind, folder = FAILURES[way], planned[bad].folder
    tries = 1 + retries * (kind in RETRIED)
    assert done(planned) == [n for n in range(number) if n != bad]
    assert [n for n, each in enumerate(results) if each.exit_code] == [bad]
    assert len(starts(folder)) == tries
    assert failed(folder) == [f"failed-{n:03d}.json" for n in range(1, tries + 1)]
    records = [read_record(folder / name) for name in failed(folder)]
    assert [record.attempts for record in records] == list(range(1, tries + 1))
    assert {record.failure for record in records} == {kind}
    with pytest.raises(StudyIncompleteError) as error:
        check_results(results)
    _, *rows = error.value.details.splitlines()
    assert [row.split()[0] for row in rows] == [planned[bad].run_id]
    assert error.value.problems[0].startswith(f"1 of {number} cells have no result")
    report("F19", f"{way}: {number - 1} of {number - 1} others done, {tries} x {kind!r}")


def test_control_an_exit_without_a_record_is_a_success_to_who_believes_exit_codes(tmp_path):
    planned = study(tmp_path, 2, **FREE)
    work = CallWork([Toy(planned[0], 0.0, ["nothing"] * 99), Toy(planned[1])])
    Pool([Slot()] * 2).run(work)
    assert work.exit_codes == [0, 0]
    assert done(planned) == [1]
    assert failed(planned[0].folder) == []


def test_runs_fail_at_random(tmp_path):
    """F20. By default a run is tried four times in one launch; the next launch goes on."""
    number, studies, total, most, late = count(16, 64), count(1, 10), 0, 0, 0
    for name in range(studies):
        planned = study(tmp_path / str(name), number, **FREE)
        ways = {n: flaky(f"F20 {name} {n}") for n in range(number)}
        launches = 0
        while len(done(planned)) < number:
            limit = 4 * (launches + 1)
            launch([each for each in planned if not (each.folder / RECORD).exists()],
                   dict(enumerate(ways[n] for n in range(number) if n not in done(planned))))  # fmt: skip
            launches += 1
            assert done(planned) == [n for n in range(number) if len(ways[n]) < limit]
            assert all(len(starts(each.folder)) <= limit for each in planned)
            late += launches == 1 and number - len(done(planned))
        for n, each in enumerate(planned):
            assert len(starts(each.folder)) == find_record(each.folder).attempts == 1 + len(ways[n])
            kinds = [read_record(each.folder / name).failure for name in failed(each.folder)]
            assert kinds == [FAILURES[way] for way in ways[n]]
        total, most = total + number, max(most, *map(len, ways.values()))
    report(
        "F20",
        f"{total} of {total} done, every attempt counted, with its kind; at most {most + 1} attempts; "
        f"{late} runs, which failed 4 times in the first launch, done by the next one",
    )


def flaky(name):
    """Ways in which the first attempts of a run end: each fails with p = 0.3."""
    rng, ways = Random(name), []
    while rng.random() < 0.3:
        ways.append(rng.choice(("SIGKILL", "SIGSEGV", "nothing", "transient")))
    return ways


def test_a_hang_is_found(tmp_path):
    """F21. Ten runs hang, side by side, while ten others train."""
    hangs = count(2, 10)
    planned = study(tmp_path, 2 * hangs, **CLAIM)
    ways = {n: ["hang"] for n in range(0, 2 * hangs, 2)}
    launch(planned, ways, slots=2 * hangs, seconds=1.0)
    assert len(done(planned)) == 2 * hangs
    waited = []
    for n, each in enumerate(planned):
        assert failed(each.folder) == (["failed-001.json"] if n in ways else [])
        if n in ways:
            path = each.folder / "failed-001.json"
            assert read_record(path).failure == "hung"
            first = min(path.stat().st_mtime for path in starts(each.folder))
            waited.append(path.stat().st_mtime - first)
    lease = CLAIM["lease_seconds"]
    assert max(waited) <= 2 * lease, waited
    assert min(waited) >= lease, "found before anybody could know"
    report(
        "F21",
        f"{hangs} of {hangs} hangs found and done again, after {min(waited):.1f} to {max(waited):.1f} s "
        f"(claim.lease_seconds={lease:g}, claim.hang_seconds={CLAIM['hang_seconds']:g}, "
        f"looked at every {LOOK_SECONDS:g} s)",
    )


@pytest.mark.parametrize("way", WAYS if count(0, 1) else ("nothing",))
def test_one_run_of_a_real_study_fails(tmp_path, way):
    """F19, F21: the command, with runs that train; where training fails, after some steps."""
    seeds = range(count(3, 8))
    hung = [f"claim.{name}={3 * value}" for name, value in CLAIM.items()] if way == "hang" else []
    result = start(tmp_path, way, seeds, "hydra.sweeper.retries=0", *hung)
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("dense-")]
    assert len(lines) == 1, result.stderr
    assert "-s1-" in lines[0]
    runs = tmp_path / "runs" / "smoke"
    statuses = [read_record(path).status for path in find_records(runs)]
    assert sorted(statuses) == ["done"] * (len(seeds) - 1) + ["failed"]
    (path,) = runs.glob("*/failed-001.json")
    assert (read_record(path).failure, read_record(path).seed) == (FAILURES[way], 1)
    again = start(tmp_path, "not", seeds)
    assert again.returncode == 0, again.stderr
    assert len(list(runs.glob("*/record.json"))) == len(seeds)
    assert again.stdout.count(" fresh") == 1
    report(
        "F19",
        f"{way}, by peer-train, {len(seeds)} runs that train: {len(seeds) - 1} done, 1 failed, then done",
    )


def test_real_runs_are_killed_at_random(tmp_path):
    """F20: the command, with the retries and waits that it has by itself."""
    seeds = range(count(2, 12))
    result = start(tmp_path, "flaky", seeds)
    assert result.returncode == 0, result.stdout + result.stderr
    records = [read_record(path) for path in (tmp_path / "runs" / "smoke").glob("*/record.json")]
    expected = {seed: 1 + len(flaky_kills(seed)) for seed in seeds}
    assert {record.seed: record.attempts for record in records} == expected
    assert sum(expected.values()) > len(seeds), "none was killed"
    found = re.findall(r"retry \d of 3 in", result.stdout)
    assert len(found) == sum(expected.values()) - len(seeds)
    report(
        "F20", f"{len(seeds)} runs that train, by peer-train: all done, {len(found)} kills counted"
    )


def start(folder, way, seeds, *arguments):
    """A study of tiny runs by `peer-train`, with what failing_study.py does to it."""
    own = Path(__file__)
    path = os.pathsep.join([str(own.parent), str(own.parent.parent)])
    return command(
        sys.executable, str(own.with_name("failing_study.py")), "--config-name", "smoke", "ffw=dense",
        "size=d8_l2", "budget=7e8", f"seed={','.join(map(str, seeds))}", "eval.tokens=2048",
        "hydra.sweeper.canary=false", "hydra.launcher.workers=3", *arguments, folder=folder, PYTHONPATH=path, WAY=way,
    )  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """A run whose exit code is the number of PyTorch's modules that it had to import."""

    planned: object

    def __call__(self):
        Toy(self.planned).prepare()
        before = set(sys.modules)
        assert run(self.planned) == 0
        return sum(name.startswith(("torch", "sympy")) for name in set(sys.modules) - before)


def test_a_process_has_what_pytorch_imports_when_a_run_begins(tmp_path):
    """Else each run of a study has more than a second of work before its first step."""
    work = CallWork([Counted(each) for each in study(tmp_path, 1, **FREE)])
    Pool([Slot()]).run(work)
    assert work.exit_codes == [0]
