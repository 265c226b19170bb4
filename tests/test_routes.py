"""Expert choice told honestly: its groups, its causal routes, and what they leave as it was."""

import copy

import pytest
import torch

import reference
from peer_scaling.ffw.base import CALIBRATION, THRESHOLD, Routing
from peer_scaling.ffw.moe import MoE, MoEFFW
from peer_scaling.model import DecoderConfig, build_model
from peer_scaling.parallel import Losses
from peer_scaling.planned import plan_run
from peer_scaling.prepare import prepare
from peer_scaling.routes import causal_losses, expert_cutoffs
from peer_scaling.train import run_once
from planned_runs import make_planned, make_run

B, T, D, E = 4, 8, 6, 4


def layer(**numbers):
    config = MoE(num_experts=E, **numbers)
    return config.build(D, generator=torch.Generator().manual_seed(3)).double()


def some_x(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D, dtype=torch.float64, generator=generator)


def no_autocast():
    return torch.autocast("cpu", enabled=False)


def by_groups(x, module, group):
    """Each group alone through the definition of expert choice."""
    if group == "batch":
        return reference.expert_choice(x.flatten(0, 1), module).view_as(x)
    if group == "sequence":
        return torch.stack([reference.expert_choice(row, module) for row in x])
    return by_groups(x.transpose(0, 1), module, "sequence").transpose(0, 1)


