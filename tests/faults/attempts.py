"""Runs that are interrupted and started again, and what must be the same in the end."""

import atexit
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch._dynamo  # else the first run of a process takes two seconds more  # noqa: F401

from peer_scaling.checkpoint import FOLDER, CheckpointError, verify
from peer_scaling.record import HISTORY, RECORD, RunRecord, read_record
from peer_scaling.saver import Saver
from peer_scaling.train import run_once
from planned_runs import BASE, SMALL, make_planned

SAVE_STEPS = 10
OPTIONS = (
    "budget=7e8", "eval.every=0.2", "log_lines=1000", "threads=1",
    f"checkpoint.every_tokens={SAVE_STEPS * 256}",
)  # fmt: skip
"""About 110 steps of 256 tokens, each logged; all variants."""
START = re.compile(r": (fresh|resumed from step (\d+) \(digest (\w+)\))$", re.MULTILINE)


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Negative: the signal that killed it."""
    output: str

    @property
    def start(self) -> tuple[int, str] | None:
        """Step and digest that it started from; None if it was killed before it said so."""
        found = START.search(self.output)
        return found and (int(found[2] or 0), found[3] or "")


class Runner:
    """Processes that run `peer-train` (runner.py), one at a time."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).with_name("runner.py"))]
        own = Path(__file__).parent
        folders = [str(own), str(own.parent), os.environ.get("PYTHONPATH", "")]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        )  # fmt: skip
        atexit.register(self._close)

    def __call__(
        self,
        planned,
        *,
        inject=(),
        signals=(),
        when_begun=False,
        fault_at="",
        options=OPTIONS,
        log="attempt.log",
    ) -> Ended:
        """Run `peer-train` for a planned run; see runner.py for `signals` and `when_begun`."""
        run = planned.run
        log = Path(run.settings.runs_dir) / log
        log.parent.mkdir(parents=True, exist_ok=True)
        job = {
            "arguments": [
                f"ffw={run.ffw_name}", *SMALL[run.ffw_name], *BASE, *options,
                f"runs_dir={run.settings.runs_dir}",
            ],
            "environment": {"FAULT_AT": fault_at},
            "log": str(log), "inject": list(inject), "signals": list(signals), "when_begun": when_begun,
        }  # fmt: skip
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return Ended(answer["code"], log.read_text(errors="replace"))

    def _close(self):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


@cache
def runner() -> Runner:
    """The one of this test process."""
    return Runner()


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to."""

    record: RunRecord
    lines: list[dict]
    digests: dict[int, str]
    """Of the state after each step."""


@cache
def whole(ffw, options=OPTIONS) -> Whole:
    """The uninterrupted run, in this process."""
    digests, real = {}, Saver.due

    def due(self, step):
        digests[step] = self.state.digest()
        return real(self, step)

    planned = make_planned(mkdtemp(dir=os.environ["PEER_SCALING_CACHE"]), *options, ffw=ffw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "due", due)
        record = run_once(planned)
    assert record.status == "done"
    return Whole(record, logged(planned.folder), digests)


def logged(folder) -> list[dict]:
    """Every complete line of a history, without speeds, which are times."""
    path = folder / HISTORY
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@dataclass
class Attempts:
    """All attempts at one run, with what is wrong with any of them."""

    planned: object
    whole: Whole
    problems: list[str] = field(default_factory=list)
    kills: int = 0
    in_saves: int = 0
    """Of the kills: with a checkpoint half written."""
    lost_steps: list[int] = field(default_factory=list)
    """Per start after a kill: steps that were done and are done again."""
    _reached: int = 0

    def attempt(self, **how) -> Ended:
        """One more; `how` as for `Runner`."""
        ended = runner()(self.planned, **how)
        if ended.start:
            self._check_start(*ended.start)
        if "set aside" in ended.output:
            self.problems.append(f"torn checkpoint chosen: {ended.output}")
        self._reached = max([0, *(line["step"] for line in logged(self.planned.folder))])
        if ended.code < 0:
            self.kills += 1
            folder = self.planned.folder / FOLDER
            self.in_saves += bool(list(folder.glob("step-*.tmp")))
            if not (self.planned.folder / RECORD).exists():  # then they are being deleted
                self.problems += torn(folder)
        return ended

    def _check_start(self, step, digest):
        self.lost_steps.append(self._reached - step)
        if self._reached - step > SAVE_STEPS:
            self.problems.append(f"{self._reached - step} steps lost, of {self._reached}")
        if step and not self.whole.digests[step].startswith(digest):
            self.problems.append(f"other bits at step {step}")

    def finish(self, **how) -> list[str]:
        """Run to the end; everything that is wrong."""
        ended = self.attempt(**how)
        if ended.code:
            self.problems.append(f"exit code {ended.code}: {ended.output}")
            return self.problems
        return [*self.problems, *differences(self.planned, self.whole)]


def differences(planned, whole) -> list[str]:
    """Of a run that ended from one that nothing happened to."""
    record, lines = read_record(planned.folder / RECORD), logged(planned.folder)
    found = [
        f"{name}: {getattr(record, name)} for {getattr(whole.record, name)}"
        for name in ("status", "state_digest", "loss", "train_loss", "expert_usage")
        if getattr(record, name) != getattr(whole.record, name)
    ]
    steps = [line["step"] for line in lines if "train/loss" in line]
    if steps != sorted(set(steps)):
        found.append("steps logged twice or out of order")
    if lines != whole.lines:
        found.append("other lines logged")
    if (planned.folder / FOLDER).exists():
        found.append("checkpoints left")
    return found


def torn(folder) -> list[str]:
    """Folders under a checkpoint's final name that are none."""
    found = []
    for path in folder.glob("step-" + "[0-9]" * 8):
        try:
            verify(path)
        except CheckpointError as error:
            found.append(f"torn: {path.name}: {error}")
    return found
