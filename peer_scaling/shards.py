"""Tensors that may be spread over ranks (FSDP2's DTensors), and those that are whole.

A DTensor is known by not being a plain tensor: a process alone need not import the type.
"""

from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 has spread it over the ranks."""
    return type(tensor) not in (Tensor, nn.Parameter)


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor, to be changed in place: all of it unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor; gathered, on all ranks together, if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def fill(own: Any, value: Tensor) -> None:
    """Copy a whole tensor, the same on all ranks, into one that may be sharded."""
    if not is_sharded(own):
        own.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    value = value.to(own.device)
    part = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
    own.to_local().copy_(part.to_local())
