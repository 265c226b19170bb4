"""What can be checked of runs before they are started."""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from peer_scaling.distributed import check_ranks
from peer_scaling.documents import check_source
from peer_scaling.errors import UserError
from peer_scaling.planned import PlannedRun, plan_run
from peer_scaling.run import Run
from peer_scaling.step import pick_device

FLOAT_BYTES = 4


def check_machine(runs: Iterable[Run]) -> list[str]:
    """Problems with the data files and devices that runs name, each once."""
    problems: list[str] = []
    for run in runs:
        problems += problems_of(lambda run=run: check_source(run.data.source, run.data.path))
        problems += problems_of(lambda run=run: _check_device(run))
    return list(dict.fromkeys(problems))


def _check_device(run: Run) -> None:
    check_ranks(run.forward_sequences, pick_device(run.settings.device))


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
    needed = keep * sum(saved) + sum(weights)
    study = runs[0].run.study_folder
    folder = next(place for place in (study, *study.absolute().parents) if place.exists())
    try:
        _try_to_write(folder, max(*saved, 1))
    except OSError as error:
        raise UserError(
            f"{folder}: a file of {_gigabytes(max(saved))} cannot be written ({error.strerror}); "
            f"choose another runs_dir=, or checkpoint.every_seconds=null and save_model=false"
        ) from error
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"{folder}: {_gigabytes(needed)} needed for weights and {keep} checkpoints at a time "
            f"of each of {len(saved)} run(s), {_gigabytes(free)} free; free some, choose another "
            f"runs_dir=, checkpoint.every_seconds=null or save_model=false"
        )


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
    return FLOAT_BYTES * run.cost.num_params_total


def _checkpoint_bytes(run: PlannedRun) -> int:
    """Parameters, two moments, and the losses of all steps in float64."""
    if not run.run.checkpoint.enabled:
        return 0
    return 3 * _weights_bytes(run) + 8 * run.plan.steps


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def problems_of(check: Callable[[], object]) -> list[str]:
    """The problems of the UserError that a call raises; none if it raises none."""
    try:
        check()
    except UserError as error:
        return list(error.problems)
    return []
