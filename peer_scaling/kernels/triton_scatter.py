"""Gradients of table rows in Triton: row_r += weight_ml vector_m for all pairs that picked row r.

Deterministic by default: pairs sorted by row, each row summed in one order and written once. Or by
atomic additions, which need no sort and no word from the device, and round differently each time.

Shape suffixes: M tokens, L choices per token, Q = M * L pairs, N table rows, R rows that some pair
picked, K of them that are long, P pieces of these, D model width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peer_scaling.kernels.segments import RowGradient, sort_segments
from peer_scaling.kernels.triton_tiles import accumulator, launch, load_rows, load_vector, tile_of

LONGEST = 256
"""Pairs that one program adds up in sequence. Where more picked a row, pieces of this many are
added up side by side; then the sums are, in pieces again if they are many."""


@triton.jit
def segment_kernel(
    vector_ptr,
    token_ptr,
    weight_ptr,
    start_ptr,
    count_ptr,
    place_ptr,
    sums_ptr,
    R,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Sums: sums[place_r] = sum of weight_q vector[token_q] over the pairs q of segment r.

    A program takes ROWS segments side by side, and leaves those of more than LIMIT pairs alone.
    """
    r_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count_R = tl.load(count_ptr + r_R, mask=r_R < R, other=0)
    mine_R = (r_R < R) & (count_R <= LIMIT)
    count_R = tl.where(mine_R, count_R, 0)
    start_R = tl.load(start_ptr + r_R, mask=mine_R, other=0)
    sum_RD = tl.zeros((ROWS, WIDTH), ACC)
    longest = tl.cast(tl.max(count_R, axis=0), tl.int32)
    for step in range(longest):
        live_R = step < count_R
        token_R = tl.load(token_ptr + start_R + step, mask=live_R, other=0)
        weight_R = tl.load(weight_ptr + start_R + step, mask=live_R, other=0.0).to(ACC)
        vector_RD = load_rows(vector_ptr, token_R, live_R, D, WIDTH, ACC)
        sum_RD += weight_R[:, None] * vector_RD
    d_D = tl.arange(0, WIDTH)
    place_R = tl.load(place_ptr + r_R, mask=mine_R, other=0)
    mask_RD = mine_R[:, None] & (d_D < D)[None, :]
    tl.store(sums_ptr + place_R[:, None] * D + d_D[None, :], sum_RD, mask=mask_RD)


