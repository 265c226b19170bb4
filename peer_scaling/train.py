"""The command `peer-train`: one planned run to its record.

The training loop is in `loop.py`, one update in `step.py`, one batch in `data.py`, the model in
`model.py`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from omegaconf import DictConfig

from peer_scaling import memory
from peer_scaling.attempt import Attempt, attempt_smaller, make_attempt
from peer_scaling.checkpoint import remove_checkpoints
from peer_scaling.claims import Claim, HeldError, claim
from peer_scaling.cli import run_command
from peer_scaling.config import run_from
from peer_scaling.display import PLAN_COLUMNS, plan_row, result_line, table_text
from peer_scaling.distributed import ALONE, World, joined
from peer_scaling.errors import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_OUT_OF_MEMORY,
    EXIT_REQUEUE,
)
from peer_scaling.estimate import Estimator
from peer_scaling.launcher import LocalLauncher
from peer_scaling.planned import PlannedRun, plan_run
from peer_scaling.preflight import check_disk, check_memory, check_run
from peer_scaling.prepare import find_prepared, prepare
from peer_scaling.record import (
    RECORD,
    RunRecord,
    find_record,
    record_text,
)
from peer_scaling.stamp import Launch
from peer_scaling.step import pick_device
from peer_scaling.stop import LostRunError, StopFlag, StoppedError
from peer_scaling.sweeper import IsoflopSweeper
from peer_scaling.waiting import SubmititSlurmLauncher


def main(launch: Launch | None = None) -> None:
    """The command `peer-train`, from `launch.py` or from the module itself."""
    run_command(task, IsoflopSweeper, LocalLauncher, SubmititSlurmLauncher, launch=launch)


def task(config: DictConfig) -> int:
    """What Hydra runs for one configuration; returns the exit code.

    Raises:
        UserError: the configuration cannot be run; nothing has been written.
    """
    run = run_from(config)
    planned = check_run(run)
    if run.settings.dry_run:
        if os.environ.get("RANK", "0") != "0":
            return EXIT_DONE
        planned = plan_run(run, find_prepared(run.data))
        record = find_record(planned.closed_folder())
        state = record.status if record else "missing"
        row = plan_row(planned, state, Estimator().seconds(planned))
        print(table_text(PLAN_COLUMNS, [row]))
        return EXIT_DONE
    check_memory(planned)
    with joined(pick_device(run.settings.device), run.settings.rank_timeout_seconds) as world:
        corpus = world.once_per_machine(lambda: prepare(run.data, planned.plan.tokens))
        planned = memory.settled(run, corpus)
        try:
            return exit_code(run_once(planned, world))
        except (HeldError, LostRunError) as error:
            if world.is_first:
                print(f"{planned.run_id}: left to another process: {error}", flush=True)
            return EXIT_REQUEUE


def exit_code(record: RunRecord) -> int:
    """The exit code of a command that ended with this record."""
    if record.failure == "out_of_memory":
        return EXIT_OUT_OF_MEMORY
    return {"done": EXIT_DONE, "diverged": EXIT_DIVERGED}.get(record.status, EXIT_FAILED)


def run_once(planned: PlannedRun, world: World = ALONE) -> RunRecord:
    """Train a run unless its record says that it has ended; the record in either case. Called by
    all ranks of `world`; the first one claims, writes and prints.

    Raises:
        HeldError: another process trains it.
        LostRunError: another process took it over, because this one gave no sign of life.
        StoppedError: a signal stopped it, and it is saved as far as it got.
        UserError: the disk has no room for its checkpoints, or a link at or in the run's folder
            leads out of the folder of runs; nothing was started.
    """
    earlier = _earlier_record(planned, world)
    if not (earlier and earlier.is_final):
        world.first(lambda: check_disk([planned]))
        with _claimed(planned, world) as own:
            # Again: another process may have ended it in the meantime.
            earlier = _earlier_record(planned, world)
            if not (earlier and earlier.is_final):
                return _run_claimed(planned, earlier, world, own)
    assert earlier is not None
    if world.is_first:
        print(f"{earlier.status} before, not trained again: {planned.folder / RECORD}")
        remove_checkpoints(planned.folder)
    world.meet()
    return earlier


@contextmanager
def _claimed(planned: PlannedRun, world: World) -> Iterator[Claim | None]:
    """The claim of the run, on the first rank, for as long as this context lasts."""
    own: list[Claim] = []

    def take() -> str | None:
        try:
            own.append(claim(planned.folder, planned.run.claim))
        except HeldError as error:
            return str(error)
        return None

    holder = world.first(take)
    if holder:
        raise HeldError(holder)
    try:
        yield own[0] if own else None
    finally:
        for each in own:
            each.release()


def _run_claimed(
    planned: PlannedRun, earlier: RunRecord | None, world: World, own: Claim | None
) -> RunRecord:
    with StopFlag(world.largest, own.lost if own else bool) as stop:
        attempt = Attempt(1 + (earlier.attempts if earlier else 0), stop, world, own)
        try:
            record = make_attempt(planned, attempt)
            if record.failure == "out_of_memory" and (run := memory.smaller(planned.run)):
                record = attempt_smaller(replace(planned, run=run), record, attempt)
        except StoppedError:
            world.meet()
            if own:
                own.release()  # what handles the signal may end this process
            stop.chain()
            raise
        if world.is_first:
            if record.is_final:
                remove_checkpoints(planned.folder)
            print(result_line(record), flush=True)
        if record.is_final:
            world.meet()
    return record


def _earlier_record(planned: PlannedRun, world: World) -> RunRecord | None:
    def text() -> str | None:
        record = find_record(planned.closed_folder())
        return record and record_text(record)

    found = world.first(text)
    return RunRecord(**json.loads(found)) if found else None


if __name__ == "__main__":
    # Under `python -m`, this file is `__main__`; workers must find `task` by its real name.
    from peer_scaling.train import main as entry

    entry()
