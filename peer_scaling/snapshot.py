"""A run's state as a `Snapshot`, and a snapshot back into a run, to the bit.

Parameters and moments are copied into the memory that a fresh run would have: some matrix products
on CPUs round differently where their operands begin elsewhere.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peer_scaling.adamw import AdamW
from peer_scaling.checkpoint import CheckpointError, Snapshot
from peer_scaling.distributed import World
from peer_scaling.parallel import Parallel
from peer_scaling.rng import capture_rng, restore_rng
from peer_scaling.shards import fill, whole

MOMENTS = {"moments": "exp_avg", "squares": "exp_avg_sq"}
"""File of a checkpoint -> what it holds of AdamW's state."""


@dataclass(frozen=True)
class TrainingState:
    """What updates change, beside the course of the run. The schedule and the order of the data are
    functions of the step.
    """

    model: nn.Module
    optimizer: AdamW
    parallel: Parallel | None = None
    """How both are spread over ranks; None for one process."""

    def digest(self) -> str:
        """`state_digest` of both."""
        return state_digest(self.model, self.optimizer)


def take_snapshot(
    state: TrainingState, identity: str, losses: list[float], history: str, facts: dict[str, Any]
) -> Snapshot:
    """Everything a checkpoint holds; called on all ranks if they have the state in parts.

    Args:
        state: model and optimiser after one update per loss.
        identity: of the run.
        losses: training loss of every step so far.
        history: lines of the run's history so far.
        facts: JSON values that the caller wants back.
    """
    rng, rng_tensors = capture_rng()
    named = dict(state.model.named_parameters())
    moments = {
        file: {n: whole(state.optimizer.state[p][key]).cpu() for n, p in _with_state(state, named)}
        for file, key in MOMENTS.items()
    }
    counts = {
        f"count.{name}": state.optimizer.state[p]["step"].cpu()
        for name, p in _with_state(state, named)
    }
    course = {"losses": torch.tensor(losses, dtype=torch.float64)}
    course |= {f"rng.{name}": tensor for name, tensor in rng_tensors.items()} | counts
    model = {name: whole(t.detach()).cpu() for name, t in state.model.state_dict().items()}
    return Snapshot(
        step=len(losses),
        identity=identity,
        digest=state.digest(),
        tensors={"model": model, **moments, "course": course},
        state={**facts, "rng": rng},
        history=history,
    )


def put_back(snapshot: Snapshot, state: TrainingState) -> list[float]:
    """Make `state` what it was; the training loss of every step so far.

    Raises:
        CheckpointError: the snapshot does not fit the model, or its digest is not that of the
            state it gave.
    """
    model, course = snapshot.tensors["model"], snapshot.tensors["course"]
    try:
        with torch.no_grad():
            _copy_all(dict(state.model.state_dict()), dict(model))
            _put_back_moments(snapshot, state)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"does not fit the model ({type(error).__name__}: {error})"
        ) from error
    prefix = "rng."
    generators = {n.removeprefix(prefix): t for n, t in course.items() if n.startswith(prefix)}
    restore_rng(snapshot.state["rng"], generators)
    if (digest := state.digest()) != snapshot.digest:
        raise CheckpointError(f"gives digest {digest[:8]}, not {snapshot.digest[:8]}")
    return course["losses"].tolist()


def share_snapshot(snapshot: Snapshot | None, world: World) -> Snapshot | None:
    """The first rank's snapshot, on all ranks: the others need not see its disk."""
    if world.size == 1:
        return snapshot
    header = world.first(lambda: snapshot and _header(snapshot))
    if header is None:
        return None
    tensors = snapshot.tensors if snapshot else _empty(header.pop("tensors"))
    for named in tensors.values():
        for tensor in named.values():
            world.share_tensor(tensor)
    header.pop("tensors", None)
    return Snapshot(tensors=tensors, **header)


def _header(snapshot: Snapshot) -> dict[str, Any]:
    """All of it as JSON values, tensors as their types and shapes."""
    tensors = {
        file: {
            name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in named.items()
        }
        for file, named in snapshot.tensors.items()
    }
    fields = ("step", "identity", "digest", "state", "history")
    return {name: getattr(snapshot, name) for name in fields} | {"tensors": tensors}


def _empty(forms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    return {
        file: {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (dtype, shape) in named.items()
        }
        for file, named in forms.items()
    }


def state_digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """sha256 of every parameter, buffer and optimiser tensor, with names, types and shapes.

    Equal digests mean equal bits: of the final state of two runs, or before and after an
    evaluation.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model, optimizer):
        tensor = whole(tensor.detach()).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    yield from sorted(model.state_dict().items())
    state = optimizer.state_dict()["state"]
    for number in sorted(state):
        for name, value in sorted(state[number].items()):
            if isinstance(value, Tensor):
                yield f"optimizer.{number}.{name}", value


def _with_state(
    state: TrainingState, named: dict[str, nn.Parameter]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that the optimiser has updated; the others have no moments yet."""
    return ((name, p) for name, p in named.items() if state.optimizer.state.get(p))


def _put_back_moments(snapshot: Snapshot, state: TrainingState) -> None:
    named = dict(state.model.named_parameters())
    course = snapshot.tensors["course"]
    for name in snapshot.tensors["moments"]:
        own = state.optimizer.state_of(named[name])
        for file, key in MOMENTS.items():
            fill(own[key], snapshot.tensors[file][name])
        own["step"].copy_(course[f"count.{name}"])


def _copy_all(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if own.keys() != saved.keys():
        raise KeyError(", ".join(sorted(own.keys() ^ saved.keys())))
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
            raise RuntimeError(f"{name} is {tuple(saved[name].shape)} {saved[name].dtype}")
        fill(tensor, saved[name])