@triton.jit
def atomic_kernel(
    vector_ptr,
    index_ptr,
    weight_ptr,
    sums_ptr,
    L,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums: sums[index_l] += weight_l vector, for the token of this program."""
    m = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, WIDTH)
    vector_D = load_vector(vector_ptr, m, D, WIDTH, ACC)
    for first in range(0, L, ROWS):
        l_L = first + tl.arange(0, ROWS)
        live_L = l_L < L
        index_L = tl.load(index_ptr + m * L + l_L, mask=live_L, other=0)
        weight_L = tl.load(weight_ptr + m * L + l_L, mask=live_L, other=0.0).to(ACC)
        mask_LD = live_L[:, None] & (d_D < D)[None, :]
        place_LD = sums_ptr + index_L[:, None] * D + d_D[None, :]
        tl.atomic_add(place_LD, weight_L[:, None] * vector_D[None, :], mask_LD, sem="relaxed")


class Plan(NamedTuple):
    """Sums over consecutive entries of a list, and where they go."""

    start_R: Tensor
    count_R: Tensor
    place_R: Tensor
    """int64 rows of the output."""
    pieces: "Plan | None" = None
    """Sums over the pieces of the sums that are long; None if none is."""
    totals: "Plan | None" = None
    """Sums over the pieces' sums."""


class Pairs(NamedTuple):
    """The pairs of an (M, L) index in the order of their rows, and the plan of their sums."""

    pair_Q: Tensor
    token_Q: Tensor
    row_R: Tensor
    plan: Plan


def plan_sums(start_R: Tensor, count_R: Tensor, place_R: Tensor) -> Plan:
    """Cut what is long. Waits for the device: how many are long is data."""
    long_K = (count_R > LONGEST).nonzero().flatten()
    if len(long_K) == 0:
        return Plan(start_R, count_R, place_R)
    pieces_K = (count_R[long_K] + LONGEST - 1) // LONGEST
    first_K = pieces_K.cumsum(0) - pieces_K
    owner_P = torch.arange(len(long_K), device=long_K.device).repeat_interleave(pieces_K)
    piece_P = torch.arange(len(owner_P), device=long_K.device)
    done_P = (piece_P - first_K[owner_P]) * LONGEST
    start_P = start_R[long_K][owner_P] + done_P
    count_P = (count_R[long_K][owner_P] - done_P).clamp(max=LONGEST)
    totals = plan_sums(first_K, pieces_K, place_R[long_K])
    return Plan(start_R, count_R, place_R, Plan(start_P, count_P, piece_P), totals)


def sort_pairs(index_ML: Tensor, *, compact: bool) -> Pairs:
    """Group the pairs by row; sums go to consecutive places if `compact`, else to their rows."""
    pair_Q, row_R, start_R = sort_segments(index_ML)
    end_R = torch.cat([start_R, start_R.new_full((1,), len(pair_Q))])[1:]
    place_R = torch.arange(len(row_R), device=row_R.device) if compact else row_R
    plan = plan_sums(start_R, end_R - start_R, place_R)
    return Pairs(pair_Q, pair_Q // index_ML.shape[1], row_R, plan)


def run_sums(
    plan: Plan, vector_MD: Tensor, token_Q: Tensor, weight_Q: Tensor, sums_ND: Tensor
) -> None:
    """Write sum of weight_q vector[token_q] for every sum of the plan."""
    width, acc = vector_MD.shape[1], accumulator(vector_MD, weight_Q, sums_ND)
    tile = tile_of(width, acc.itemsize, num_tables=2)
    num_sums = len(plan.start_R)
    args = (vector_MD, token_Q, weight_Q, plan.start_R, plan.count_R, plan.place_R, sums_ND)
    programs = -(-num_sums // tile.rows)
    launch(segment_kernel, programs, (*args, num_sums), tile, D=width, LIMIT=LONGEST)
    if plan.pieces is not None and plan.totals is not None:
        piece_P = plan.pieces.place_R
        part_PD = vector_MD.new_empty(len(piece_P), width, dtype=acc)
        run_sums(plan.pieces, vector_MD, token_Q, weight_Q, part_PD)
        one_P = weight_Q.new_ones(len(piece_P))
        run_sums(plan.totals, part_PD, piece_P, one_P, sums_ND)


def ordered_sums(
    pairs: Pairs, vector_MD: Tensor, weight_ML: Tensor, table_ND: Tensor, *, compact: bool
) -> RowGradient | Tensor:
    """The table's gradient, each row summed in one order and written once."""
    num_rows = len(pairs.row_R) if compact else len(table_ND)
    make = table_ND.new_empty if compact else table_ND.new_zeros
    sums = make(num_rows, table_ND.shape[1])
    weight_Q = weight_ML.flatten()[pairs.pair_Q]
    run_sums(pairs.plan, vector_MD, pairs.token_Q, weight_Q, sums)
    return RowGradient(pairs.row_R, sums) if compact else sums


def atomic_sums(index_ML: Tensor, vector_MD: Tensor, weight_ML: Tensor, table_ND: Tensor) -> Tensor:
    """The (N, D) gradient by atomic additions in the accumulator's type, then as the table's."""
    (num_tokens, choices), width = index_ML.shape, table_ND.shape[1]
    acc = accumulator(vector_MD, weight_ML, table_ND)
    sums_ND = torch.zeros_like(table_ND, dtype=acc)
    args = (vector_MD, index_ML, weight_ML, sums_ND, choices)
    launch(atomic_kernel, num_tokens, args, tile_of(width, acc.itemsize), D=width)
    return sums_ND.to(table_ND.dtype)


def table_gradients(
    index_ML: Tensor,
    *terms: tuple[Tensor, Tensor, Tensor],
    compact: bool,
    atomic: bool,
) -> tuple[RowGradient | Tensor, ...]:
    """For each (vector_MD, weight_ML, table_ND), the sums of weight_ml vector_m where index_ml = n.

    In the table's type: rows if `compact`, else (N, D). Atomic additions serve (N, D) only; compact
    rows are always summed in order.
    """
    if atomic and not compact:
        return tuple(atomic_sums(index_ML, *term) for term in terms)
    pairs = sort_pairs(index_ML, compact=compact)
    return tuple(ordered_sums(pairs, *term, compact=compact) for term in terms)
