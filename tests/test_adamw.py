"""AdamW on gradients that arrive as rows, against PyTorch's on the dense gradient."""

import pytest
import torch

from peer_scaling.adamw import SLICE_BYTES, AdamW, clip_gradients
from peer_scaling.ffw.peer import PEER
from peer_scaling.kernels.dispatch import use_backend
from reference import relative_error

N, D = 300, 24
OPTIONS = {"betas": (0.9, 0.95), "eps": 1e-8}


def optimizer(parameters, table_update="dense"):
    groups = [{"params": parameters, "lr": 1e-2, "weight_decay": 0.1}]
    return AdamW(groups, table_update=table_update, **OPTIONS)


def row_gradient(generator, num_rows=40, shape=(N, D)):
    rows = torch.randperm(shape[0], generator=generator)[:num_rows].sort().values
    values = torch.randn(num_rows, shape[1], generator=generator)
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=True, check_invariants=True
    )


@pytest.mark.parametrize("shape", [(N, D), (7, 3), (SLICE_BYTES // 4 // 1024 * 2 + 5, 1024)])
def test_dense_update_has_the_bits_of_torchs_on_the_dense_gradient(shape):
    """The last shape takes three slices."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = optimizer([ours])
    plain = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, fused=True, **OPTIONS)
    for _ in range(4):
        ours.grad = row_gradient(generator, min(40, shape[0] // 2), shape)
        theirs.grad = ours.grad.to_dense()
        with use_backend("torch"):
            mine.step()
        plain.step()
    assert torch.equal(ours, theirs)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(mine.state[ours][name], plain.state[theirs][name])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_native_pass_is_torchs_update_to_rounding(threads):
    """After 5 steps of 0.01, relative to the largest weight: some units in the last place."""
    before = torch.get_num_threads()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(3000, 2048, generator=generator).to(dtype)
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        mine = optimizer([ours])
        plain = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, **OPTIONS)
        torch.set_num_threads(threads)
        try:
            for _ in range(5):
                ours.grad = row_gradient(generator, 700, (3000, 2048)).to(dtype).coalesce()
                theirs.grad = ours.grad.to_dense()
                with use_backend("native"):
                    mine.step()
                plain.step()
        finally:
            torch.set_num_threads(before)
        assert relative_error(ours, theirs) <= tolerance
        assert torch.allclose(mine.state[ours]["exp_avg_sq"], plain.state[theirs]["exp_avg_sq"])
        assert mine.state[ours]["step"] == plain.state[theirs]["step"]


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_lazy_update_is_adamw_on_the_picked_rows_and_leaves_the_rest(backend):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(N, D, generator=generator)
    table = torch.nn.Parameter(start.clone())
    lazy = optimizer([table], "lazy")
    expected, mean, square = start.double(), torch.zeros(N, D).double(), torch.zeros(N, D).double()
    picked = torch.zeros(N, dtype=torch.bool)
    for step in range(1, 5):
        table.grad = row_gradient(generator)
        r, g = table.grad.indices()[0], table.grad.values().double()
        picked[r] = True
        with use_backend(backend):
            lazy.step()
        mean[r] = 0.9 * mean[r] + 0.1 * g
        square[r] = 0.95 * square[r] + 0.05 * g**2
        direction = mean[r] / (1 - 0.9**step) / ((square[r] / (1 - 0.95**step)).sqrt() + 1e-8)
        expected[r] = expected[r] * (1 - 1e-2 * 0.1) - 1e-2 * direction
    assert torch.allclose(table.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(table[~picked], start[~picked])
    assert not table[picked].eq(start[picked]).all(dim=1).any()


def test_dense_parameters_have_torchs_bits():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(9, 5, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine, plain = (
        optimizer([ours]),
        torch.optim.AdamW([theirs], 1e-2, weight_decay=0.1, fused=True, **OPTIONS),
    )
    for _ in range(3):
        ours.grad = torch.randn(9, 5, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        plain.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_that_of_the_dense_gradients(max_norm):
    """Two micro-batches that picked some of the same rows, and a dense parameter beside."""
    generator = torch.Generator().manual_seed(0)
    table, other = torch.nn.Parameter(torch.zeros(N, D)), torch.nn.Parameter(torch.zeros(4))
    table.grad = row_gradient(generator, 200) + row_gradient(generator, 200)
    other.grad = torch.randn(4, generator=generator)
    dense = [torch.nn.Parameter(p.detach().clone()) for p in (table, other)]
    dense[0].grad, dense[1].grad = table.grad.to_dense(), other.grad.clone()
    norm = clip_gradients([table, other], max_norm)
    assert torch.allclose(norm, torch.nn.utils.clip_grad_norm_(dense, max_norm))
    assert torch.allclose(table.grad.to_dense(), dense[0].grad)
    assert torch.allclose(other.grad, dense[1].grad)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("table_update", ["dense", "lazy"])
def test_a_step_that_is_masked_changes_nothing(table_update, backend):
    with use_backend(backend):
        check_that_a_masked_step_changes_nothing(table_update)


def check_that_a_masked_step_changes_nothing(table_update):
    generator = torch.Generator().manual_seed(0)
    table, other = torch.nn.Parameter(torch.ones(N, D)), torch.nn.Parameter(torch.ones(4))
    ours = optimizer([table, other], table_update)

    def set_gradients():
        table.grad, other.grad = row_gradient(generator), torch.ones(4)

    set_gradients()
    ours.step()
    before = [t.clone() for p in (table, other) for t in (p.detach(), *ours.state[p].values())]
    ours.found_inf = torch.tensor(1.0)
    set_gradients()
    ours.step()
    after = [t for p in (table, other) for t in (p.detach(), *ours.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    ours.found_inf = torch.tensor(0.0)
    ours.step()
    assert not torch.equal(before[0], table)


def test_rows_of_a_backward_pass_are_not_sorted_again():
    """They ascend, and keep their memory: what autograd hands over is what is clipped."""
    layer = PEER(num_experts=64, num_heads=2, experts_per_head=4, key_dim=8, table_gradient="rows")
    module = layer.build(16, generator=torch.Generator().manual_seed(0))
    module(torch.randn(1, 9, 16)).y_BTD.sum().backward()
    before = module.up_ND.grad._values().data_ptr()
    clip_gradients(module.parameters(), 1e-3)
    assert module.up_ND.grad.is_coalesced()
    assert module.up_ND.grad.values().data_ptr() == before


def test_no_gradient_no_clipping():
    assert clip_gradients([torch.nn.Parameter(torch.ones(3))], 1.0) == 0
