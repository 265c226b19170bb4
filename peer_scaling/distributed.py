"""The processes that train one run together, one per device, and what they tell each other.

`torchrun` starts them and says who they are (WORLD_SIZE, RANK, LOCAL_RANK). `World` is all that the
rest of the code knows of them; a process alone is `ALONE`, whose methods communicate nothing.
Numbers that are decided alike on all ranks (to stop, to save) go through a gloo group on the CPU,
so that no device is waited for; tensors of the training go through gloo or NCCL.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, final

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from peer_scaling.errors import UserError

T = TypeVar("T")
FAILURE = "peer-scaling-failure"
PREPARED = "peer-scaling-prepared"
PREPARE_LIMIT = timedelta(days=7)
"""Waiting for another process to tokenise a corpus; torchrun ends the wait if that one dies."""


@final
class World:
    """The ranks of a run. Every method but the properties is called on all ranks, in one order."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        backend: str | None = None,
        store: Store | None = None,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size, self.backend = rank, size, backend
        self._store, self._control = store, control
        self.met = False
        """Whether the ranks have met at the end: none is in the middle of anything."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes, prints and tracks; the others are silent."""
        return self.rank == 0

    def place(self, device: torch.device) -> torch.device:
        """This rank's device: of CUDA devices, the one with its local rank.

        Raises:
            UserError: the machine has fewer devices than ranks.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        own = torch.device("cuda", _number("LOCAL_RANK"))
        torch.cuda.set_device(own)
        return own

    def own_sequences(self, sequences: int, per_forward: int) -> np.ndarray:
        """Places, within `sequences`, of those that this rank reads: its contiguous share of each
        forward pass. The ranks together read what one would, in the same order.
        """
        shares = np.arange(sequences).reshape(-1, self.size, per_forward // self.size)
        return shares[:, self.rank].ravel()

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, made the sum over ranks in place; no derivative."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of one shape; no derivative."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def counts(self, number: int) -> list[int]:
        """Each rank's number, without waiting for a device."""
        parts = [torch.empty((), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(parts, torch.tensor(int(number)), group=self._control)
        return [int(part) for part in parts]

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(self.counts(number)) if self.size > 1 else number

    def any(self, own: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.largest(own))

    def first(self, call: Callable[[], T]) -> T:
        """What `call` returns on the first rank, a JSON value, on every rank.

        Raises:
            UserError: on every rank, if `call` raises it.
        """
        if self.size == 1:
            return call()
        message: dict[str, Any] = {}
        if self.is_first:
            try:
                message["value"] = call()
            except UserError as error:
                message["problems"] = error.problems
        message = json.loads(self._text(json.dumps(message)))
        if "problems" in message:
            raise UserError(*message["problems"])
        return message["value"]

    def share_tensor(self, tensor: Tensor) -> Tensor:
        """The first rank's CPU tensor, written into that of the others."""
        # As bytes: not every type is one that gloo can send.
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0, group=self._control)
        return tensor

    def once_per_machine(self, call: Callable[[], T]) -> T:
        """`call` on one process of each machine, then on the others: what it makes is there."""
        if self._store is None:
            return call()
        key = f"{PREPARED}-{os.environ.get('GROUP_RANK', '0')}"
        if _number("LOCAL_RANK") == 0:
            made = call()
            self._store.set(key, "yes")
            return made
        self._store.wait([key], PREPARE_LIMIT)
        return call()

    def report(self, failure: str, reason: str) -> None:
        """Leave word of why this rank fails: the first one, which writes the record, may only see
        that a connection closed.
        """
        if self._store is not None and not self.is_first:
            text = json.dumps([failure, f"rank {self.rank}: {reason}"])
            self._store.set(FAILURE, text)

    def reported(self) -> tuple[str, str] | None:
        """Kind and reason of another rank's failure, as far as one left word."""
        if self._store is None or not self.is_first or not self._store.check([FAILURE]):
            return None
        failure, reason = json.loads(self._store.get(FAILURE))
        return failure, reason

    def check_same(self, digest: str) -> None:
        """Make sure that all ranks have the same state.

        Raises:
            RuntimeError: they have not: some gradient was not exchanged, or devices differ.
        """
        number = int(digest[:15], 16)
        if self.size > 1 and len(set(self.counts(number))) > 1:
            raise RuntimeError(f"the ranks' states drifted apart; rank {self.rank}: {digest[:8]}")

    def meet(self) -> None:
        """Wait for all ranks at the end of a run: torchrun ends all of them when one has exited."""
        if self.size > 1:
            self.counts(0)
            self.met = True

    def facts(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"world_size": self.size, "backend": self.backend}

    def _text(self, own: str) -> str:
        data = own.encode()
        size = self.counts(len(data))[0]
        buffer = torch.frombuffer(bytearray(data if self.is_first else size), dtype=torch.uint8)
        return self.share_tensor(buffer).numpy().tobytes().decode()


ALONE = World()


def num_ranks() -> int:
    """Processes that train this run, as the environment says.

    Raises:
        UserError: it says that there are several, and not which one this is.
    """
    size = _number("WORLD_SIZE", 1)
    if size > 1:
        missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if n not in os.environ]
        if missing:
            raise UserError(
                f"WORLD_SIZE={size}, but no {', '.join(missing)} in the environment: start with "
                f"torchrun, or unset WORLD_SIZE"
            )
    return size


def check_ranks(sequences: int, device: torch.device) -> None:
    """Make sure that the ranks can share the sequences of a forward pass, and have a device each.

    Raises:
        UserError: they cannot, or have not.
    """
    size, local = num_ranks(), _number("LOCAL_WORLD_SIZE", 1)
    problems = []
    if sequences % size:
        problems.append(
            f"{sequences} sequences per forward pass cannot be shared equally by WORLD_SIZE={size} "
            f"processes: choose micro_batch (or batch_size) as a multiple of {size}"
        )
    if size > 1 and device.type == "cuda" and local > torch.cuda.device_count():
        problems.append(
            f"{local} processes on a machine with {torch.cuda.device_count()} CUDA device(s): "
            f"start as many as it has (torchrun --nproc-per-node), or use device=cpu"
        )
    if problems:
        raise UserError(*problems)


@contextmanager
def joined(device: torch.device, timeout_seconds: float) -> Iterator[World]:
    """The world of this process, as torchrun's environment says; `ALONE` if there is none.

    Args:
        device: what the ranks train on: gloo connects CPUs, NCCL CUDA devices.
        timeout_seconds: how long a rank waits for another one before it fails.
    """
    size = num_ranks()
    if size == 1:
        yield ALONE
        return
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, _ = next(iter(rendezvous("env://", timeout=timeout)))
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    world = World(rank, size, backend, store, control)
    try:
        yield world
    finally:
        # After a failure others may wait for this rank: they learn of it when the process ends.
        if world.met:
            dist.destroy_process_group()


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks, with its derivative: the sum over ranks of theirs.

    PyTorch's own (`torch.distributed.nn`) is deprecated, and its successor private.
    """
    return _Summed.apply(tensor)  # pyright: ignore[reportReturnType]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grad.clone()
        dist.all_reduce(total)
        return total


def _number(name: str, default: int = 0) -> int:
    return int(os.environ.get(name) or default)
