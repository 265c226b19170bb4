"""Tile sizes, launches and loads that the Triton kernels share.

Shape suffixes: L choices of one token, D model width; a block of either may reach past its end.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 8192
"""Bytes of table rows that one warp holds at a time: 64 registers of each of its 32 threads."""

WARP_WIDTH = 1024
"""Elements of a row that one warp covers: 32 per thread, as many registers in float32."""

MAX_WARPS = 16
MAX_ROWS = 32

TRITON_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Tile(NamedTuple):
    """The shape of one program's work; rows and width are powers of 2."""

    rows: int
    width: int
    """At least D: a program holds whole rows."""
    warps: int


def tile_of(d_model: int, itemsize: int, num_tables: int = 1) -> Tile:
    """The tile for rows of `d_model` elements of `itemsize` bytes, read from `num_tables` tables.

    A function of the shape alone, so no run pays for a search and all run the same code. Many
    programs of few warps keep barriers rare and loads in flight: 8 KiB for each of the 12 to 32
    warps that fit on a multiprocessor by their registers (compiled for sm_90), where 25 KiB at a
    time hide the memory latency of an H100.
    """
    width = max(1 << (d_model - 1).bit_length(), 16)
    warps = min(max(width // WARP_WIDTH, 1), MAX_WARPS)
    rows = TILE_BYTES * warps // (width * itemsize * num_tables)
    return Tile(min(max(rows, 1), MAX_ROWS), width, warps)


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The type in which sums are taken: float64 if some tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def launch(
    kernel: Any, programs: int, args: tuple[Tensor | int, ...], tile: Tile, **constants: Any
) -> None:
    """Run `programs` instances of a kernel on the device of its first argument.

    Multiply-adds round once, which versions of Triton default to differently.
    """
    acc = accumulator(*(a for a in args if isinstance(a, Tensor)))
    constants |= {"ROWS": tile.rows, "WIDTH": tile.width, "num_warps": tile.warps}
    constants |= {"ACC": TRITON_TYPES[acc], "enable_fp_fusion": True}
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **constants)


@triton.jit
def load_vector(vectors_ptr, row, D: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Row number `row` of an (any, D) matrix, as (WIDTH,), zero past D."""
    d_D = tl.arange(0, WIDTH)
    return tl.load(vectors_ptr + row * D + d_D, mask=d_D < D, other=0.0).to(ACC)


@triton.jit
def load_rows(
    table_ptr,
    index_L,
    live_L,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """The rows `index_L` (int64) of an (N, D) table, as (rows, WIDTH), zero where not live."""
    d_D = tl.arange(0, WIDTH)
    mask_LD = live_L[:, None] & (d_D < D)[None, :]
    return tl.load(table_ptr + index_L[:, None] * D + d_D[None, :], mask=mask_LD, other=0.0).to(ACC)


@triton.jit
def store_vector(
    vectors_ptr,
    row,
    vector_D,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write (WIDTH,) as row number `row` of an (any, D) matrix, in the matrix's type."""
    d_D = tl.arange(0, WIDTH)
    tl.store(vectors_ptr + row * D + d_D, vector_D, mask=d_D < D)
