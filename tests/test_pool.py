"""One process per run: what ends one ends one only, and what became of it is known."""

import os
import signal
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from peer_scaling.claims import ClaimConfig, claim
from peer_scaling.errors import EXIT_FAILED, StudyIncompleteError
from peer_scaling.jobs import CellJob, CellResult, check_results
from peer_scaling.policy import RETRIED, FailurePolicy
from peer_scaling.pool import Pool, Slot, Work
from peer_scaling.publish import write_record
from peer_scaling.record import FAILURES, RunRecord, find_record
from peer_scaling.work import CellWork

LEASE = ClaimConfig(lease_seconds=1.0, hang_seconds=1.0)


def fields(name):
    return {"run_id": name, "study": "s", "ffw": "dense", "variant": "dense", "size": "d8_l2", "seed": 0, "budget": 1e9}  # fmt: skip


def job_of(root, name):
    return CellJob((), name, name, root / name, 1.0, 0, fields(name), f"again {name}")


def cell(folder, how, until):
    """Fails in one way until there are `until` failed records, then succeeds."""
    own = claim(folder, LEASE)
    starts = len(list(folder.glob("start-*")))
    (folder / f"start-{starts}").touch()
    if starts < until:
        end(how)
        return 0
    write_record(
        RunRecord(**fields(folder.name), status="done", reason=None, attempts=starts + 1), folder
    )
    own.release()
    return 0


def end(how):
    if how == "exception":
        raise ValueError("wrong")
    if how in ("SIGSEGV", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, how))
    if how == "hang":
        time.sleep(600)


@pytest.mark.parametrize(
    ("how", "cause", "retried"),
    [
        ("exception", "ValueError: wrong", False),
        ("SIGSEGV", "process ended by SIGSEGV without a record", True),
        ("SIGKILL", "process ended by SIGKILL without a record", True),
        ("hang", "no sign of life, killed", True),
        ("nothing", "process exit 0 without a record", True),
    ],
)
def test_one_of_several_fails(tmp_path, capsys, how, cause, retried):
    names = [f"r{n}" for n in range(8)]
    jobs = [job_of(tmp_path, name) for name in names]
    calls = [partial(cell, j.folder, how, 99 if j.name == "r3" else 0) for j in jobs]
    work = CellWork(jobs, calls, FailurePolicy(retries=1, first_seconds=0.1))
    Pool([Slot(), Slot()]).run(work)
    done = [j.name for j in jobs if (r := find_record(j.folder)) and r.status == "done"]
    assert done == [name for name in names if name != "r3"]
    assert len(list((tmp_path / "r3").glob("start-*"))) == 1 + retried
    assert [r.exit_code != 0 for r in work.results()] == [name == "r3" for name in names]
    with pytest.raises(StudyIncompleteError, match=f"r3 .*{cause}.*again r3"):
        check_results(work.results())
    assert cause in capsys.readouterr().out


def test_a_process_that_left_its_run_is_no_hung_one(tmp_path):
    """It may yet close its tracker."""
    job = job_of(tmp_path, "a")
    work = CellWork([job], [partial(int, 0)], FailurePolicy())
    own = claim(job.folder, ClaimConfig(lease_seconds=0.4, hang_seconds=0.4))
    assert not work.hangs(0, os.getpid())
    time.sleep(1.0)
    assert work.hangs(0, os.getpid())
    own.release()
    assert not work.hangs(0, os.getpid())


def test_a_transient_failure_is_counted_and_overcome(tmp_path):
    jobs = [job_of(tmp_path, "a")]
    work = CellWork(
        jobs, [partial(cell, jobs[0].folder, "SIGKILL", 2)], FailurePolicy(first_seconds=0.01)
    )
    Pool([Slot()]).run(work)
    record = find_record(tmp_path / "a")
    assert (record.status, record.attempts) == ("done", 3)
    assert sorted(p.name for p in (tmp_path / "a").glob("failed-*")) == [
        "failed-001.json",
        "failed-002.json",
    ]
    check_results(work.results())


