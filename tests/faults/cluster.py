"""A Slurm of the test process (scripts/slurm.sh), a study with one run of some seconds, and what is done to it."""

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from commands import command
from peer_scaling.record import HISTORY, RECORD, read_record
from peer_scaling.sweep_command import study_cells

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "slurm.sh"
STUDY = """defaults: [train, override data: synthetic, override tracker: "off", override hydra/sweeper: isoflop, _self_]
study: own
batch_size: 4
threads: 1
progress: "off"
log_lines: 1000
data: {num_tokens: 100000, max_epochs: 1000.0}
eval: {tokens: 2048}
checkpoint: {every_tokens: 20480}
hydra:
  mode: MULTIRUN
  sweeper:
    ladder: [{budget: BUDGET, sizes: [d8_l2]}]
    variants: {dense: {}}
"""
LIMIT_SECONDS = 180.0


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The file SLURM_CONF; the tests are skipped where there is no Slurm. Each worker of xdist has its own."""
    path = os.environ["PATH"] + ":/usr/sbin"
    if not shutil.which("slurmctld", path=path) or not shutil.which("slurmdbd", path=path):
        pytest.skip("no Slurm here; scripts/install_slurm.sh installs it")
    if os.geteuid() != 0:
        pytest.skip("scripts/slurm.sh starts Slurm as root only")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([str(SCRIPT), "start", str(folder)], check=True, timeout=120)
    yield folder / "slurm.conf"
    subprocess.run([str(SCRIPT), "stop", str(folder)], check=True, timeout=120)


@pytest.fixture(scope="session")
def whole(slurm, tmp_path_factory):
    """The run of `STUDY` that nothing happened to, as a job that is waited for when it is asked for."""
    studies = Studies(slurm, tmp_path_factory.mktemp("whole"))
    studies.submit("whole", "hydra.launcher.partition=urgent")  # never preempted
    return lambda: studies.record("whole")


class Studies:
    """Studies of one run, the same in all: what is done to one must not show in its bits."""

    def __init__(self, conf, folder, budget="6e9"):
        self.conf, self.folder = conf, folder
        (folder / "mine").mkdir()
        (folder / "mine" / "own.yaml").write_text(STUDY.replace("BUDGET", budget))

    def peer_sweep(self, *arguments, expect=0, **environment):
        """What the command prints."""
        done = command(
            "peer-sweep", *arguments, folder=self.folder, SLURM_CONF=str(self.conf), **environment
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout

    def submit(self, study, *arguments, **environment):
        """One run, as a study of that name."""
        own = ("--config-dir", "mine", f"study={study}", "hydra.launcher.timeout_min=10")
        printed = self.peer_sweep("submit", "own", *own, *arguments, **environment)
        assert "1 cells submitted as Slurm array" in printed, printed

    def submit_all(self, studies, then=lambda name: None):
        """Name -> arguments; two at a time, and what is done once one is submitted."""

        def submit(name, arguments):
            self.submit(name, *arguments)
            then(name)

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(submit, *one) for one in studies.items()]:
                done.result()

    def slurm(self, *arguments):
        """What a command of Slurm's prints."""
        environment = os.environ | {"SLURM_CONF": str(self.conf)}
        return subprocess.run(
            arguments, env=environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def cells(self, study):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(self.conf))
            cells, problems = study_cells(self.folder / "runs" / study)
        assert problems == []
        return cells

    def cell(self, study):
        (cell,) = self.cells(study)
        return cell

    def job(self, study):
        """Id and state of its newest job."""
        cell = self.cell(study)
        return cell.job.job, cell.job.state

    def steps(self, study, num_runs=1):
        """Steps in the histories of its runs, the fewest."""
        histories = list((self.folder / "runs" / study).glob(f"*/{HISTORY}"))
        steps = [len(path.read_text().splitlines()) for path in histories]
        return min(steps) if len(steps) == num_runs else 0

    def training(self, study):
        """Wait until its run is on its way, and saved."""

        def is_saved():
            saved = (self.folder / "runs" / study).glob("*/checkpoints/step-*")
            return self.steps(study) > 50 and any(not path.suffix for path in saved)

        wait_for(is_saved, f"{study} to train", pause=0.03)

    def state(self, study, *expected):
        """Wait for the newest job to be in one of some states."""
        wait_for(lambda: self.job(study)[1] in expected, f"{study} to be {expected}", pause=1.0)

    def record(self, study):
        """Wait for it."""
        pattern = f"*/{RECORD}"
        folder = self.folder / "runs" / study
        wait_for(lambda: list(folder.glob(pattern)), f"the record of {study}: {self.logs(study)}")
        return read_record(*folder.glob(pattern))

    def logs(self, study):
        """What its jobs printed."""
        folder = self.folder / "runs" / study / ".submitit"
        return "".join(path.read_text() for path in sorted(folder.rglob("*_log.*")))


def wait_for(is_so, what, pause=0.1):
    deadline = time.monotonic() + LIMIT_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"waited {LIMIT_SECONDS:g} s for {what}"
        time.sleep(pause)
