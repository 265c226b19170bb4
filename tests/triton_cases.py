"""The Triton kernels against a float64 gather, einsum and autograd; `test_triton.py` runs this file.

With TRITON_INTERPRET=1 on the CPU, else on a GPU.
"""

import os

import pytest
import torch
from torch.nn import functional

from peer_scaling.kernels import triton_rows, triton_scatter
from peer_scaling.kernels.segments import TableGradient
from peer_scaling.kernels.torch_backend import TorchBackend
from peer_scaling.kernels.triton_backend import TritonBackend

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-10}
MODES = {
    "compact": {"compact": True, "atomic": False},
    "dense": {"compact": False, "atomic": False},
    "atomic": {"compact": False, "atomic": True},
}
# Tokens, choices, rows, width: one choice, one token, more choices than rows, widths that are no
# power of 2.
CASES = [
    ((3, 16, 40, 64), torch.float32, "gelu"),
    ((2, 1, 9, 64), torch.float32, "relu"),
    ((2, 40, 12, 96), torch.float32, "silu"),
    ((1, 3, 20, 256), torch.float64, "gelu"),
    ((2, 5, 7, 100), torch.float64, "silu"),
    ((2, 3, 30, 1024), torch.bfloat16, "gelu"),
    ((1, 16, 5, 256), torch.bfloat16, "relu"),
    ((1, 2, 5, 1536), torch.float32, "gelu"),
]


def draw(shape, dtype, num_tables, gate_dtype=None):
    """(x, index, gate, tables ..., gradient of y), all of order 1 where it matters."""
    tokens, choices, rows, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad = torch.randn(2, tokens, width, generator=generator).to(dtype)
    index = torch.randint(rows, (tokens, choices), generator=generator)
    gate = torch.rand(tokens, choices, generator=generator)
    gate = gate.to(gate_dtype or (torch.float64 if dtype == torch.float64 else torch.float32))
    tables = [
        torch.randn(rows, width, generator=generator).div(width**0.5).to(dtype)
        for _ in range(num_tables)
    ]
    return [t.to(DEVICE) for t in (x, index, gate, *tables, grad)]


def reference(function, inputs, grad):
    """The output in float64 and its gradients by the inputs."""
    leaves = [t.detach().cpu().double().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.cpu().double())]


def experts_reference(x, index, gate, down, up, grad, activation):
    def layer(x, gate, down, up):
        pre = torch.einsum("md,mld->ml", x, down[index.cpu()])
        hidden = getattr(functional, activation)(pre)
        return torch.einsum("ml,mld->md", gate * hidden, up[index.cpu()])

    return reference(layer, (x, gate, down, up), grad)


def bag_reference(index, weight, table, grad):
    def bag(weight, table):
        return torch.einsum("ml,mld->md", weight, table[index.cpu()])

    return reference(bag, (weight, table), grad)


def dense(gradient, table):
    """The whole gradient, after a look at the form of a compact one."""
    if isinstance(gradient, torch.Tensor):
        return gradient
    assert torch.equal(gradient.row_R, gradient.row_R.unique())
    assert gradient.grad_RD.shape == (len(gradient.row_R), table.shape[1])
    return gradient.dense(len(table))


def assert_close(actual, expected, tolerance):
    actual = actual.cpu()
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-30) if expected.numel() else 1.0
    assert ((actual.double() - expected).abs() / scale <= tolerance).all()


def run_experts(x, index, gate, down, up, grad, activation, mode):
    y, pre = triton_rows.experts_forward(x, index, gate, down, up, activation)
    *grads, grad_down, grad_up = triton_rows.experts_backward(
        grad, x, index, gate, pre, down, up, activation, **MODES[mode]
    )
    return [y, *grads, dense(grad_down, down), dense(grad_up, up)]


def run_bag(index, weight, table, grad, mode):
    y = triton_rows.bag_forward(index, weight, table)
    grad_weight, grad_table = triton_rows.bag_backward(grad, index, weight, table, **MODES[mode])
    return [y, grad_weight, dense(grad_table, table)]


