"""Memory of large gradients, kept and used again.

PyTorch returns large CPU tensors to the system when they are freed, and the first touch of the next
ones costs more than what is computed into them: 0.2 to 1.3 s for the gradients of two tables of
262,144 x 256, whose sums take 0.15 s (docs/performance.md).
"""

import mmap
import weakref
from functools import partial
from math import prod
from typing import final

import torch
from torch import Tensor

SMALLEST_BYTES = 2**20
"""Smaller tensors come from PyTorch, whose allocator keeps such memory."""
HUGE_PAGE_BYTES = 2**21
SLACK = 1 / 16
"""Room beyond the tensor that a block is made for: the number of chosen rows varies by step. Nobody
touches it until then, so it takes no memory."""


@final
class BlockPool:
    """Blocks of memory that return here when the last tensor on them is gone."""

    def __init__(self) -> None:
        self._idle: list[mmap.mmap] = []

    @property
    def idle_bytes(self) -> int:
        """Size of the blocks that no tensor uses."""
        return sum(len(block) for block in self._idle)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised CPU tensor."""
        size = prod(shape) * dtype.itemsize
        if size < SMALLEST_BYTES:
            return torch.empty(shape, dtype=dtype)
        block = self._take(size)
        # The tensor's storage holds this view, and nothing else does.
        view = memoryview(block)
        weakref.finalize(view, partial(self._idle.append, block)).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=prod(shape)).view(shape)

    def _take(self, size: int) -> mmap.mmap:
        """The smallest idle block that fits and is not twice too large; else a new one, instead of
        those that are idle: what is kept is never more than what a step has used.
        """
        fits = [block for block in self._idle if size <= len(block) <= 2 * size]
        if not fits:
            self._idle.clear()
            return _new_block(int(size * (1 + SLACK)))
        block = min(fits, key=len)
        self._idle.remove(block)
        return block


def _new_block(size: int) -> mmap.mmap:
    """Unwritten memory, on huge pages where the system has them: with small ones, the first touch
    of a large gradient costs twice as much as its sums.
    """
    whole_pages = -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    block = mmap.mmap(-1, whole_pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        block.madvise(advice)
    return block
