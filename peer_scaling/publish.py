"""What a run leaves for good: its record, and the weights of its model."""

from pathlib import Path

from safetensors.torch import load_file, save
from torch import nn

from peer_scaling.distributed import ALONE, World
from peer_scaling.durable import publish, write_atomically, write_synced
from peer_scaling.record import RECORD, RunRecord, record_text
from peer_scaling.shards import whole

WEIGHTS = "model.safetensors"


def write_record(record: RunRecord, folder: Path) -> Path:
    """Write `record.json` so that a reader sees either all of it or nothing.

    Raises:
        OSError: it could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORD
    write_atomically(path, record_text(record), "record")
    return path


def save_weights(model: nn.Module, folder: Path, world: World = ALONE) -> Path:
    """Write parameters and buffers to `model.safetensors`, complete or not at all; called on all
    ranks, written by the first.
    """
    path = folder / WEIGHTS
    temporary = path.with_suffix(".tmp")
    tensors = {n: whole(t.detach()).cpu().contiguous() for n, t in model.state_dict().items()}
    if not world.is_first:
        return path
    write_synced(temporary, save(tensors), "weights")
    publish(temporary, path, "weights")
    return path


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load what `save_weights` wrote into a model of the same shape."""
    model.load_state_dict(load_file(folder / WEIGHTS))
