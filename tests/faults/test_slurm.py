# ruff: noqa: F811
"""F07: on a real Slurm, a time-out, a preemption, a kill and a scancel end in the right status; a run that goes on
has the bits of one that nothing happened to; what was cancelled is not put back."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from cluster import Studies, slurm, wait_for, whole  # noqa: F401
from commands import peer_train
from scorecard import report
from tiers import count


@pytest.fixture
def studies(slurm, tmp_path):
    return Studies(slurm, tmp_path)


def worker(studies, study, index=None):
    """Number and environment of the process that trains a run."""
    job = {f"SLURM_CONF={studies.conf}", f"SLURM_JOB_NAME={study}"}
    if index is not None:
        job.add(f"SLURM_ARRAY_TASK_ID={index}")
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_text().split("\0")
            environment = Path(f"/proc/{name}/environ").read_text().split("\0")
        except OSError:
            continue
        own = "submitit.core._submit" in arguments and "srun" not in arguments
        if own and job <= set(environment):
            return int(name), environment
    raise AssertionError(f"no process of {job}")


def hold(studies, name):
    """Stop a run that is on its way: however fast the machine, it does not end. Slurm's signals wake it."""
    studies.training(name)
    process, _ = worker(studies, name)
    os.kill(process, signal.SIGSTOP)
    return process


def submit_and_hold(studies, own):
    """Name -> arguments; the jobs' ids."""
    studies.submit_all(own, partial(hold, studies))
    return {name: studies.job(name)[0] for name in own}


def same_bits(studies, whole, *names):
    """Each was continued, and ended as the run that was not."""
    for name in names:
        record = studies.record(name)
        assert "resumed from step" in studies.logs(name), studies.logs(name)
        assert record.status == whole.status == "done"
        assert (record.state_digest, record.loss) == (whole.state_digest, whole.loss), name
        studies.state(name, "completed")


def test_preempted_with_and_without_a_warning_and_warned_of_the_time_limit(studies, whole):
    """Two nodes, one run on each; more urgent work takes both. A third is no less urgent, and has two minutes."""
    limits = ("timeout_min=2", "signal_delay_s=60", "max_num_timeout=9", "partition=urgent")
    own = {
        "limited": [f"hydra.launcher.{limit}" for limit in limits],
        "main": ["hydra.launcher.cpus_per_task=6"],
        "grace": ["hydra.launcher.cpus_per_task=6", "hydra.launcher.partition=grace"],
    }
    jobs = submit_and_hold(studies, own)
    assert {studies.cell(name).job.node for name in ("main", "grace")} == {"n1", "n2"}
    for node in ("n1", "n2"):
        studies.slurm(
            "sbatch", "--partition=urgent", f"--nodelist={node}", "--cpus-per-task=6", "--output=/dev/null",
            "--wrap=sleep 3",
        )  # fmt: skip
    same_bits(studies, whole(), *own)
    assert {name: studies.job(name)[0] for name in own} == jobs, "put back, not submitted"
    report(
        "F07",
        "preempted with and without a warning, warned of the time limit: 3 of 3 put back, 0 differing bits",
    )


def test_warned_by_hand_killed_and_cancelled(studies, whole):
    names = ("warned", "killed", "cancelled", "raced")
    jobs = submit_and_hold(studies, dict.fromkeys(names, ()))
    studies.slurm("scancel", "--signal=USR2", jobs["warned"])  # as Slurm does before the limit
    os.kill(worker(studies, "warned")[0], signal.SIGCONT)
    os.kill(worker(studies, "killed")[0], signal.SIGKILL)
    studies.peer_sweep("cancel", "cancelled")
    studies.slurm("scancel", "--signal=USR2", jobs["raced"])  # is about to ask for a requeue
    studies.slurm("scancel", jobs["raced"])
    studies.state("killed", "failed")
    assert studies.cell("killed").job.exit_code in ("9:0", "137:0", "0:9")
    for name in ("cancelled", "raced"):
        studies.state(name, "cancelled")
    until = time.monotonic() + 15  # as long as a job that is put back waits, and more
    assert "1 cells submitted" in studies.peer_sweep("retry", "killed")
    same_bits(studies, whole(), "warned", "killed")
    time.sleep(max(0, until - time.monotonic()))
    for name in ("cancelled", "raced"):
        assert studies.job(name) == (jobs[name], "cancelled")
        assert studies.cell(name).run == "missing"
    assert "1 cells submitted" in studies.peer_sweep("retry", "cancelled")
    same_bits(studies, whole(), "cancelled")
    assert studies.job("warned")[0] == jobs["warned"]
    report(
        "F07",
        "kill -9, scancel: final status right, 2 cancelled and not put back, 0 differing bits",
    )


