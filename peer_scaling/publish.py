"""What a run leaves for good: its record, and the weights of its model."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save
from torch import nn

from peer_scaling.distributed import ALONE, World
from peer_scaling.durable import (
    publish,
    temporary_of,
    write_atomically,
    write_once,
    write_synced,
)
from peer_scaling.record import RECORD, RunRecord, failed_name, find_record, record_text
from peer_scaling.shards import whole

WEIGHTS = "model.safetensors"


class PublishedError(Exception):
    """The run has its record already: another process's, which stands."""


def write_record(record: RunRecord, folder: Path, last_look: Callable[[], object] = bool) -> Path:
    """Write the record of an attempt so that a reader sees either all of it or nothing.

    A final one is `record.json`, written once for ever; a failed one is `failed-<attempts>.json`,
    and the next attempt has its own. The record of a refusal, which took no attempt, may be
    replaced.

    Args:
        record: what is published.
        folder: of the run.
        last_look: raises if the run is not this process's; see `durable.write_once`.

    Raises:
        PublishedError: another process published a final record.
        OSError: it could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = record_text(record)
    path = folder / (RECORD if record.is_final else failed_name(record.attempts))
    if record.status == "infeasible":
        write_atomically(path, text, "record")
        return path
    try:
        write_once(path, text, "record", last_look)
    except FileExistsError:
        there = find_record(folder)
        if there and there.is_final:
            raise PublishedError(f"{path}: {there.status} already") from None
        write_atomically(path, text, "record")  # what was there is no record any more
    return path


def save_weights(model: nn.Module, folder: Path, world: World = ALONE) -> Path:
    """Write parameters and buffers to `model.safetensors`, complete or not at all; called on all
    ranks, written by the first.
    """
    path = folder / WEIGHTS
    temporary = temporary_of(path)
    tensors = {n: whole(t.detach()).cpu().contiguous() for n, t in model.state_dict().items()}
    if not world.is_first:
        return path
    write_synced(temporary, save(tensors), "weights")
    publish(temporary, path, "weights")
    return path


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load what `save_weights` wrote into a model of the same shape."""
    model.load_state_dict(load_file(folder / WEIGHTS))
