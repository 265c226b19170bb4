"""F07: on a real Slurm, a time-out, a preemption, a kill and a scancel end in the right status; a run that goes on
has the bits of one that nothing happened to; what was cancelled is not put back."""

import os
import signal
import time

import pytest

from cluster import Studies, slurm  # noqa: F401
from scorecard import report


@pytest.fixture
def studies(slurm, tmp_path):  # noqa: F811
    return Studies(slurm, tmp_path)


def worker(studies, study):
    """Process of a run, as its claim-free log says nothing of it: by its arguments and environment."""
    job, _ = studies.job(study)
    wanted = f"SLURM_ARRAY_JOB_ID={job.split('_')[0]}\0" if "_" in job else f"SLURM_JOB_ID={job}\0"
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = open(f"/proc/{name}/cmdline").read()
            environment = open(f"/proc/{name}/environ").read()
        except OSError:
            continue
        if "submitit.core._submit" in command and "srun" not in command and wanted in environment:
            return int(name)
    raise AssertionError(f"no process of job {job}")


def same_bits(studies, *names):
    """Each was continued, once, and ended as the first, which was not."""
    whole, *others = [studies.record(name) for name in names]
    assert whole.status == "done"
    assert "resumed from" not in studies.logs(names[0])
    for name, record in zip(names[1:], others, strict=True):
        assert studies.logs(name).count("resumed from step") == 1, studies.logs(name)
        assert record.status == "done"
        assert (record.state_digest, record.loss) == (whole.state_digest, whole.loss), name
        studies.state(name, "completed")


def test_preempted_with_and_without_a_warning(studies):
    """Two nodes, one run on each; more urgent work takes both."""
    for partition in ("main", "grace"):
        studies.submit(
            partition, f"hydra.launcher.partition={partition}", "hydra.launcher.cpus_per_task=4"
        )
    jobs = studies.training("main", "grace")
    assert {studies.cell(name)["job"]["node"] for name in ("main", "grace")} == {"n1", "n2"}
    for node in ("n1", "n2"):
        studies.slurm(
            "sbatch", "--partition=urgent", f"--nodelist={node}", "--cpus-per-task=4", "--output=/dev/null",
            "--wrap=sleep 3",
        )  # fmt: skip
    studies.record("main")
    studies.record("grace")
    studies.submit("whole")
    same_bits(studies, "whole", "main", "grace")
    assert [studies.job(name)[0] for name in ("main", "grace")] == jobs, "put back, not submitted"
    report("F07", "preempted with and without a warning: 2 of 2 put back, 0 differing bits")


def test_warned_of_the_time_limit_killed_and_cancelled(studies):
    names = ("warned", "killed", "cancelled", "raced")
    for name in (*names, "whole"):
        studies.submit(name)
    warned, _, cancelled, raced = studies.training(*names)
    studies.slurm("scancel", "--signal=USR2", warned)  # as Slurm does before the limit
    os.kill(worker(studies, "killed"), signal.SIGKILL)
    studies.peer_sweep("cancel", "cancelled")
    # Cancelled while it is about to ask for a requeue.
    studies.slurm("scancel", "--signal=USR2", raced)
    studies.slurm("scancel", raced)
    studies.state("killed", "failed")
    assert studies.cell("killed")["job"]["exit_code"] in ("9:0", "137:0", "0:9")
    for name in ("cancelled", "raced"):
        studies.state(name, "cancelled")
    time.sleep(15)  # as long as a job that is put back waits, and more
    for name in ("cancelled", "raced"):
        assert studies.job(name)[1] == "cancelled"
        assert studies.cell(name)["run"] == "missing"
    assert cancelled == studies.job("cancelled")[0]
    for name in ("killed", "cancelled"):
        assert "1 cells submitted" in studies.peer_sweep("retry", name)
    same_bits(studies, "whole", "warned", "killed", "cancelled")
    assert studies.job("warned")[0] == warned
    report(
        "F07",
        "warned, killed, cancelled: final status right, 2 cancelled and not put back, 0 differing bits",
    )
