"""Triton kernels with one program per token: they gather the rows of the token's choices.

A program keeps its token's vectors in registers and walks the L choices in blocks. No
(tokens, L, D) tensor exists, and a table row is read once for each choice of it.

Shape suffixes: M tokens, L choices per token, D model width.
"""

import triton
import triton.language as tl

from peer_scaling.kernels.triton_tiles import load_rows, load_vector, store_vector


@triton.jit
def normal_cdf(x):
    """P(X <= x) of a standard normal variable."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """sigma(x), with the exact (erf) form of GELU."""
    if ACTIVATION == "gelu":
        y = x * normal_cdf(x)
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of sigma, with 0 for ReLU at 0, as in PyTorch."""
    if ACTIVATION == "gelu":
        y = normal_cdf(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "silu":
        y = tl.sigmoid(x) * (1.0 + x * (1.0 - tl.sigmoid(x)))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x > 0.0, 1.0, 0.0).to(x.dtype)
    return y


@triton.jit
def bag_kernel(
    table_ptr,
    index_ptr,
    weight_ptr,
    y_ptr,
    L,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum: y = sum_l weight_l table[index_l]."""
    m = tl.program_id(0).to(tl.int64)
    y_D = tl.zeros((WIDTH,), ACC)
    for first in range(0, L, ROWS):
        l_L = first + tl.arange(0, ROWS)
        live_L = l_L < L
        index_L = tl.load(index_ptr + m * L + l_L, mask=live_L, other=0)
        weight_L = tl.load(weight_ptr + m * L + l_L, mask=live_L, other=0.0).to(ACC)
        rows_LD = load_rows(table_ptr, index_L, live_L, D, WIDTH, ACC)
        y_D += tl.sum(weight_L[:, None] * rows_LD, axis=0)
    store_vector(y_ptr, m, y_D, D, WIDTH)


@triton.jit
def dots_kernel(
    table_ptr,
    index_ptr,
    vector_ptr,
    dot_ptr,
    L,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Inner products: dot_l = table[index_l] . vector."""
    m = tl.program_id(0).to(tl.int64)
    vector_D = load_vector(vector_ptr, m, D, WIDTH, ACC)
    for first in range(0, L, ROWS):
        l_L = first + tl.arange(0, ROWS)
        live_L = l_L < L
        index_L = tl.load(index_ptr + m * L + l_L, mask=live_L, other=0)
        rows_LD = load_rows(table_ptr, index_L, live_L, D, WIDTH, ACC)
        dot_L = tl.sum(rows_LD * vector_D[None, :], axis=1)
        tl.store(dot_ptr + m * L + l_L, dot_L, mask=live_L)


@triton.jit
def experts_forward_kernel(
    x_ptr,
    index_ptr,
    gate_ptr,
    down_ptr,
    up_ptr,
    y_ptr,
    pre_ptr,
    L,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Experts: pre_l = down[index_l] . x and y = sum_l gate_l sigma(pre_l) up[index_l]."""
    m = tl.program_id(0).to(tl.int64)
    x_D = load_vector(x_ptr, m, D, WIDTH, ACC)
    y_D = tl.zeros((WIDTH,), ACC)
    for first in range(0, L, ROWS):
        l_L = first + tl.arange(0, ROWS)
        live_L = l_L < L
        index_L = tl.load(index_ptr + m * L + l_L, mask=live_L, other=0)
        gate_L = tl.load(gate_ptr + m * L + l_L, mask=live_L, other=0.0).to(ACC)
        down_LD = load_rows(down_ptr, index_L, live_L, D, WIDTH, ACC)
        up_LD = load_rows(up_ptr, index_L, live_L, D, WIDTH, ACC)
        pre_L = tl.sum(down_LD * x_D[None, :], axis=1)
        tl.store(pre_ptr + m * L + l_L, pre_L, mask=live_L)
        weight_L = gate_L * activate(pre_L, ACTIVATION)
        y_D += tl.sum(weight_L[:, None] * up_LD, axis=0)
    store_vector(y_ptr, m, y_D, D, WIDTH)


@triton.jit
def experts_backward_kernel(
    grad_ptr,
    index_ptr,
    gate_ptr,
    pre_ptr,
    down_ptr,
    up_ptr,
    grad_x_ptr,
    grad_gate_ptr,
    grad_pre_ptr,
    weight_ptr,
    L,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Gradients of x, the gates and the pre-activations, and weight_l = gate_l sigma(pre_l)."""
    m = tl.program_id(0).to(tl.int64)
    grad_D = load_vector(grad_ptr, m, D, WIDTH, ACC)
    grad_x_D = tl.zeros((WIDTH,), ACC)
    for first in range(0, L, ROWS):
        l_L = first + tl.arange(0, ROWS)
        live_L = l_L < L
        index_L = tl.load(index_ptr + m * L + l_L, mask=live_L, other=0)
        gate_L = tl.load(gate_ptr + m * L + l_L, mask=live_L, other=0.0).to(ACC)
        pre_L = tl.load(pre_ptr + m * L + l_L, mask=live_L, other=0.0).to(ACC)
        up_LD = load_rows(up_ptr, index_L, live_L, D, WIDTH, ACC)
        down_LD = load_rows(down_ptr, index_L, live_L, D, WIDTH, ACC)
        dot_L = tl.sum(up_LD * grad_D[None, :], axis=1)
        hidden_L = activate(pre_L, ACTIVATION)
        grad_pre_L = dot_L * gate_L * slope(pre_L, ACTIVATION)
        tl.store(grad_gate_ptr + m * L + l_L, dot_L * hidden_L, mask=live_L)
        tl.store(grad_pre_ptr + m * L + l_L, grad_pre_L, mask=live_L)
        tl.store(weight_ptr + m * L + l_L, gate_L * hidden_L, mask=live_L)
        grad_x_D += tl.sum(grad_pre_L[:, None] * down_LD, axis=0)
    store_vector(grad_x_ptr, m, grad_x_D, D, WIDTH)
