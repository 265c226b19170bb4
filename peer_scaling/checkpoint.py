"""The state of a run as a digest and as a file; safetensors and JSON, never pickle."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"


def state_digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """sha256 of every parameter, buffer and optimiser tensor, with names, types and shapes.

    Equal digests mean equal bits: of the final state of two runs, or before and after an
    evaluation.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model, optimizer):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(model: nn.Module, folder: Path) -> Path:
    """Write parameters and buffers to `model.safetensors`, complete or not at all."""
    path = folder / WEIGHTS
    temporary = path.with_suffix(".tmp")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, temporary)
    temporary.replace(path)
    return path


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load what `save_weights` wrote into a model of the same shape."""
    model.load_state_dict(load_file(folder / WEIGHTS))


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    yield from sorted(model.state_dict().items())
    state = optimizer.state_dict()["state"]
    for number in sorted(state):
        for name, value in sorted(state[number].items()):
            if isinstance(value, Tensor):
                yield f"optimizer.{number}.{name}", value