@pytest.mark.parametrize("capacity_factor", [1.0, 2.0])
@pytest.mark.parametrize("group", ["batch", "sequence", "position"])
def test_groups_equal_the_definition_forward_and_backward(group, capacity_factor):
    module = layer(group=group, capacity_factor=capacity_factor)
    results = []
    for function in (lambda x: module(x).y_BTD, lambda x: by_groups(x, module, group)):
        module.zero_grad()
        x = some_x().requires_grad_()
        y = function(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y, x.grad, *(p.grad.clone() for p in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert reference.relative_error(ours, theirs) < 1e-10


def test_groups_decide_what_a_token_depends_on():
    """Others of the batch: not by sequence. Its own future: not by position."""
    depends = {}
    for group in ("batch", "sequence", "position"):
        module, x = layer(group=group), some_x()
        y, on_others, on_later = module(x).y_BTD, False, False
        for seed in range(2, 7):
            others = torch.cat([x[:1], some_x(seed)[1:]])
            later = torch.cat([x[:, :5], some_x(seed)[:, 5:]], 1)
            on_others |= not torch.equal(module(others).y_BTD[0], y[0])
            on_later |= not torch.equal(module(later).y_BTD[:, :5], y[:, :5])
        depends[group] = (on_others, on_later)
        assert module.config.batch_coupled == on_others
        assert not module.config.causal
    assert depends == {"batch": (True, True), "sequence": (False, True), "position": (True, False)}


@pytest.mark.parametrize("route", ["threshold", "top1"])
def test_causal_routes_equal_their_definitions(route):
    module, x = layer(), some_x()
    cutoff_E = torch.tensor([0.1, 0.3, 0.25, 2.0])  # nothing reaches the last one
    module.take_route(route, cutoff_E)
    rows = []
    for token in x.flatten(0, 1):
        score_E = torch.softmax(module.router_ED @ token, 0)
        taken = score_E >= cutoff_E if route == "threshold" else score_E == score_E.max()
        outs = [torch.zeros_like(token)]
        for e in taken.nonzero().flatten().tolist():
            hidden = torch.nn.functional.gelu(module.in_EFD[e] @ token)
            outs.append(score_E[e] * module.out_EDF[e] @ hidden)
        rows.append(torch.stack(outs).sum(0))
    y = module(x).y_BTD.flatten(0, 1)
    assert reference.relative_error(y, torch.stack(rows)) < 1e-10


@pytest.mark.parametrize("route", ["threshold", "top1"])
def test_causal_routes_see_neither_later_tokens_nor_other_sequences(route):
    config = DecoderConfig(d_model=16, num_layers=2, num_heads=2)
    model = build_model(config, MoE(num_experts=8), 50, 32, 0).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (3, 32), generator=generator)
    other = torch.randint(50, (3, 32), generator=generator)
    model.swapped.take_route(route, torch.full((8,), 0.13))
    with torch.no_grad():
        logits = model(tokens).logits_BTV
        for p in (1, 7, 15, 30):
            changed = torch.cat([tokens[:, : p + 1], other[:, p + 1 :]], 1)
            assert torch.equal(model(changed).logits_BTV[:, : p + 1], logits[:, : p + 1])
        changed = torch.cat([tokens[:1], other[1:]])
        assert torch.equal(model(changed).logits_BTV[0], logits[0])
        assert torch.equal(model(tokens.flip(0)).logits_BTV.flip(0), logits)
        assert not torch.equal(model(other).logits_BTV, logits)


def test_cutoffs_are_the_mean_of_the_least_scores_taken():
    config = DecoderConfig(d_model=16, num_layers=2, num_heads=2)
    model = build_model(config, MoE(num_experts=4, group="sequence"), 50, 32, 0)
    generator = torch.Generator().manual_seed(0)
    passes = [torch.randint(50, (3, 33), generator=generator) for _ in range(5)]
    before = copy.deepcopy(model.state_dict())
    model.train()
    cutoff_N = expert_cutoffs(
        model.swapped, Losses(model), passes, torch.device("cpu"), no_autocast()
    )
    assert model.training
    expected = []
    with torch.no_grad():
        for tokens in passes:
            model.swapped.take_route(CALIBRATION)
            stats = model(tokens[:, :-1]).stats
            taken = [stats.weight[stats.expert == e] for e in range(4)]
            assert {len(scores) for scores in taken} == {3 * 32 // 4}
            expected.append(torch.stack([scores.min() for scores in taken]))
    assert torch.allclose(cutoff_N, torch.stack(expected).mean(0), rtol=1e-6)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_with_the_pass_s_own_cutoffs_threshold_is_expert_choice():
    module, x = layer(), some_x()
    chosen = module(x)
    stats: Routing = chosen.stats
    least = [stats.weight[stats.expert == e].min() for e in range(E)]
    module.take_route(THRESHOLD, torch.stack(least))
    assert reference.relative_error(module(x).y_BTD, chosen.y_BTD) < 1e-12


def test_the_layer_routes_as_in_training_again_whatever_happens():
    module, x = layer(), some_x()
    before = module(x).y_BTD

    def fails():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        causal_losses(module, module.config, fails, lambda: torch.zeros(E))
    assert torch.equal(module(x).y_BTD, before)


def test_a_run_records_the_causal_losses_of_expert_choice_alone(tmp_path):
    moe = run_once(make_planned(tmp_path, "ffw.num_experts=4", ffw="moe"))
    assert moe.causal is False
    assert list(moe.causal_losses) == ["threshold", "top1"]
    assert all(abs(x - moe.loss) < 0.5 for x in moe.causal_losses.values())
    chosen = ("ffw.num_experts=4", "ffw.router=token_choice")
    for record in (
        run_once(make_planned(tmp_path, *chosen, ffw="moe")),
        run_once(make_planned(tmp_path, ffw="dense")),
    ):
        assert record.causal is True
        assert record.causal_losses == {}


def test_usage_grows_with_the_tokens(tmp_path):
    record = run_once(make_planned(tmp_path, ffw="peer"))
    growth = {int(tokens): share for tokens, share in record.expert_usage_growth.items()}
    assert list(growth) == sorted(growth)
    assert list(growth.values()) == sorted(growth.values())
    assert growth[record.val_tokens] == record.expert_usage
    assert len(growth) >= 2


def test_a_group_is_part_of_the_identity_only_where_it_was_not_the_one_way(tmp_path):
    def identity(*overrides):
        run = make_run(tmp_path, "ffw.num_experts=4", *overrides, ffw="moe")
        return plan_run(run, prepare(run.data)).identity, run.ffw_settings

    usual, settings = identity()
    assert "group" not in settings
    assert identity("ffw.group=batch")[0] == usual
    other, settings = identity("ffw.group=sequence")
    assert other != usual
    assert settings["group"] == "sequence"
    assert identity("ffw.capacity_factor=2")[0] not in (usual, other)


def test_a_causal_route_that_leaks_makes_the_run_invalid(tmp_path, monkeypatch):
    """Here `top1` goes on choosing among all tokens: the record must not be ranked by it."""
    take = MoEFFW.take_route

    def forgets(self, route, cutoff_N=None):
        take(self, None if route == "top1" else route, cutoff_N)

    planned = make_planned(tmp_path, "ffw.num_experts=4", ffw="moe")
    monkeypatch.setattr(MoEFFW, "take_route", forgets)
    record = run_once(planned)
    assert record.status == "invalid"
    assert record.reason.startswith("leak: ")
