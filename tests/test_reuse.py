"""Blocks of gradient memory: used again when the last tensor on them is gone, and not before."""

import gc

import torch

from peer_scaling.kernels.reuse import SMALLEST_BYTES, BlockPool
from peer_scaling.kernels.segments import RowGradient

ROWS = SMALLEST_BYTES // 256


def test_a_block_is_used_again_when_its_tensor_is_gone():
    pool = BlockPool()
    first = pool.empty((ROWS, 64), torch.float32)
    place = first.data_ptr()
    assert first.shape == (ROWS, 64)
    assert pool.idle_bytes == 0
    del first
    gc.collect()
    assert pool.idle_bytes >= SMALLEST_BYTES
    assert pool.empty((ROWS + 1, 64), torch.float32).data_ptr() == place, "a few rows more fit too"


def test_memory_that_anything_still_reads_is_left_alone():
    """As autograd leaves it: the values of a sparse gradient, a view, a detached alias."""
    pool = BlockPool()
    values = pool.empty((ROWS, 64), torch.float32).fill_(7.0)
    gradient = RowGradient(torch.arange(ROWS), values).sparse(2 * ROWS)
    view = values[3:5]
    del values
    gc.collect()
    pool.empty((ROWS, 64), torch.float32).fill_(1.0)
    assert float(gradient.coalesce().values().min()) == 7.0
    del gradient
    gc.collect()
    pool.empty((ROWS, 64), torch.float32).fill_(2.0)
    assert view.unique().tolist() == [7.0]


def test_idle_blocks_that_fit_nothing_are_given_back():
    pool = BlockPool()
    small, large = (pool.empty((rows, 64), torch.float32) for rows in (ROWS, 50 * ROWS))
    del small, large
    gc.collect()
    held = pool.idle_bytes
    middle = pool.empty((10 * ROWS, 64), torch.float32)
    assert pool.idle_bytes == 0
    del middle
    gc.collect()
    assert pool.idle_bytes < held / 3


def test_small_tensors_are_none_of_its_business():
    pool = BlockPool()
    tensor = pool.empty((3, 5), torch.float64)
    assert (tensor.shape, tensor.dtype) == ((3, 5), torch.float64)
    del tensor
    gc.collect()
    assert pool.idle_bytes == 0