@pytest.mark.parametrize(("shape", "dtype", "activation"), CASES, ids=str)
def test_experts(shape, dtype, activation):
    inputs = draw(shape, dtype, num_tables=2)
    actual = run_experts(*inputs, activation, "compact")
    x, _, gate, down, up, _ = inputs
    for result, like in zip(actual, (x, x, gate, down, up), strict=True):
        assert result.dtype == like.dtype
    for one, other in zip(actual, experts_reference(*inputs, activation), strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize(("shape", "dtype"), [case[:2] for case in CASES[::2]], ids=str)
def test_bag(shape, dtype):
    _, *inputs = draw(shape, dtype, num_tables=1)
    actual = run_bag(*inputs, "compact")
    for one, other in zip(actual, bag_reference(*inputs), strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("mode", ["dense", "atomic"])
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_and_atomic_gradients(mode, gate_dtype):
    inputs = draw((2, 6, 5, 96), torch.bfloat16, 2, gate_dtype)
    actual = run_experts(*inputs, "gelu", mode)
    for one, other in zip(actual, experts_reference(*inputs, "gelu"), strict=True):
        assert_close(one, other, TOLERANCE[torch.bfloat16])
    _, *inputs = draw((2, 6, 5, 96), torch.float32, 1)
    actual = run_bag(*inputs, mode)
    for one, other in zip(actual, bag_reference(*inputs), strict=True):
        assert_close(one, other, TOLERANCE[torch.float32])


def test_ordered_sums_repeat_to_the_bit():
    inputs = draw((3, 16, 4, 64), torch.float32, num_tables=2)
    first, second, third = (
        run_experts(*inputs, "gelu", m) for m in ("compact", "compact", "dense")
    )
    for one, same, also in zip(first, second, third, strict=True):
        assert torch.equal(one, same)
        assert torch.equal(one, also)


@pytest.mark.parametrize("rows", [1, 2, 25], ids="{} rows".format)
def test_popular_rows_are_summed_in_pieces(rows, monkeypatch):
    """With pieces of 3 pairs: pieces of pieces, and short rows beside long ones."""
    monkeypatch.setattr(triton_scatter, "LONGEST", 3)
    _, index, weight, table, grad = draw((5, 12, 25, 64), torch.float32, num_tables=1)
    index = index.clamp(max=rows - 1)
    index[:3] = rows - 1
    *_, expected = bag_reference(index, weight, table, grad)
    for mode in ("compact", "dense"):
        options = MODES[mode]
        (actual,) = triton_scatter.table_gradients(index, (grad, weight, table), **options)
        assert_close(dense(actual, table), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens(mode):
    inputs = draw((0, 3, 9, 64), torch.float32, num_tables=2)
    y, grad_x, grad_gate, grad_down, grad_up = run_experts(*inputs, "gelu", mode)
    assert y.shape == grad_x.shape == (0, 64)
    assert grad_gate.shape == (0, 3)
    assert not grad_down.any()
    assert not grad_up.any()


def test_tables_of_more_than_2_to_the_31_elements():
    """Only the pages of the rows that are read come into being."""
    rows, width = 2**21 + 8, 1024
    table = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE)
    index = torch.tensor([[rows - 1, 0], [rows - 3, rows - 1]], device=DEVICE)
    table[index.flatten()] = torch.arange(4.0, device=DEVICE)[:, None].bfloat16()
    y = triton_rows.bag_forward(index, torch.ones(2, 2, device=DEVICE), table)
    expected = table[index].float().sum(1)
    assert torch.equal(y.float(), expected)


def test_traffic_at_the_size_of_the_paper():
    """He 2024's layer at d = 1024 in bfloat16: 512 KiB of rows for each token."""
    moved = triton_rows.bytes_moved((16384, 128), 2**20, 1024, itemsize=2, num_tables=2)
    assert moved.forward == 16384 * (512 * 1024 + 2 * 2048)
    assert moved.backward == 16384 * (512 * 1024 + 4 * 2048) + 2 * 2**20 * 2048


def everything(backend, form):
    """Each operation of the backend contract once: results by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    x, grad, gate, down, up = draw(5, 64), draw(5, 64), draw(5, 6), draw(49, 64), draw(49, 64)
    score, index = backend.search(draw(5, 2, 2, 16), draw(2, 2, 7, 16), 3)
    index = index.flatten(1)
    picked = backend.group(index, 49)
    y, pre = backend.experts(x, index, gate, down, up, "gelu")
    found = backend.experts_backward(grad, x, index, gate, pre, down, up, "gelu", form)
    rows = backend.row_sums(picked, x, gate)
    return {
        "score": score,
        "index": index,
        "y": y,
        "pre": pre,
        "x": found.x_MD,
        "gate": found.gate_ML,
        "down": found.down_ND.to_dense(),
        "up": found.up_ND.to_dense(),
        "dots": backend.dots(picked, up, grad),
        "bag": backend.bag(picked, up, gate),
        "table": backend.table_gradient(picked, grad, gate, up, form).to_dense(),
        "rows": rows.row_R,
        "sums": rows.grad_RD,
    }


@pytest.mark.parametrize("form", list(TableGradient))
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_backend_agrees_with_pytorchs_in_every_operation(form, deterministic):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        ours = everything(TritonBackend(), form)
    finally:
        torch.use_deterministic_algorithms(before)
    for name, value in everything(TorchBackend(), form).items():
        assert torch.allclose(ours[name], value, atol=1e-5), name
