"""One cell of a study in a Slurm job: trained as `peer-train` would, by one process or several.

Submitit starts `CellJobCall` in every process of a task, with text as its arguments.
"""

import os
import sys
import time
from typing import final

from omegaconf import DictConfig
from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from peer_scaling.cli import run_command
from peer_scaling.config import run_from
from peer_scaling.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, UserError
from peer_scaling.launcher import LocalLauncher
from peer_scaling.planned import plan_run
from peer_scaling.prepare import find_prepared
from peer_scaling.record import find_record
from peer_scaling.requeue import ask_for_requeue_when_stopped
from peer_scaling.sweeper import IsoflopSweeper
from peer_scaling.train import task

HELD_WAIT_SECONDS = 20.0
HELD_WAITS = 30
"""A run whose process died with its machine is its own until the lease ends; Slurm starts the job
again sooner than that."""


@final
class CellJobCall:
    """What is sent to a job, and sent again when it is put back: it has no state."""

    def __call__(self, run_id: str, *arguments: str) -> None:
        """Train the cell; ends the process with the exit code of `peer-train` unless that is 0.

        Args:
            run_id: what the cell was when it was submitted.
            arguments: of `peer-train`.
        """
        environment = JobEnvironment()
        if environment.num_tasks > 1:
            # Of another job, if this one was submitted from within it.
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            if environment.num_nodes == 1:  # a node's name need not be known to itself
                os.environ["MASTER_ADDR"] = "127.0.0.1"
        stopping = ask_for_requeue_when_stopped(environment)
        code = _exit_code(run_id, arguments)
        for _ in range(HELD_WAITS):
            if code != EXIT_REQUEUE or stopping.is_set():
                break
            time.sleep(HELD_WAIT_SECONDS)
            code = _exit_code(run_id, arguments)
        if code:
            sys.exit(code)

    def checkpoint(self, *arguments: str) -> DelayedSubmission:
        """What submitit starts after a time-out: the same again, the run knows how far it got."""
        return DelayedSubmission(self, *arguments)


@final
class CellTask:
    """`peer-train`'s task, if the configuration is still that of the submitted run."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def __call__(self, config: DictConfig) -> int:
        """The exit code; not 0 without a record.

        Raises:
            UserError: the configuration cannot be run, or was changed since it was submitted.
        """
        run = run_from(config)
        corpus = find_prepared(run.data)
        planned = plan_run(run, corpus)
        if corpus and planned.run_id != self._run_id:
            raise UserError(
                f"{self._run_id}: the study's configuration or data has changed since it was "
                f"submitted, to {planned.run_id}; submit it again"
            )
        code = task(config)
        record = find_record(run.study_folder / self._run_id)
        ended = record is not None and record.is_final
        return EXIT_FAILED if code == EXIT_DONE and not ended else code


def _exit_code(run_id: str, arguments: tuple[str, ...]) -> int:
    sys.argv = ["peer-train", *arguments]
    try:
        run_command(CellTask(run_id), IsoflopSweeper, LocalLauncher)
    except SystemExit as end:
        return int(end.code or EXIT_DONE)
