"""F42: a long study whose processes are killed at random ends complete, and its launcher does not grow."""

import os
import statistics
from pathlib import Path

from peer_scaling.jobs import check_results
from peer_scaling.policy import FailurePolicy
from peer_scaling.pool import Pool, Slot
from peer_scaling.record import find_records, read_record
from peer_scaling.work import CellWork
from planned_runs import make_planned
from scorecard import report
from tiers import count
from toys import Killer, Toy, failed, job_of, killing, seeds_of

MAX_GROWTH = 0.05


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watched(pool, work, killer, kills, pause):
    """Run all, kill one process every `pause` seconds; this process's memory by the cells that had ended."""
    memory = []
    with killing(
        pool, killer, kills, pause, lambda: memory.append((sum(work._over), resident_bytes()))
    ):
        pool.run(work)
    return memory


def growth(memory, number):
    """Of the median in the last fifth of the cells over the one in the second fifth."""
    second = [size for done, size in memory if 0.2 * number <= done <= 0.4 * number]
    last = [size for done, size in memory if done >= 0.8 * number]
    return statistics.median(last) / statistics.median(second) - 1


def test_soak(tmp_path):
    number, seconds, slots = count(40, 2000), count(0.2, 1.0), count(4, 16)
    planned = make_planned(tmp_path, "checkpoint.every_seconds=null", "threads=1", ffw="dense")
    runs = seeds_of(planned, range(number), lease_seconds=60.0, hang_seconds=60.0)
    work = CellWork(
        [job_of(each) for each in runs],
        [Toy(each, seconds) for each in runs],
        FailurePolicy(retries=8, first_seconds=0.01),
    )
    killer, pool = Killer("F42"), Pool([Slot()] * slots)
    memory = watched(pool, work, killer, number // 5, count(0.1, 0.5))
    check_results(work.results())
    records = [read_record(path) for path in find_records(planned.run.study_folder)]
    assert [record.status for record in records] == ["done"] * number
    crashes = sum(len(failed(each.folder)) for each in runs)
    assert 0 < crashes <= killer.kills
    assert growth(memory, number) < MAX_GROWTH
    report(
        "F42",
        f"{len(records):,} of {number:,} runs of {seconds:g} s, {crashes} killed and run again; "
        f"launcher's memory {growth(memory, number):+.2%}",
    )
