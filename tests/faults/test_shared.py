"""F22, F23: many processes and several launchers work on one study; each run is trained and published once."""

import csv
import json
import os
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from commands import BIN
from peer_scaling import pool
from peer_scaling.jobs import check_results
from peer_scaling.plan_file import PLAN_HEADER
from peer_scaling.policy import FailurePolicy
from peer_scaling.pool import Pool, Slot, Work
from peer_scaling.record import PLAN, find_records, read_record
from peer_scaling.status import study_status
from peer_scaling.work import CellWork
from planned_runs import make_planned
from scorecard import report
from tiers import count
from toys import NONCE, Killer, Toy, job_of, killing, published, run, seeds_of, starts

CLAIM = {"lease_seconds": 60.0, "hang_seconds": 60.0}
FINISHED = "finished"


def base(folder):
    planned = make_planned(folder, "checkpoint.every_seconds=null", "threads=1", ffw="dense")
    planned.run.study_folder.mkdir(parents=True, exist_ok=True)
    return planned


@dataclass(frozen=True)
class Writer:
    """Its own runs one after the other, then those of the next writer, of which none is left."""

    planned: object
    number: int
    records: int
    writers: int

    def __call__(self):
        Toy(self.planned).prepare()
        for writer in (self.number, (self.number + 1) % self.writers):
            first = writer * self.records
            for each in seeds_of(self.planned, range(first, first + self.records), **CLAIM):
                run(each)
        return 0


@dataclass(frozen=True)
class Reader:
    """Reads all records and the status of a study until it is finished, and once more."""

    study: Path
    number: int

    def __call__(self):
        seen, counts, passes, finished = {}, [], 0, False
        while not finished:
            finished = (self.study / FINISHED).exists()
            known = set(seen)
            for path in find_records(self.study):
                record = read_record(path)
                assert (record.status, record.loss) == ("done", 1.0)
                assert (
                    seen.setdefault(record.run_id, record.environment[NONCE])
                    == record.environment[NONCE]
                )
                known.discard(record.run_id)
            assert not known, "a record is gone"
            counts.append(study_status(self.study).counts.get("done", 0))
            passes += 1
        assert counts == sorted(counts)
        (self.study / f"reader-{self.number}.txt").write_text(json.dumps([passes, seen]))
        return 0


class Restarted(Work):
    """Pieces that are started again until they end by themselves."""

    def __init__(self, calls):
        super().__init__(calls)
        self.starts = [1] * len(calls)

    def ended(self, number, exit_code, error, hung):
        if exit_code:
            self.starts[number] += 1
            return 0.0
        self.exit_codes[number] = 0
        return None


def write_all(planned, writers, records, killer, kills):
    """All writers, killed at random and started again; what the pool had to do."""
    work = Restarted([Writer(planned, n, records, writers) for n in range(writers)])
    pool = Pool([Slot()] * writers)
    with killing(pool, killer, kills, 0.3):
        pool.run(work)
    return work


def test_writers_and_readers(tmp_path):
    """F22."""
    writers, records, readers = count(8, 64), count(8, 200), count(2, 8)
    planned, killer = base(tmp_path), Killer("F22")
    study, names = planned.run.study_folder, []
    with (study / PLAN).open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(PLAN_HEADER)
        for each in seeds_of(planned, range(writers * records), **CLAIM):
            names.append(each.run_id)
            row = ["dense", "d8_l2", "1e9", str(each.run.settings.seed), "1.0", "", "missing", ""]
            lines.writerow([each.run_id, *row])
    context = get_context("forkserver")
    context.set_forkserver_preload(list(pool.PRELOADED))  # the pool's is the same one
    reading = [context.Process(target=Reader(study, n)) for n in range(readers)]
    for each in reading:
        each.start()
    work = write_all(planned, writers, records, killer, count(8, 200))
    (study / FINISHED).touch()
    for each in reading:
        each.join(600)
    assert [each.exitcode for each in reading] == [0] * readers
    assert killer.kills
    assert sum(work.starts) > writers, "none was killed"
    final = {p.parent.name: read_record(p).environment[NONCE] for p in find_records(study)}
    assert sorted(final) == sorted(names)
    assert all([final[name]] == nonces for name, nonces in published(study).items())
    # A writer that was killed just after it published had no time to note it.
    assert len(final) - len(published(study)) <= killer.kills
    passes = 0
    for n in range(readers):
        own, seen = json.loads((study / f"reader-{n}.txt").read_text())
        assert seen == final
        passes += own
    killed = sum(work.starts) - writers
    report(
        "F22",
        f"{len(final):,} of {len(names):,} records, 0 duplicates, {killed} of {writers} writers killed and "
        f"started again, {readers} readers, {passes} passes over records and status: 0 errors",
    )


