"""Runs that take milliseconds: `train.run_once` as it is, but for the training itself.

Claims, records, attempts and exit codes are the product's. Picklable calls, for a pool's processes.
"""

import os
import secrets
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from injectors import write_over
from peer_scaling import attempt, machine, publish, train
from peer_scaling.claims import ClaimConfig, HeldError
from peer_scaling.errors import EXIT_REQUEUE
from peer_scaling.jobs import CellJob
from peer_scaling.stop import LostRunError

STEP_SECONDS = 0.02
NONCE = "nonce"
"""In the environment of a record: which start of the run wrote it."""


@dataclass(frozen=True)
class Toy:
    """One run of a study, for a process of its own.

    Every start leaves a file `start-<pid>-<nonce>` in the run's folder, and every record that was
    published a line in the study's `published.txt`.
    """

    planned: object
    seconds: float = 0.0
    ways: Sequence[str] = ()
    """How the first starts end; the ones after them succeed."""
    guarded: bool = True
    """Or, as a control, without claims and with records that can be replaced."""

    def __call__(self):
        self.prepare()
        return run(self.planned)

    def prepare(self):
        """Switch the training off, in this process and for good."""
        attempt.train = self._train
        attempt.write_record = noted(self.planned.run.study_folder, attempt.write_record)
        if not self.guarded:
            train.claim = Unclaimed
            publish.write_once = write_over
        machine.matmul_peak = lambda *_: 1.0
        machine.git_commit = lambda: None
        machine.environment = lambda _: {}

    def _train(self, planned, tracker, course, stop, world):
        nonce = secrets.token_hex(8)
        start = len(starts(planned.folder))
        (planned.folder / f"start-{os.getpid()}-{nonce}").touch()
        if start < len(self.ways):
            fail(self.ways[start])
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            stop.check()
            time.sleep(min(STEP_SECONDS, self.seconds))
        return {"loss": 1.0, "environment": {NONCE: nonce}}


class Unclaimed:
    """A claim that nobody else sees."""

    def __init__(self, folder, config):
        folder.mkdir(parents=True, exist_ok=True)

    def lost(self):
        return False

    def check(self):
        pass

    release = check


def run(planned):
    """What `train.task` makes of a planned run."""
    try:
        return train.exit_code(train.run_once(planned))
    except (HeldError, LostRunError):
        return EXIT_REQUEUE


def fail(way):
    """End, or do not."""
    if way == "exception":
        raise ValueError("wrong")
    if way == "transient":
        raise ConnectionError("nobody there")
    if way == "nothing":
        os._exit(0)
    if way == "hang":
        time.sleep(600)
    os.kill(os.getpid(), getattr(signal, way))


FAILURES = {
    "exception": "error",
    "transient": "transient",
    "nothing": "crashed",
    "hang": "hung",
    "SIGSEGV": "crashed",
    "SIGKILL": "crashed",
}
"""Way to end -> kind of failure. SIGKILL is also what the kernel sends when memory runs out."""


def noted(study, write):
    """`write_record` that also appends what it published to a file."""

    def write_and_note(record, folder, last_look):
        path = write(record, folder, last_look)
        line = f"{record.run_id} {record.environment.get(NONCE)}\n"
        with (study / "published.txt").open("a") as file:
            file.write(line)
        return path

    return write_and_note


def seeds_of(planned, seeds, **claim):
    """The same run with other seeds, and with a claim's settings."""
    own = replace(planned.run, claim=ClaimConfig(**claim))
    runs = (replace(own, settings=replace(own.settings, seed=seed)) for seed in seeds)
    return [replace(planned, run=run) for run in runs]


def job_of(planned):
    name = f"s{planned.run.settings.seed}"
    fields = planned.record_fields()
    return CellJob((), name, planned.run_id, planned.folder, 1.0, 0, fields, f"again {name}")


def starts(folder: Path):
    return list(folder.glob("start-*"))


def failed(folder: Path):
    """Names of the records of failed attempts, in order."""
    return sorted(path.name for path in folder.glob("failed-*.json"))


def published(study: Path):
    """Run -> nonces of what was published of it, one for each."""
    found = {}
    for line in (study / "published.txt").read_text().splitlines():
        name, nonce = line.split()
        found.setdefault(name, []).append(nonce)
    return found


@contextmanager
def killing(pool, killer, kills, pause, look=bool):
    """While this lasts: `look`, then a kill of a process of the pool, every `pause` seconds, `kills` times at most:
    the last pieces would otherwise be killed again and again before they are through.
    """
    ended = threading.Event()

    def kill():
        while not ended.wait(pause):
            look()
            if killer.kills < kills:
                killer([each.process.pid for each in list(pool._running.values())])

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Killer:
    """SIGKILLs one of some processes, at random."""

    def __init__(self, name):
        self._rng, self.kills = Random(name), 0

    def __call__(self, pids):
        if pids:
            with suppress(ProcessLookupError):
                os.kill(self._rng.choice(sorted(pids)), signal.SIGKILL)
                self.kills += 1
