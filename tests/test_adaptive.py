"""Sizes that a study chooses itself: what is asked for, in which order, and why it ends."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from choosing import BUDGETS, CONFIG, SIZES, VARIANTS, Oracle, candidates, of, study
from peer_scaling.adaptive import decide
from peer_scaling.candidates import Action, Adaptive, Decision, Observation
from peer_scaling.errors import UserError


def by_decide(oracle, config=CONFIG, given_candidates=None):
    """The same through `decide`, as a sweeper does."""
    seen, decided = [], []
    while True:
        now = decide(config, given_candidates or candidates(), seen)
        decided += now
        keys = [d.key for d in now if d.key]
        if not keys:
            return decided
        seen += [oracle(key) for key in keys]


def test_decide_round_by_round_is_the_replay():
    assert by_decide(Oracle()) == study(Oracle())


def test_runs_that_were_not_asked_for_change_nothing():
    asked = {d.key for d in study(Oracle()) if d.key}
    keys = [(v, b, s, 0) for v in VARIANTS for b in BUDGETS for s in SIZES]
    others = [Observation(*key, 0.1) for key in keys if key not in asked]
    assert len(others) > 50
    assert decide(CONFIG, candidates(), others) == decide(CONFIG, candidates(), [])


def test_the_first_ladder_is_around_the_rule_and_the_next_around_what_was_found():
    decisions = study(Oracle(at=2.0))
    start = {
        b: [d for d in of(decisions, Action.START) if d.budget == b and d.variant == "dense"]
        for b in BUDGETS
    }
    assert [len(own) for own in start.values()] == [4, 4]

    def middle(budget):
        return sum(math.log(1e5 * 1.3 ** int(d.size[1:])) for d in start[budget]) / 4

    assert middle(1e15) == pytest.approx(0.5 * math.log(1e15 / 6 / 20), abs=0.2)
    assert "20 tokens per parameter" in start[1e15][0].reason
    assert middle(4e15) == pytest.approx(Oracle(at=2.0).log_N("dense", 4e15), abs=0.25)
    said = start[4e15][0].reason
    assert "as at the minima of 1e15" in said
    assert float(said.split(", ")[1].split()[0]) == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize(("at", "side"), [(0.4, "largest"), (900.0, "smallest")])
def test_a_minimum_at_an_end_is_looked_for_beyond(at, side):
    decisions = study(Oracle(at=at))
    extended = [
        d for d in of(decisions, Action.EXTEND) if d.budget == 1e15 and d.variant == "dense"
    ]
    started = [
        int(d.size[1:])
        for d in of(decisions, Action.START)
        if d.budget == 1e15 and d.variant == "dense"
    ]
    assert extended
    for d in extended:
        beyond = (
            int(d.size[1:]) > max(started) if side == "largest" else int(d.size[1:]) < min(started)
        )
        assert beyond
        assert f"at the {side} size tried" in d.reason
    stop = next(d for d in of(decisions, Action.STOP) if (d.variant, d.budget) == ("dense", 1e15))
    assert stop.reason.startswith("targets met: N* ")
    found = float(stop.reason.split("N* ")[1].split()[0])
    assert math.log(found) == pytest.approx(Oracle(at=at).log_N("dense", 1e15), abs=0.15)


@pytest.mark.parametrize(("at", "side", "end"), [(1e-3, "largest", "d29"), (3e6, "smallest", "d0")])
def test_a_ladder_that_ends_before_the_minimum_is_said(at, side, end):
    decisions = study(Oracle(at=at))
    for d in of(decisions, Action.STOP):
        assert f"at the {side} size tried, {end}" in d.reason
        assert f"no other can be trained: add {side} sizes" in d.reason


def test_sizes_that_cannot_be_trained_end_a_ladder_too():
    above = {(v, b, s) for v in VARIANTS for b in BUDGETS for s in SIZES[14:]}
    decisions = study(Oracle(at=1.0), given_candidates=candidates(above))
    assert all("at the largest size tried, d13" in d.reason for d in of(decisions, Action.STOP))


def test_a_budget_with_too_few_sizes_is_left_out_for_all():
    few = {("peer", 4e15, s) for s in SIZES[3:]}
    decisions = study(Oracle(), given_candidates=candidates(few))
    assert {d.budget for d in decisions if d.key} == {1e15}
    said = [d for d in of(decisions, Action.DROP) if d.size is None and d.budget == 4e15]
    assert [d.variant for d in said] == ["dense", "peer"]
    assert "peer 3; a curve needs 4: left out for all variants" in said[0].reason


def test_targets_are_met_or_the_allowance_is_spent():
    met = study(Oracle(), replace(CONFIG, ladders=20.0))
    assert all(d.reason.startswith("targets met: ") for d in of(met, Action.STOP))
    spent = study(Oracle(noise=0.03), replace(CONFIG, target_loss=0.001, allowance=1.3e17))
    assert all(
        "of the allowance of 1.3e+17 FLOPs are spent" in d.reason for d in of(spent, Action.STOP)
    )
    assert 1.2e17 < sum(d.budget for d in spent if d.key) <= 1.3e17


def test_an_allowance_below_the_first_ladder_starts_nothing():
    decisions = study(Oracle(), replace(CONFIG, allowance=1e15))
    assert {d.action for d in decisions} == {Action.STOP}
    assert all(d.reason.startswith("not started: 0 of the allowance of 1e+15") for d in decisions)


def test_tighter_targets_and_more_noise_cost_more():
    def cost(noise, **own):
        return sum(
            d.budget
            for d in study(Oracle(noise=noise), replace(CONFIG, ladders=20.0, **own))
            if d.key
        )

    assert cost(0.004) < cost(0.02)
    assert cost(0.01, target_loss=0.02, target_size=0.3) < cost(0.01, target_loss=0.004)


def test_seeds_run_out():
    config = replace(CONFIG, sizes=SIZES[9:15], max_seeds=1, target_loss=1e-6, ladders=20.0)
    decisions = study(Oracle(), config, candidates(sizes=SIZES[9:15], budgets=(1e15,)))
    assert len([d for d in decisions if d.key]) == 6 * len(VARIANTS)
    assert not of(decisions, Action.REPEAT)


def test_no_variant_goes_on_where_another_one_has_no_run_left():
    four = {("peer", 1e15, s) for s in SIZES if s not in ("d9", "d13", "d17", "d21")}
    config = replace(CONFIG, max_seeds=1, target_loss=1e-6, ladders=20.0)
    decisions = study(Oracle(), config, candidates(four, budgets=(1e15,)))
    assert Counter(d.variant for d in decisions if d.key) == {"dense": 4, "peer": 4}
    dense = next(d for d in of(decisions, Action.STOP) if d.variant == "dense")
    assert dense.reason.startswith("no run is left for peer: raise max_seeds or add sizes; N* ")


def test_a_size_that_diverged_is_not_run_again_and_the_curve_does_without():
    first = study(Oracle())
    worst = next(d.size for d in of(first, Action.START) if d.budget == 1e15)
    decisions = study(Oracle(failing=[worst]))
    seen = Counter((d.variant, d.budget) for d in decisions if d.size == worst and d.key)
    assert max(seen.values()) == 1
    assert all(d.reason.startswith("targets met: ") for d in of(decisions, Action.STOP))


def test_a_study_where_everything_diverges_ends():
    decisions = study(Oracle(failing=SIZES))
    assert {d.action for d in decisions if d.key} == {Action.START, Action.EXTEND}
    assert all("0 sizes with a loss" in d.reason for d in of(decisions, Action.STOP))


def test_far_sizes_are_left_out_by_name():
    config = replace(CONFIG, reach=3.0)
    said = [d for d in of(study(Oracle(), config), Action.DROP) if d.size is None]
    assert Counter((d.variant, d.budget) for d in said) == Counter(
        (v, b) for v in VARIANTS for b in BUDGETS
    )
    assert "d0, d1, " in said[0].reason
    assert "more than a factor of 3 from N*" in said[0].reason


def test_lines_read_back_as_the_decisions():
    decisions = study(Oracle())
    lines = [d.line() for d in decisions]
    assert all(line.endswith("}\n") and line.count("\n") == 1 for line in lines)
    assert [Decision(**json.loads(line)) for line in lines] == decisions


def test_candidates_must_be_those_of_one_study():
    own = candidates()
    with pytest.raises(UserError) as caught:
        decide(CONFIG, [*own[1:], own[5]], [])
    assert caught.value.problems == (
        "dense d5 at 1e15: two candidates; give one",
        "dense at 1e15: no candidate for d0",
    )
    with pytest.raises(UserError, match="no candidates"):
        decide(CONFIG, [], [])


def test_all_problems_of_a_configuration_at_once():
    with pytest.raises(ValueError, match="sizes: 2 given") as caught:
        Adaptive(
            ("../a", "c", "c"),
            start=3,
            spacing=1.0,
            target_loss=-1.0,
            allowance=math.inf,
            ladders=0.5,
        )
    assert len(str(caught.value).splitlines()) == 8


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_is_a_number_or_none(loss):
    with pytest.raises(ValueError, match="give None"):
        Observation("dense", 1e15, "d0", 0, loss)
