# ruff: noqa: F811
"""F07: on a real Slurm, a time-out, a preemption, a kill and a scancel end in the right status; a run that goes on
has the bits of one that nothing happened to; what was cancelled is not put back."""

import os
import signal
import time
from pathlib import Path

import pytest

from cluster import Studies, slurm, whole  # noqa: F401
from commands import command, peer_train
from scorecard import report


@pytest.fixture
def studies(slurm, tmp_path):
    return Studies(slurm, tmp_path)


def worker(studies, study):
    """Number and environment of the process that trains a run."""
    job = f"SLURM_JOB_ID={studies.job(study)[0]}"
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_text().split("\0")
            environment = Path(f"/proc/{name}/environ").read_text().split("\0")
        except OSError:
            continue
        if "submitit.core._submit" in arguments and "srun" not in arguments and job in environment:
            return int(name), environment
    raise AssertionError(f"no process of {job}")


def same_bits(studies, whole, *names):
    """Each was continued, once, and ended as the run that was not."""
    for name in names:
        record = studies.record(name)
        assert studies.logs(name).count("resumed from step") == 1, studies.logs(name)
        assert record.status == whole.status == "done"
        assert (record.state_digest, record.loss) == (whole.state_digest, whole.loss), name
        studies.state(name, "completed")


def test_preempted_with_and_without_a_warning(studies, whole):
    """Two nodes, one run on each; more urgent work takes both."""
    options = {name: [f"hydra.launcher.partition={name}"] for name in ("main", "grace")}
    studies.submit_all(
        {name: [*own, "hydra.launcher.cpus_per_task=7"] for name, own in options.items()}
    )
    jobs = studies.training("main", "grace")
    assert {studies.cell(name).job.node for name in ("main", "grace")} == {"n1", "n2"}
    for node in ("n1", "n2"):
        studies.slurm(
            "sbatch", "--partition=urgent", f"--nodelist={node}", "--cpus-per-task=7", "--output=/dev/null",
            "--wrap=sleep 3",
        )  # fmt: skip
    same_bits(studies, whole(), "main", "grace")
    assert [studies.job(name)[0] for name in ("main", "grace")] == jobs, "put back, not submitted"
    report("F07", "preempted with and without a warning: 2 of 2 put back, 0 differing bits")


def test_warned_of_the_time_limit_killed_and_cancelled(studies, whole):
    names = ("warned", "killed", "cancelled", "raced")
    studies.submit_all(dict.fromkeys(names, ()))
    (warned,) = studies.training("warned")
    studies.slurm("scancel", "--signal=USR2", warned)  # as Slurm does before the limit
    studies.training("killed")
    os.kill(worker(studies, "killed")[0], signal.SIGKILL)
    (cancelled,) = studies.training("cancelled")
    studies.peer_sweep("cancel", "cancelled")
    (raced,) = studies.training("raced")
    studies.slurm("scancel", "--signal=USR2", raced)  # is about to ask for a requeue
    studies.slurm("scancel", raced)
    studies.state("killed", "failed")
    assert studies.cell("killed").job.exit_code in ("9:0", "137:0", "0:9")
    for name in ("cancelled", "raced"):
        studies.state(name, "cancelled")
    time.sleep(15)  # as long as a job that is put back waits, and more
    for name in ("cancelled", "raced"):
        assert studies.job(name)[1] == "cancelled"
        assert studies.cell(name).run == "missing"
    assert cancelled == studies.job("cancelled")[0]
    for name in ("killed", "cancelled"):
        assert "1 cells submitted" in studies.peer_sweep("retry", name)
    same_bits(studies, whole(), "warned", "killed", "cancelled")
    assert studies.job("warned")[0] == warned
    report(
        "F07",
        "warned, killed, cancelled: final status right, 2 cancelled and not put back, 0 differing bits",
    )


def test_two_ranks_a_gpu_each_a_failure_and_hydras_own_launcher(studies, whole):
    ranks = ["hydra.launcher.tasks_per_node=2", "hydra.launcher.gpus_per_node=2"]
    studies.submit_all({"ranks": ranks, "gpu": ["hydra.launcher.gpus_per_node=1"]})
    studies.training("gpu")
    assert "CUDA_VISIBLE_DEVICES=" in str(worker(studies, "gpu")[1])
    # No record can be written: exit code 1.
    studies.submit("failing", FAULT_AT="record.write:1:ENOSPC")
    hydra = (
        "--config-dir",
        "mine",
        "--config-name",
        "own",
        "hydra/launcher=submitit_slurm",
        "study=hydra",
    )
    done = peer_train(*hydra, folder=studies.folder, SLURM_CONF=str(studies.conf))
    assert done.returncode == 0, done.stdout + done.stderr
    assert studies.record("hydra").state_digest == whole().state_digest
    studies.state("failing", "failed")
    assert (studies.cell("failing").run, studies.cell("failing").job.exit_code) == (
        "missing",
        "1:0",
    )
    status = command(
        "peer-sweep", "status", "failing", folder=studies.folder, SLURM_CONF=str(studies.conf)
    )
    assert status.returncode == 1
    assert "failed 1:0" in status.stdout
    assert str(Path(studies.cell("failing").log).relative_to(studies.folder)) in status.stdout
    assert "1 cells submitted" in studies.peer_sweep("retry", "failing")
    assert "already" in studies.peer_sweep("retry", "failing"), "it waits or runs"
    assert studies.record("ranks").environment["world_size"] == 2
    assert studies.record("gpu").state_digest == whole().state_digest
    assert studies.record("failing").state_digest == whole().state_digest
    report("F07", "2 ranks, a failure, Hydra's launcher: as they should be")
