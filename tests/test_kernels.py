"""The sparse kernels of every backend against plain float64 definitions, and what they refuse."""

import random
import subprocess
import sys

import pytest
import torch

from peer_scaling.kernels import dispatch, native, plain
from peer_scaling.kernels.activations import ACTIVATIONS
from peer_scaling.kernels.dispatch import use_backend
from peer_scaling.kernels.experts import single_neuron_experts, weighted_rows
from peer_scaling.kernels.product_keys import product_key_topk
from peer_scaling.kernels.segments import TableGradient, sort_segments
from peer_scaling.kernels.torch_backend import candidate_pairs, grouped_topk
from reference import relative_error

BACKENDS = ("torch", "native")
NUM_SHAPES = 500
NAMES = ("x", "query", "keys", "gate", "down", "up")


def random_shape(number):
    """Every tenth a corner: k = 1, k = all sub-keys, one token, N = 4, widths of no power of 2."""
    rng = random.Random(number)
    root = rng.choice([2, 3, 5, 7, 11, 16, 33])
    shape = {
        "tokens": rng.choice([1, 2, 3, 17, 40]),
        "heads": rng.randint(1, 5),
        "root": root,
        "k": rng.randint(1, root),
        "half": rng.choice([1, 2, 3, 8, 17]),
        "width": rng.choice([1, 2, 7, 16, 33, 64, 100]),
        "shared": rng.random() < 0.5,
        "activation": rng.choice(list(ACTIVATIONS)),
    }
    corners = [{"k": 1}, {"k": root}, {"tokens": 1}, {"root": 2, "k": min(2, shape["k"])}]
    return shape | (corners[number // 10 % 4] if number % 10 == 0 else {})


def inputs(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, root, half, width = (
        shape[n] for n in ("tokens", "heads", "root", "half", "width")
    )

    def draw(*size):
        return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)

    return {
        "x": draw(tokens, width),
        "query": draw(tokens, heads, 2, half),
        "keys": draw(1 if shape["shared"] else heads, 2, root, half),
        "gate": draw(tokens, heads * shape["k"]),
        "down": draw(root**2, width),
        "up": draw(root**2, width),
    }


def layer(values, shape, form=TableGradient.DENSE):
    """A sum of everything the kernels do, through public functions."""
    top = product_key_topk(values["query"], values["keys"], shape["k"])
    index = top.index_MHK.flatten(1)
    gate = torch.softmax(top.score_MHK, -1).flatten(1) * values["gate"]
    arguments = (values["x"], index, gate, values["down"], values["up"])
    y = single_neuron_experts(*arguments, shape["activation"], form)
    return y + weighted_rows(index, values["gate"], values["up"], form), top


def outputs_and_gradients(backend, shape, dtype, form=TableGradient.DENSE):
    values = {n: v.requires_grad_() for n, v in inputs(shape, dtype).items()}
    with use_backend(backend):
        y, top = layer(values, shape, form)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum()
        grads = torch.autograd.grad(loss, [values[n] for n in NAMES])
    return {
        "y": y.detach(),
        "score": top.score_MHK.detach(),
        **dict(zip(NAMES, grads, strict=True)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_shapes_equal_the_float64_definition(backend):
    worst = 0.0
    for number in range(NUM_SHAPES):
        shape = random_shape(number)
        theirs = outputs_and_gradients("plain", shape, torch.float64)
        ours = outputs_and_gradients(backend, shape, torch.float64)
        for name, value in theirs.items():
            scale = max(float(value.abs().max()), 1e-3)
            worst = max(worst, float((ours[name] - value).abs().max()) / scale)
    assert worst <= 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_as_good_as_the_plain_path(backend):
    """Root mean square error over 60 shapes, of outputs and each gradient, at most twice its own.

    Shapes of which float32 rounding changes the choice of keys are left out: they differ in both.
    """
    own, ours, used = dict.fromkeys((*NAMES, "y"), 0.0), dict.fromkeys((*NAMES, "y"), 0.0), 0
    for number in range(60):
        shape = random_shape(number)
        exact, single, fast = (
            outputs_and_gradients(name, shape, dtype)
            for name, dtype in [("plain", torch.float64)] + [(b, torch.float32) for b in ("plain", backend)]
        )  # fmt: skip
        if any(relative_error(r["score"].double(), exact["score"]) > 1e-5 for r in (single, fast)):
            continue
        used += 1
        for name in own:
            own[name] += relative_error(single[name].double(), exact[name]) ** 2
            ours[name] += relative_error(fast[name].double(), exact[name]) ** 2
    assert used > 50
    for name in own:
        assert ours[name] ** 0.5 <= 2 * own[name] ** 0.5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_gradcheck(backend, activation):
    shape = {"tokens": 3, "heads": 2, "root": 3, "k": 2, "half": 2, "width": 5, "shared": False}
    shape["activation"] = activation
    values = {n: v.requires_grad_() for n, v in inputs(shape, torch.float64, seed=3).items()}

    def function(*tensors):
        return layer(dict(zip(NAMES, tensors, strict=True)), shape)[0]

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, [values[n] for n in NAMES])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_choose_different_keys_of_the_best_scores(backend):
    """Integer keys: nearly all scores tie."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-1, 2, (50, 3, 2, 4), generator=generator).double()
    keys = torch.randint(-1, 2, (1, 2, 64, 4), generator=generator).double()
    with use_backend("plain"):
        best = product_key_topk(query, keys, 9)
    with use_backend(backend):
        ours = product_key_topk(query, keys, 9)
    assert torch.equal(ours.score_MHK, best.score_MHK)
    first, second = ours.index_MHK // 64, ours.index_MHK % 64
    scores = torch.einsum("mhpc,psc->mhps", query, keys[0])
    again = scores[:, :, 0].gather(2, first) + scores[:, :, 1].gather(2, second)
    assert torch.equal(again, ours.score_MHK)
    assert all(len(set(row.tolist())) == 9 for row in ours.index_MHK.flatten(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "k"), [(512, 16), (1024, 32), (300, 7), (17, 17), (640, 100)])
def test_search_of_many_sub_keys(backend, size, k):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(40, 2, 2, 6, generator=generator)
    keys = torch.randn(2, 2, size, 6, generator=generator)
    query[0] = 0  # all scores equal: as many candidates as there can be
    with use_backend("plain"):
        best = product_key_topk(query, keys, k)
    with use_backend(backend):
        ours = product_key_topk(query, keys, k)
    assert torch.equal(ours.score_MHK, best.score_MHK)
    assert torch.equal(ours.index_MHK[1:].sort().values, best.index_MHK[1:].sort().values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_query_that_is_no_number_gives_no_number(backend, bad):
    query, keys = torch.randn(4, 2, 2, 5), torch.randn(1, 2, 40, 5)
    query[1, 0, 1, 3] = bad
    with use_backend(backend):
        top = product_key_topk(query, keys, 3)
        gate = torch.softmax(top.score_MHK, -1)
        y = weighted_rows(top.index_MHK.flatten(1), gate.flatten(1), torch.randn(1600, 7))
    assert gate[1, 0].isnan().all()
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2, 3]]).all()
    assert int(top.index_MHK.min()) >= 0
    assert int(top.index_MHK.max()) < 1600


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", list(TableGradient))
def test_same_bits_twice_and_for_any_number_of_threads(backend, form):
    shape = random_shape(0) | {"tokens": 600, "heads": 8, "root": 32, "k": 16, "width": 64}
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            results.append(outputs_and_gradients(backend, shape, torch.float32, form))
    finally:
        torch.set_num_threads(threads)
    compared = results[1:] if backend == "native" else results[1:2]  # PyTorch's own sums may differ
    for other in compared:
        for name, value in results[0].items():
            assert torch.equal(value.to_dense(), other[name].to_dense()), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_gradients_are_the_rows_of_the_dense_gradient(backend):
    shape = random_shape(3) | {"root": 16, "k": 4, "tokens": 3}
    dense = outputs_and_gradients(backend, shape, torch.float64)
    rows = outputs_and_gradients(backend, shape, torch.float64, TableGradient.ROWS)
    for name in ("down", "up"):
        assert rows[name].is_sparse
        assert rows[name].is_coalesced()
        assert len(rows[name].values()) <= shape["tokens"] * shape["heads"] * shape["k"] < 256
        assert torch.equal(rows[name].to_dense(), dense[name])


@pytest.mark.parametrize("backend", ["plain", *BACKENDS])
def test_an_empty_batch_gives_empty_results_and_no_gradient(backend):
    shape = random_shape(1) | {"tokens": 0, "root": 4, "k": 2}
    result = outputs_and_gradients(backend, shape, torch.float64)
    assert result["y"].shape == (0, shape["width"])
    assert not result["down"].any()
    assert not result["keys"].any()


def test_nothing_of_the_size_of_all_chosen_rows_is_kept():
    """Between forward and backward: inputs, indices and one number per choice."""
    shape = random_shape(0) | {"tokens": 64, "heads": 4, "root": 16, "k": 8, "width": 64}
    values = {n: v.requires_grad_() for n, v in inputs(shape, torch.float32).items()}
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        layer(values, shape)
    assert max(sizes) <= 16**2 * 64  # a table; the rows of all choices would be 8 times that


def test_candidate_pairs_are_those_that_can_win():
    counts = {k: len(candidate_pairs(k)[0]) for k in (1, 2, 16, 32)}
    assert counts == {1: 1, 2: 3, 16: 50, 32: 119}
    pairs = set(zip(*(c.tolist() for c in candidate_pairs(5)), strict=True))
    assert pairs == {(i, j) for i in range(5) for j in range(5) if (i + 1) * (j + 1) <= 5}


def test_grouped_topk_is_topk():
    scores = torch.randn(30, 3, 256, generator=torch.Generator().manual_seed(0))
    for k in (1, 4, 16, 200):
        ours, theirs = grouped_topk(scores, k), scores.topk(k)
        assert torch.equal(ours[0], theirs.values)
        assert torch.equal(ours[1], theirs.indices)


def test_segments_by_hand():
    segments = sort_segments(torch.tensor([[5, 2], [2, 9], [5, 5]]))
    assert segments.row_R.tolist() == [2, 5, 9]
    assert segments.pair_Q.tolist() == [1, 2, 0, 4, 5, 3]
    assert segments.start_R.tolist() == [0, 2, 5]


X, INDEX, GATE, TABLE = (
    torch.ones(3, 4),
    torch.zeros(3, 2).long(),
    torch.ones(3, 2),
    torch.ones(9, 4),
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index": INDEX.int()}, TypeError, "the index is torch.int32, not int64"),
        ({"gate": GATE.double()}, TypeError, "gate is torch.float64, the table torch.float32"),
        ({"gate": GATE[:2]}, ValueError, r"gate and index differ in shape: \(2, 2\) and \(3, 2\)"),
        ({"x": X[:, :3]}, ValueError, "do not fit together"),
        ({"up": TABLE[:8]}, ValueError, "do not fit together"),
        ({"x": X[0]}, ValueError, "x must have 2 dimensions"),
        ({"down": TABLE.to("meta")}, ValueError, "down is on meta, the index on cpu"),
        ({"index": INDEX + 9}, IndexError, r"index 9..9 leaves the 9 table rows"),
        ({"index": INDEX - 1}, IndexError, r"index -1..-1 leaves"),
        ({"activation": "sine"}, ValueError, "activation='sine' is unknown: gelu, relu, silu"),
    ],
)
def test_impossible_look_ups_are_refused(change, error, message):
    given = {"x": X, "index": INDEX, "gate": GATE, "down": TABLE, "up": TABLE, "activation": "gelu"}
    with pytest.raises(error, match=message):
        single_neuron_experts(*(given | change).values())


@pytest.mark.parametrize(
    ("query", "keys", "k", "error", "message"),
    [
        ((3, 2, 2, 4), (1, 2, 5, 4), 6, ValueError, r"k=6 is not in 1..5, the sub-keys of a half"),
        ((3, 2, 2, 4), (1, 2, 5, 4), 0, ValueError, "k=0"),
        ((3, 2, 2, 4), (1, 2, 5, 3), 2, ValueError, "do not fit keys"),
        ((3, 2, 2, 4), (3, 2, 5, 4), 2, ValueError, "3 key sets for 2 heads"),
    ],
)
def test_impossible_searches_are_refused(query, keys, k, error, message):
    with pytest.raises(error, match=message):
        product_key_topk(torch.ones(query), torch.ones(keys), k)
    with pytest.raises(TypeError, match=r"queries are torch\.float32, keys torch\.float64"):
        product_key_topk(torch.ones(3, 2, 2, 4), torch.ones(1, 2, 5, 4).double(), 2)


def test_backends_by_name():
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="kernels='fast' is unknown; choose one of auto, plain"):
        use_backend("fast").__enter__()
    with use_backend("triton"), pytest.raises(ValueError, match="does not compute with"):
        dispatch.backend_for(cpu, torch.float32)
    with use_backend("native"), pytest.raises(ValueError, match="bfloat16 on cpu"):
        dispatch.backend_for(cpu, torch.bfloat16)
    assert dispatch.backend_name(cpu, torch.float32) == "native"
    assert dispatch.backend_name(cpu, torch.bfloat16).startswith("torch (no native kernels")
    with use_backend("plain"):
        assert dispatch.backend_name(cpu, torch.float32) == "plain"


def test_without_a_compiler_pytorch_computes_and_the_name_says_why(tmp_path):
    """In a fresh process, with an empty cache and no compiler on the path."""
    code = (
        "import torch; from peer_scaling.kernels.dispatch import backend_name; "
        "print(backend_name(torch.device('cpu'), torch.float32))"
    )
    environment = {
        "PEER_SCALING_CACHE": str(tmp_path),
        "PATH": str(tmp_path),
        "HOME": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("torch (no C++ compiler (c++, g++, clang++, or CXX=...))")


def test_a_broken_compiler_is_told_in_one_line(monkeypatch, tmp_path):
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho 'internal error: out of ideas' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(native.NativeBuildError, match="cxx failed: internal error: out of ideas"):
        native.library.__wrapped__()


def test_plain_definitions_are_algorithm_1_by_hand():
    x, down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]]), torch.eye(2)
    y = plain.single_neuron_experts(
        x, torch.tensor([[0, 1, 0]]), torch.tensor([[1.0, 5.0, 0.5]]), down, up, "relu"
    )
    assert y.tolist() == [[3.0 + 1.5, 0.0]]
