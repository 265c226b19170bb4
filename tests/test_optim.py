"""Learning-rate rule, schedules, parameter groups."""

from itertools import pairwise

import pytest
import torch

from peer_scaling.ffw.peer import PEER
from peer_scaling.model import DecoderConfig, build_model
from peer_scaling.optim import OptimConfig, lr_factor, make_optimizer, peak_lr, set_lr

STEPS = 500


def factors(**options):
    return [lr_factor(OptimConfig(**options), step, STEPS) for step in range(STEPS)]


def test_cosine_warms_up_and_ends_at_its_final_rate_on_the_last_step():
    values = factors(warmup=0.02)
    assert values[0] == pytest.approx(0.1)
    assert values[9] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(values[9:]))
    middle = 9 + (STEPS - 10) // 2
    assert values[middle] == pytest.approx(0.55)


def test_wsd_is_flat_and_then_linear():
    values = factors(schedule="wsd", decay=0.2, final=0.0)
    assert set(values[10:400]) == {1.0}
    steps = [a - b for a, b in pairwise(values[400:])]
    assert steps == pytest.approx([0.01] * len(steps))
    assert values[-1] == pytest.approx(0.0)


def test_constant_stays():
    assert set(factors(schedule="constant")[10:]) == {1.0}


def test_rule_by_width():
    rule = OptimConfig(lr_max=0.02, lr_scale=0.45)
    assert peak_lr(rule, 8) == 0.02
    assert peak_lr(rule, 450) == pytest.approx(0.001)
    assert peak_lr(OptimConfig(lr=0.3), 450) == 0.3


def test_groups_follow_decay_and_multiplier():
    ffw = PEER(num_experts=64, num_heads=2, experts_per_head=4, key_dim=8, table_lr_multiplier=4.0)
    model = build_model(DecoderConfig(16, 2, 2), ffw, 64, 16, seed=0)
    optimizer = make_optimizer(OptimConfig(weight_decay=0.1), model.optim_groups(), 1e-3)
    by_id = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    set_lr(optimizer, 0.5)
    middle = model.blocks[0].ffw
    for parameter, decay, lr in [
        (middle.up_ND, 0.0, 2e-3),
        (middle.down_ND, 0.0, 2e-3),
        (middle.router.query_QD, 0.1, 5e-4),
        (middle.router.norm.weight, 0.0, 5e-4),
        (model.embedding_VD, 0.0, 5e-4),
        (model.norm.weight, 0.0, 5e-4),
        (model.blocks[1].ffw.in_FD, 0.1, 5e-4),
    ]:
        group = by_id[id(parameter)]
        assert (group["weight_decay"], group["lr"]) == (decay, pytest.approx(lr))


def test_updates_equal_plain_adamw():
    ffw = PEER(num_experts=16, num_heads=1, experts_per_head=2, key_dim=4, table_lr_multiplier=1.0)
    ours = build_model(DecoderConfig(8, 1, 1), ffw, 16, 8, seed=0)
    theirs = build_model(DecoderConfig(8, 1, 1), ffw, 16, 8, seed=0)
    mine = make_optimizer(OptimConfig(weight_decay=0.0), ours.optim_groups(), 1e-2)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, plain)):
            model(tokens).logits_BTV.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "schedule='linear' is unknown"),
        ({"lr": -1.0}, "lr=-1.0 must be positive"),
        ({"warmup": 1.5}, r"warmup=1.5 must be in \[0, 1\)"),
        ({"schedule": "wsd", "warmup": 0.9, "decay": 0.5}, "exceed the run together"),
        ({"final": 2.0}, "final=2.0"),
    ],
)
def test_impossible_optimisers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)
