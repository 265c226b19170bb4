"""The four layers against plain float64 definitions: outputs and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu

import reference
from peer_scaling.ffw.dense import Dense
from peer_scaling.ffw.moe import MoE
from peer_scaling.ffw.peer import PEER
from peer_scaling.ffw.pkm import PKM
from peer_scaling.kernels.experts import single_neuron_experts, weighted_rows
from peer_scaling.kernels.product_keys import product_key_topk

D_MODEL, TOKENS = 6, 5
TOLERANCE = 1e-10


def built(config, d_model=D_MODEL, seed=0):
    return config.build(d_model, generator=torch.Generator().manual_seed(seed)).double()


def tokens(d_model=D_MODEL, num=TOKENS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, num, d_model, dtype=torch.float64, generator=generator)
    return x.requires_grad_()


def outputs_and_gradients(function, x, module):
    """The output and the gradients of x and of every parameter, for a fixed loss."""
    module.zero_grad()
    x.grad = None
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad.clone(), **grads}


def assert_equal_to_reference(module, definition, x):
    ours = outputs_and_gradients(lambda x_: module(x_).y_BTD[0], x, module)
    theirs = outputs_and_gradients(lambda x_: definition(x_[0], module), x, module)
    assert ours.keys() == theirs.keys()
    errors = {k: reference.relative_error(ours[k], theirs[k]) for k in ours}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("kind", [PEER, PKM])
def test_retrieval_stays_in_float32_under_autocast(kind):
    """In bfloat16, with 8 bits, most scores would tie and ties would pick the experts."""
    config = kind(num_experts=1024, num_heads=4, experts_per_head=8, key_dim=16)
    layer = config.build(D_MODEL, generator=torch.Generator().manual_seed(0))
    x = tokens(num=128).detach().float()
    plain = layer(x).stats.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x).stats.weight
    assert half.dtype == torch.float32
    assert len(half.unique()) > 0.9 * len(plain.unique())


@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("shared_keys", [True, False])
@pytest.mark.parametrize(("kind", "definition"), [(PEER, reference.peer), (PKM, reference.pkm)])
def test_product_key_layers_equal_brute_force(kind, definition, query_norm, shared_keys):
    config = kind(
        num_experts=49,
        num_heads=3,
        experts_per_head=4,
        key_dim=6,
        query_norm=query_norm,
        shared_keys=shared_keys,
    )
    assert_equal_to_reference(built(config), definition, tokens())


@pytest.mark.parametrize(
    ("experts", "heads", "kept", "width", "num"),
    [(4, 1, 1, 2, 2), (4, 5, 2, 2, 3), (9, 2, 3, 4, 4), (121, 2, 11, 10, 3), (256, 8, 1, 8, 6)],
)
def test_peer_equals_brute_force_at_odd_shapes(experts, heads, kept, width, num):
    config = PEER(num_experts=experts, num_heads=heads, experts_per_head=kept, key_dim=width)
    assert_equal_to_reference(built(config, seed=experts), reference.peer, tokens(num=num))


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 2.0])
def test_expert_choice_equals_definition(capacity_factor):
    module = built(MoE(num_experts=4, capacity_factor=capacity_factor))
    assert_equal_to_reference(module, reference.expert_choice, tokens(num=8))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_token_choice_equals_definition(top_k):
    module = built(MoE(num_experts=4, router="token_choice", top_k=top_k))
    assert_equal_to_reference(module, reference.token_choice, tokens(num=8))


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("num", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_expert_is_dense_bit_for_bit(router, num, dtype):
    moe = built(MoE(num_experts=1, router=router), d_model=16).to(dtype)
    dense = built(Dense(), d_model=16).to(dtype)
    with torch.no_grad():
        dense.in_FD.copy_(moe.in_EFD[0])
        dense.out_DF.copy_(moe.out_EDF[0])
    x = tokens(16, num).to(dtype)
    assert torch.equal(moe(x).y_BTD, dense(x).y_BTD)


def test_peer_with_one_expert_per_head_is_an_mlp():
    """He 2024, equation (8): k = 1 and gates of 1 give V sigma(W^T x), W and V of chosen experts."""
    module = built(PEER(num_experts=64, num_heads=7, experts_per_head=1, key_dim=8))
    x = tokens(num=4)
    module.eval()
    index_ML, gate_ML = module.router(x[0])
    assert torch.equal(gate_ML, torch.ones_like(gate_ML))
    y = module(x).y_BTD[0]
    for m in range(4):
        w, v = module.down_ND[index_ML[m]], module.up_ND[index_ML[m]]
        assert reference.relative_error(y[m], v.T @ gelu(w @ x[0, m])) <= TOLERANCE


def test_an_expert_chosen_by_two_heads_counts_twice():
    x = torch.randn(3, 4, dtype=torch.float64)
    table = torch.randn(5, 4, dtype=torch.float64)
    once = weighted_rows(torch.tensor([[2]] * 3), torch.full((3, 1), 0.5).double(), table)
    twice = weighted_rows(torch.tensor([[2, 2]] * 3), torch.full((3, 2), 0.5).double(), table)
    assert torch.allclose(twice, 2 * once, rtol=0, atol=1e-15)
    index, gate = torch.tensor([[1, 1]] * 3), torch.full((3, 2), 0.25).double()
    y = single_neuron_experts(x, index, gate, table, table, "gelu")
    assert torch.allclose(y, 0.5 * gelu(x @ table[1])[:, None] * table[1], atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(sub_keys=st.integers(1, 12), heads=st.integers(1, 3), shared=st.booleans(), data=st.data())
def test_product_key_search_is_exact(sub_keys, heads, shared, data):
    k = data.draw(st.integers(1, sub_keys))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    query = torch.randn(4, heads, 2, 3, dtype=torch.float64, generator=generator)
    sets = 1 if shared else heads
    keys = torch.randn(sets, 2, sub_keys, 3, dtype=torch.float64, generator=generator)
    top = product_key_topk(query, keys, k)
    keys = keys.expand(heads, -1, -1, -1)
    every = torch.einsum("mhc,hsc->mhs", query[:, :, 0], keys[:, 0])[..., None] + torch.einsum(
        "mhc,hsc->mhs", query[:, :, 1], keys[:, 1]
    ).unsqueeze(2)
    every = every.flatten(2)
    assert torch.allclose(top.score_MHK, every.topk(k).values, rtol=1e-12)
    assert torch.allclose(every.gather(2, top.index_MHK), top.score_MHK, rtol=1e-12)
    assert all(len(set(row.tolist())) == k for row in top.index_MHK.flatten(0, 1))


def test_batch_norm_uses_running_statistics_in_eval():
    module = built(PEER(num_experts=64, num_heads=2, experts_per_head=4, key_dim=8))
    x = tokens(num=6)
    module.eval()
    whole = module(x).y_BTD
    parts = torch.cat([module(x[:, t : t + 1]).y_BTD for t in range(6)], dim=1)
    assert torch.allclose(whole, parts, rtol=0, atol=1e-14)
    before = module.router.norm.running_mean.clone()
    module.train()
    module(x)
    assert not torch.equal(before, module.router.norm.running_mean)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PEER(num_experts=1000), "num_experts=1000 is not a square; use 961 or 1024"),
        (lambda: PEER(num_experts=16, experts_per_head=5), "exceeds sqrt"),
        (lambda: PKM(key_dim=7), "key_dim=7 must be even"),
        (lambda: PEER(query_norm="group"), "query_norm='group' is unknown"),
        (lambda: PEER(num_heads=0), "num_heads=0 must be positive"),
        (lambda: PEER(activation="tanh"), "activation='tanh' is unknown"),
        (lambda: MoE(router="random"), "router='random' is unknown"),
        (lambda: MoE(num_experts=2, top_k=3), "top_k=3 exceeds num_experts=2"),
        (lambda: Dense(ratio=0), "ratio=0 must be at least 1"),
    ],
)
def test_impossible_layers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match="num_experts=10") as caught:
        PEER(num_experts=10, key_dim=3, query_norm="x", activation="y")
    assert len(str(caught.value).splitlines()) == 4


def test_balance_loss_is_lowest_when_balanced():
    module = built(MoE(num_experts=4, router="token_choice", balance_loss=1.0))
    even = torch.full((8, 4), 0.25, dtype=torch.float64)
    choices = torch.arange(8)[:, None] % 4
    assert float(module._balance_loss(even, choices)) == pytest.approx(1.0)
    skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 8).double()
    assert float(module._balance_loss(skewed, torch.zeros_like(choices))) == pytest.approx(2.8)
