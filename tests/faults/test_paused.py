"""F24: a run is taken over from a process that was paused past its lease; when it wakes, it stops."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from random import Random

from attempts import OPTIONS, SAVE_STEPS, Runner, differences, runner, whole
from peer_scaling.claims import find_holder
from peer_scaling.errors import EXIT_REQUEUE
from peer_scaling.record import RECORD
from planned_runs import make_planned
from scorecard import report
from tiers import count

LEASED = (*OPTIONS, "claim.lease_seconds=0.6")
PLACES = ("step", "write", "record.rename", "checkpoint.write", "record.write", "check")
MIDDLE = 40
"""Steps after which nobody is yet at the end."""


@cache
def other_runner():
    return Runner()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Paused:
    """A run of which one process is paused, and another one takes it over."""

    def __init__(self, folder, where, number, *inject):
        self.planned, self._path = make_planned(folder, *LEASED, ffw="dense"), folder / "paused"
        self._pool = ThreadPoolExecutor(2)
        inject = [["pause", where, number, str(self._path)], *inject]
        runs = {"options": LEASED, "log": "paused.log"}
        self.first = self._pool.submit(runner(), self.planned, inject=inject, **runs)
        wait_for(lambda: self._path.exists() and self._path.read_text().endswith("\n"))
        self._pid = int(self._path.read_text())
        wait_for(lambda: not find_holder(self.planned.folder).is_live)
        self.second = self._pool.submit(other_runner(), self.planned, options=LEASED)

    @property
    def record(self):
        return self.planned.folder / RECORD

    def wake(self):
        os.kill(self._pid, signal.SIGCONT)

    def finish(self):
        """Exit codes of both, and what is wrong."""
        codes = self.first.result(120).code, self.second.result(120).code
        self._pool.shutdown()
        return codes, differences(self.planned, whole("dense"))

    def steps_after(self):
        """That the woken process began."""
        return self._path.read_text().count(".")


def as_written(path):
    """What tells a file from one written later; not when it was last read."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size


def test_paused_past_the_lease(tmp_path):
    """Woken when the other one has the record, or while it trains."""
    rng, number, steps = Random("F24"), count(3, 50), []
    for n in range(number):
        where, late = PLACES[n % len(PLACES)], rng.random() < 0.5
        step = SAVE_STEPS + 1 if n % 4 == 0 else rng.randint(2, 100)  # just after a save, or not
        visit = {"step": step, "checkpoint.write": rng.randint(1, 30)}.get(where, 1)
        paused = Paused(tmp_path / str(n), where, visit)
        if late:
            published_by_other = paused.second.result(120)
            assert published_by_other.code == 0, published_by_other.output
            before = as_written(paused.record)
        else:
            wait_for(lambda p=paused: (p.planned.folder / "claim-000002.json").exists())
            time.sleep(rng.uniform(0, 0.5))
        paused.wake()
        codes, problems = paused.finish()
        log = Path(tmp_path / str(n) / "paused.log").read_text()
        assert problems == [], (where, visit, late, codes, log)
        assert codes == (EXIT_REQUEUE, 0), (where, visit, late, log)
        if late:
            assert as_written(paused.record) == before
        steps.append((where == "step") + paused.steps_after())
        assert steps[-1] <= 1, (where, visit, late)
    report(
        "F24",
        f"{number} paused, in training, in a save and while publishing: {number} records, 0 by who had "
        f"lost the run, at most {max(steps)} step after waking, 0 differing bits",
    )


def test_control_without_a_fence_the_woken_one_publishes_too(tmp_path):
    paused = Paused(tmp_path, "step", MIDDLE, ["no_fence"])
    assert paused.second.result(120).code == 0
    before = paused.record.stat()
    paused.wake()
    codes, _ = paused.finish()
    assert codes == (0, 0)
    assert paused.record.stat() != before
    assert paused.steps_after() > 1