def test_control_without_claims_a_record_is_written_twice(tmp_path):
    planned = base(tmp_path)
    twins = seeds_of(planned, [0, 0], **CLAIM)
    Pool([Slot()] * 2).run(Restarted([Toy(each, 1.0, guarded=False) for each in twins]))
    (nonces,) = published(planned.run.study_folder).values()
    assert len(nonces) == 2


def launcher(roots, number, barrier, seconds, guarded):
    """One of several: studies one after the other, each begun by all at the same time."""
    # As conftest.py does, which this process has not run.
    pool.PRELOADED = (*pool.PRELOADED, "pytest")
    for root in roots:
        planned = seeds_of(make_planned(root, "checkpoint.every_seconds=null", "threads=1", ffw="dense"),
                           range(number), **CLAIM)  # fmt: skip
        work = CellWork(
            [job_of(each) for each in planned],
            [Toy(each, seconds, guarded=guarded) for each in planned],
            FailurePolicy(),
        )
        barrier.wait(300)
        Pool([Slot()] * 8, retry_seconds=0.2).run(work)
        check_results(work.results())


def launch_twice(roots, number, seconds=0.0, guarded=True):
    context = get_context("spawn")
    barrier = context.Barrier(2)
    both = [
        context.Process(target=launcher, args=(roots, number, barrier, seconds, guarded))
        for _ in range(2)
    ]
    for each in both:
        each.start()
    for each in both:
        each.join()
    return [each.exitcode for each in both]


def trained(roots):
    """How often each run was."""
    return [len(starts(path)) for root in roots for path in root.glob("default/dense-*")]


def test_two_launchers_of_one_study(tmp_path):
    """F23."""
    number, studies = count(16, 256), count(2, 20)
    roots = [tmp_path / str(n) for n in range(studies)]
    assert launch_twice(roots, number) == [0, 0]
    assert trained(roots) == [1] * (number * studies)
    by = {path.name.split("-")[1] for root in roots for path in root.glob("default/*/start-*")}
    assert len(by) == number * studies, "one process each"
    records = [path for root in roots for path in root.glob("default/*/record.json")]
    assert len(records) == number * studies
    report("F23", f"{studies} times {number} runs: {len(records):,} trained exactly once")


def test_control_two_launchers_without_claims_train_twice(tmp_path):
    assert launch_twice([tmp_path], 4, 1.0, guarded=False) == [0, 0]
    assert max(trained([tmp_path])) == 2


def test_two_commands_at_once(tmp_path):
    """F22, F23: runs that train, while somebody reads."""
    seeds = range(count(3, 12))
    arguments = [
        str(BIN / "peer-train"), "--config-name", "smoke", "ffw=dense", "size=d8_l2", "budget=7e8", "eval.tokens=2048",
        f"seed={','.join(map(str, seeds))}", "hydra.launcher.workers=2",
    ]  # fmt: skip
    start = partial(subprocess.Popen, arguments, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    study, counts = tmp_path / "runs" / "smoke", []
    with start() as first, start() as second:
        while first.poll() is None or second.poll() is None:
            time.sleep(0.05)
            if (study / PLAN).exists():
                assert all(read_record(path).status == "done" for path in find_records(study))
                counts.append(study_status(study).counts.get("done", 0))
        outputs = first.communicate()[0], second.communicate()[0]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert sum(output.count(": fresh") for output in outputs) == len(seeds), outputs
    assert not any("resumed" in output for output in outputs)
    assert len(list(study.glob("*/record.json"))) == len(seeds)
    assert counts == sorted(counts)
    report("F23", f"two peer-train at once, {len(seeds)} runs that train: each trained once")
