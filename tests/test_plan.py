"""From budgets to steps, and from studies to cells."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer_scaling.cost import Cost
from peer_scaling.errors import UserError
from peer_scaling.plan import InfeasibleError, Rung, Study, enumerate_cells, make_plan, restrict
from peer_scaling.record import budget_label


def cost_of(flops_per_token):
    return Cost(10, 10, flops_by_component={"all": flops_per_token / 3})


@given(budget=st.floats(1e6, 1e24), flops=st.integers(3, 10**12), tokens=st.integers(1, 2**22))
def test_budgets_are_met_within_half_a_percent_or_refused(budget, flops, tokens):
    try:
        plan = make_plan(budget, cost_of(flops), tokens)
    except InfeasibleError:
        assert budget / (flops * tokens) < 101
        return
    assert abs(plan.flops - budget) <= 0.005 * budget
    assert plan.flops == pytest.approx(plan.tokens * flops, rel=1e-12)
    assert plan.error == pytest.approx(plan.flops / budget - 1)


def test_a_refusal_names_a_budget_that_works():
    with pytest.raises(InfeasibleError, match="use budget=") as caught:
        make_plan(1e6, cost_of(12345), 512)
    suggested = float(str(caught.value).split("use budget=")[1].split()[0])
    assert make_plan(suggested, cost_of(12345), 512).steps >= 100


@pytest.mark.parametrize("budget", [0, -1e9, float("nan"), float("inf")])
def test_budgets_must_be_positive_numbers(budget):
    with pytest.raises(UserError, match="must be a positive number"):
        make_plan(budget, cost_of(10), 1)


@pytest.mark.parametrize(
    ("budget", "label"),
    [(6e18, "6e18"), (2.15e18, "2.15e18"), (1e9, "1e9"), (123, "1.23e2"), (1.8e11, "1.8e11")],
)
def test_budgets_print_short_and_read_back(budget, label):
    assert budget_label(budget) == label
    assert float(label) == budget


@given(st.floats(1.0, 1e25))
def test_budget_labels_are_never_rounded(budget):
    assert float(budget_label(budget)) == budget


STUDY = Study(
    ladder=(Rung(1e9, ("d8_l2", "d16_l2")), Rung(8e9, ("d16_l2", "d32_l2", "d64_l2"))),
    variants={"dense": {}, "peer_16k": {"ffw": "peer", "num_experts": 16384}},
    seeds=(0, 1),
)


def test_cells_are_pairs_and_not_a_product():
    cells = enumerate_cells(STUDY)
    assert len(cells) == (2 + 3) * 2 * 2
    assert {c.size for c in cells if c.budget == 1e9} == {"d8_l2", "d16_l2"}


def test_a_cell_is_a_list_of_overrides():
    cell = enumerate_cells(STUDY)[-1]
    assert cell.overrides() == [
        "ffw=peer", "size=d64_l2", "budget=8e9", "seed=1", "ffw.num_experts=16384", "variant=peer_16k",
    ]  # fmt: skip


def test_the_command_line_restricts_a_study():
    assert set(restrict(STUDY, {"ffw": ("peer",)}).variants) == {"peer_16k"}
    assert set(restrict(STUDY, {"variant": ("peer_16k",)}).variants) == {"peer_16k"}
    small = restrict(STUDY, {"ffw": ("dense",), "budget": ("1e9",), "seed": ("5",)})
    assert [c.overrides() for c in enumerate_cells(small)] == [
        ["ffw=dense", "size=d8_l2", "budget=1e9", "seed=5"],
        ["ffw=dense", "size=d16_l2", "budget=1e9", "seed=5"],
    ]
    extended = restrict(STUDY, {"budget": ("5e9",), "size": ("d24_l2",)})
    assert {c.budget for c in enumerate_cells(extended)} == {5e9}


def test_all_that_a_study_does_not_have_is_named():
    with pytest.raises(UserError) as caught:
        restrict(STUDY, {"ffw": ("pkm",), "variant": ("mlp",), "budget": ("5e9",)})
    assert "variant=mlp: not in this study; choose from dense, peer_16k" in caught.value.problems
    assert "ffw=pkm: not in this study; choose from dense, peer" in caught.value.problems
    assert any("budget=5e9" in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        ({"seed": ("abc",), "budget": ("1e9",)}, "seed=abc: not a number"),
        ({"budget": ("much",)}, "budget=much: not a number"),
        ({"seed": ("0", "0")}, "seed 0 occurs twice"),
        ({"budget": ("1e9", "1e9")}, "budget 1e9 occurs twice"),
        ({"size": ("d8_l2", "d8_l2")}, "size at budget 1e9 d8_l2 occurs twice"),
        ({"ffw": ("peer",), "variant": ("dense",)}, "variants is empty"),
    ],
)
def test_axes_that_make_no_study_are_refused(axes, problem):
    with pytest.raises(UserError) as caught:
        restrict(STUDY, axes)
    assert problem in caught.value.problems


def test_an_empty_study_is_refused():
    with pytest.raises(ValueError, match="variants is empty"):
        Study(ladder=(Rung(1e9, ()), Rung(1e9, ("d8_l2",))), variants={})
