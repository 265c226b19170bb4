"""What can be checked of runs before they are started."""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from peer_scaling import machine
from peer_scaling.checkpoint import FOLDER as CHECKPOINTS
from peer_scaling.cost import BYTES_PER_VALUE
from peer_scaling.display import gigabytes_text, run_name
from peer_scaling.distributed import check_ranks, num_ranks
from peer_scaling.documents import check_source
from peer_scaling.errors import UserError
from peer_scaling.planned import PlannedRun, plan_run
from peer_scaling.run import AUTO, Run
from peer_scaling.step import pick_device


def check_machine(runs: Iterable[Run]) -> list[str]:
    """Problems with the data files and devices that runs name, each once."""
    problems: list[str] = []
    for run in runs:
        problems += problems_of(lambda run=run: check_source(run.data.source, run.data.path))
        problems += problems_of(lambda run=run: _check_device(run))
    return list(dict.fromkeys(problems))


def check_micro_batch(runs: Iterable[Run]) -> list[str]:
    """Problems with the micro-batches of a study's runs."""
    return [
        f"micro_batch=auto: how variant={run.variant} is trained depends on it, and each machine "
        f"would choose its own; use a number, or ffw.query_norm=layer where that is the cause"
        for run in runs
        if run.settings.micro_batch == AUTO and run.ffw.micro_batch_matters
    ]


def _check_device(run: Run) -> None:
    check_ranks(run.forward_sequences, pick_device(run.settings.device))
    if run.settings.micro_batch == AUTO and num_ranks() > 1:
        raise UserError(
            f"micro_batch=auto is for one process, not WORLD_SIZE={num_ranks()}: give a number, a "
            f"multiple of {num_ranks()}"
        )


def check_run(run: Run) -> PlannedRun:
    """The plan as far as it goes without the corpus.

    Raises:
        UserError: all problems with files, device and plan at once.
    """
    plans: list[PlannedRun] = []
    problems = check_machine([run]) + problems_of(lambda: plans.append(plan_run(run, None)))
    if problems:
        raise UserError(*problems)
    return plans[0]


def check_disk(runs: Sequence[PlannedRun], workers: int = 1) -> None:
    """Make sure of the disk space that runs of one study will take, before any is started.

    Counts the weights of every run and, for the `workers` largest ones, checkpoints: those that are
    kept and the one being written. A file of the size of the largest checkpoint is allocated,
    synced, renamed and removed where the runs go, which finds quotas and rights too.

    Raises:
        UserError: bytes needed and bytes free, or why a file cannot be written.
    """
    saved = sorted(_checkpoint_bytes(run) for run in runs)[-workers:]
    weights = [_weights_bytes(run) for run in runs if run.run.settings.save_model]
    keep = 1 + max(run.run.checkpoint.keep for run in runs)
    needed = keep * sum(saved) + sum(weights) - sum(_held_bytes(run) for run in runs)
    study = runs[0].run.study_folder
    folder = next(place for place in (study, *study.absolute().parents) if place.exists())
    free = shutil.disk_usage(folder).free
    need = (
        f"{folder}: {gigabytes_text(needed)} more needed for weights and {keep} checkpoints at a "
        f"time of each of {len(saved)} run(s), {gigabytes_text(free)} free"
    )
    remedy = "choose another runs_dir=, or checkpoint.every_seconds=null and save_model=false"
    if free < needed:
        raise UserError(f"{need}; free some, {remedy}")
    try:
        _try_to_write(folder, max(*saved, 1))
    except OSError as error:
        size = gigabytes_text(max(saved))
        raise UserError(
            f"{need}; a file of {size} cannot be written ({error.strerror}); {remedy}"
        ) from error


def check_memory(run: PlannedRun) -> None:
    """Make sure, before anything is built, that a run's state can fit in its device's memory.

    Counts what every update needs at least: parameters, two moments, and the gradients of all but
    tables, of which some have rows only. Activations depend on the micro-batch (memory.py).

    Raises:
        UserError: bytes needed and bytes available.
    """
    device = pick_device(run.run.settings.device)
    needed = state_bytes(run)
    if run.run.settings.parallel == "fsdp":
        # Too little where tables have gradients of rows, which every rank holds whole: what fits
        # must not be refused.
        needed //= num_ranks()
    available = machine.available_bytes(device)
    if available is not None and needed > available:
        raise UserError(
            f"{run_name(run.run)}: {gigabytes_text(needed)} needed for parameters, moments and "
            f"gradients, {gigabytes_text(available)} available on {device}; use a smaller size, "
            f"fewer experts or another device"
        )


def state_bytes(run: PlannedRun) -> int:
    """Parameters, two moments, and the gradients of all but tables."""
    return 4 * _weights_bytes(run) - BYTES_PER_VALUE * run.cost.num_params_lookup


def _try_to_write(folder: Path, size: int) -> None:
    """Allocate, sync, rename and remove a file; nothing of it stays."""
    with TemporaryDirectory(prefix=".preflight-", dir=folder) as place:
        path = Path(place) / "checkpoint.tmp"
        with path.open("wb") as file:
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)
            os.fsync(file.fileno())
        path.rename(path.with_suffix(""))


def _weights_bytes(run: PlannedRun) -> int:
    return BYTES_PER_VALUE * run.cost.num_params_total


def _checkpoint_bytes(run: PlannedRun) -> int:
    """Parameters, two moments, and the losses of all steps in float64."""
    if not run.run.checkpoint.enabled:
        return 0
    return 3 * _weights_bytes(run) + 8 * run.plan.steps


def _held_bytes(run: PlannedRun) -> int:
    """Of checkpoints that are there already: a run that is started again may use their room."""
    files = (run.folder / CHECKPOINTS).rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def problems_of(check: Callable[[], object]) -> list[str]:
    """The problems of the UserError that a call raises; none if it raises none."""
    try:
        check()
    except UserError as error:
        return list(error.problems)
    return []