def test_two_pools_share_a_study(tmp_path):
    """Each run is executed once, and both see all results."""
    context = get_context("spawn")
    pools = [context.Process(target=pool_of, args=(tmp_path, 12)) for _ in range(2)]
    for pool in pools:
        pool.start()
    for pool in pools:
        pool.join(60)
    assert [pool.exitcode for pool in pools] == [0, 0]
    assert [len(list((tmp_path / f"r{n}").glob("start-*"))) for n in range(12)] == [1] * 12


def pool_of(root: Path, count: int):
    jobs = [job_of(root, f"r{n}") for n in range(count)]
    work = CellWork(jobs, [partial(slow_cell, job.folder) for job in jobs], FailurePolicy())
    Pool([Slot()], retry_seconds=0.2).run(work)
    check_results(work.results())


def slow_cell(folder):
    if find_record(folder):
        return 0
    try:
        own = claim(folder, LEASE)
    except Exception:
        return 75
    if not find_record(folder):
        (folder / f"start-{os.getpid()}").touch()
        time.sleep(0.1)
        write_record(RunRecord(**fields(folder.name), status="done", reason=None), folder)
    own.release()
    return 0


@pytest.mark.parametrize(("memory", "together"), [(100, 1), (1000, 3)])
def test_memory_limits_how_many_run(tmp_path, memory, together):
    jobs = [CellJob((), n, n, tmp_path / n, 1.0, 60, fields(n), "") for n in "abc"]
    work = CellWork(jobs, [partial(slow_cell, job.folder) for job in jobs], FailurePolicy())
    pool, most = Pool([Slot(memory=memory)] * 3), []
    ready = work.ready
    work.ready = lambda n: most.append(len(pool._running) + 1) or ready(n)  # it is started next
    pool.run(work)
    check_results(work.results())
    assert max(most) == together


class StopsAtFailure(Work):
    """Stops at the first piece that fails, and would try it again."""

    failed = False

    @property
    def stopped(self):
        return self.failed

    def ended(self, number, exit_code, error, hung):
        self.exit_codes[number] = exit_code
        self.failed = self.failed or exit_code != 0
        return 0.0 if exit_code else None


def touch(folder, name, seconds, code):
    (folder / f"{name}-started").touch()
    time.sleep(seconds)
    (folder / f"{name}-ended").touch()
    return code


def test_work_that_stopped_starts_no_further_piece(tmp_path):
    """What runs ends, what waits is dropped, retries too."""
    pieces = (("a", 0.0, 1), ("b", 0.6, 0), ("c", 0.0, 0), ("d", 0.0, 0))
    work = StopsAtFailure([partial(touch, tmp_path, *piece) for piece in pieces])
    Pool([Slot(), Slot()]).run(work)
    names = ["a-ended", "a-started", "b-ended", "b-started"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert work.exit_codes == [1, 0, EXIT_FAILED, EXIT_FAILED]


def test_the_policy_is_by_kind():
    policy = FailurePolicy(retries=3, first_seconds=5)
    assert [policy.delay("transient", n) for n in range(4)] == [5, 20, 80, None]
    assert {k for k in FAILURES if policy.delay(k, 0) is not None} == set(RETRIED)
    assert (
        policy.delay("out_of_memory", 0)
        is policy.delay("error", 0)
        is policy.delay(None, 0)
        is None
    )


def test_a_result_names_the_last_step(tmp_path):
    job = job_of(tmp_path, "a")
    record = RunRecord(**fields("a"), status="failed", reason="x", failure="error", last_step=7)
    write_record(record, job.folder)
    with pytest.raises(StudyIncompleteError, match=r"\na +failed +1 +7 +x +again a\n1 of 1 cells"):
        check_results([CellResult(job, 1)])


def test_what_the_kernel_killed_runs_again_alone(tmp_path):
    job = job_of(tmp_path, "a")
    work = CellWork([job], [partial(int, 0)], FailurePolicy())
    assert not work.alone(0)
    assert work.ended(0, -signal.SIGKILL, "", hung=False) == 5
    assert work.alone(0)
    assert work.ended(0, -signal.SIGKILL, "", hung=True) == 20
    assert not work.alone(0), "that was us"