@pytest.mark.skipif(not count(0, 1), reason="two minutes: in make faults")
def test_out_of_time(studies, whole):
    """Slurm knows minutes. With no time between warning and end, none is left to ask for a requeue."""
    jobs = submit_and_hold(studies, {"overdue": ()})
    time.sleep(61)
    studies.slurm("scontrol", "update", f"JobId={jobs['overdue']}", "TimeLimit=1")
    studies.state("overdue", "timeout")
    assert studies.cell("overdue").run == "missing"
    assert "1 cells submitted" in studies.peer_sweep("retry", "overdue")
    same_bits(studies, whole(), "overdue")
    report("F07", "a time limit that ran out: TIMEOUT, 0 differing bits when tried again")


def test_two_ranks_a_gpu_each_and_a_failure(studies, whole):
    ranks = ["hydra.launcher.tasks_per_node=2", "hydra.launcher.gpus_per_node=2"]
    studies.submit("ranks", *ranks)
    submit_and_hold(studies, {"gpu": ["hydra.launcher.gpus_per_node=1"]})
    process, environment = worker(studies, "gpu")
    assert "CUDA_VISIBLE_DEVICES=" in str(environment)
    assert "already" in studies.peer_sweep("retry", "gpu"), "it runs"
    os.kill(process, signal.SIGCONT)
    # No record can be written: exit code 1.
    studies.submit("failing", FAULT_AT="record.write:1:ENOSPC")
    studies.state("failing", "failed")
    cell = studies.cell("failing")
    assert (cell.run, cell.job.exit_code) == ("missing", "1:0")
    status = studies.peer_sweep("status", "failing", expect=1)
    assert "failed 1:0" in status
    assert str(Path(cell.log).relative_to(studies.folder)) in status
    assert "1 cells submitted" in studies.peer_sweep("retry", "failing")
    assert studies.record("ranks").environment["world_size"] == 2
    assert studies.record("gpu").state_digest == whole().state_digest
    assert studies.record("failing").state_digest == whole().state_digest
    report(
        "F07", "2 ranks with a GPU each, a failure: FAILED 1:0 and tried again, 0 differing bits"
    )


def test_hydras_own_launcher_keeps_the_other_cells(studies, whole):
    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(hydras, studies, "failed", FAULT_AT="record.write:1:ENOSPC")
        two = pool.submit(hydras, studies, "two", "seed=0,1", "hydra.sweeper.canary=false")
        wait_for(lambda: studies.steps("two", 2) > 50, "both cells to train")
        os.kill(worker(studies, "two", 1)[0], signal.SIGSTOP)
        array = studies.slurm("squeue", "--noheader", "--name=two", "--format=%F").split()[0]
        studies.slurm("scancel", f"{array}_1")
        failed, missing = failing.result(), two.result()
    assert (failed.returncode, missing.returncode) == (1, 1)
    for done in (failed, missing):
        assert "Traceback" not in done.stdout + done.stderr
        assert len(done.stderr.splitlines()) == 3, done.stderr  # a table of one row, and the error
    assert f"{array}_1 left no result: cancelled" in missing.stderr
    assert studies.record("two").state_digest == whole().state_digest
    assert told(studies, "failed") == ["FAILED|1:0"]
    assert [line.split()[0] for line in told(studies, "two")] == ["COMPLETED|0:0", "CANCELLED"]
    report("F07", "Hydra's launcher: FAILED 1:0; one cell cancelled, the other one's result kept")


def hydras(studies, study, *arguments, **environment):
    """The same study through Hydra's launcher."""
    return peer_train(
        "--config-dir", "mine", "--config-name", "own", "hydra/launcher=submitit_slurm",
        f"study={study}", f"hydra.launcher.name={study}", *arguments,
        folder=studies.folder, SLURM_CONF=str(studies.conf), **environment,
    )  # fmt: skip


def told(studies, name):
    """State and exit code of jobs of a name, in Slurm's words."""
    form = ("-X", "--noheader", "--parsable2", "--format=State,ExitCode")
    return studies.slurm("sacct", *form, f"--name={name}").splitlines()
