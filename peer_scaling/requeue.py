"""In a Slurm job of submitit: a run that a signal stops is put back into the queue, unless the job
is being cancelled.
"""

import re
import signal
import sys
import threading
from types import FrameType
from typing import Any

from submitit import JobEnvironment

from peer_scaling.errors import EXIT_REQUEUE
from peer_scaling.slurm import SlurmError, command_output
from peer_scaling.stop import STOP_SIGNALS


def ask_for_requeue_when_stopped(environment: JobEnvironment) -> threading.Event:
    """Handle signals where the run does not, and once it has saved (`StopFlag.chain`).

    The warning before the time limit (submitit's signal) and one before a preemption end in a
    requeue. A job that is being cancelled is not put back, whatever signal came first. Submitit
    counts the time-outs.

    Returns:
        Set when a signal has come.
    """
    own: Any = environment
    stopping = threading.Event()
    number = own._usr_sig()
    timed_out = signal.getsignal(number)

    def leave(received: int, frame: FrameType | None) -> None:
        stopping.set()
        if environment.global_rank:
            return  # the first one speaks for all; the run stops with its own exit code
        job = _job(environment.raw_job_id)
        if job.get("JobState") == "RUNNING":
            if received == number and callable(timed_out):
                timed_out(received, frame)
            if job.get("PreemptTime", "None") != "None":
                # Warned, not killed: to Slurm, a job that ends by itself now has ended.
                own._requeue(0)
        sys.exit(EXIT_REQUEUE)

    for each in {*STOP_SIGNALS, number}:
        signal.signal(each, leave)
    return stopping


def _job(job_id: str) -> dict[str, str]:
    try:
        text = command_output("scontrol", "--oneliner", "show", "job", job_id)
    except SlurmError:
        return {}
    return dict(re.findall(r"(\w+)=(\S*)", text))
