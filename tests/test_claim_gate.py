"""A claim passes only where every condition holds: each is broken in turn, and named."""

import re
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest

from analysis.claims import MoreSeeds, Protocol, Statistics, statistics
from analysis.compare_text import claims_table, comparison_table, report
from analysis.conditions import Condition, Status, both
from analysis.difference import Difference, Source
from analysis.equal_cost import View
from analysis.gaps import Pair
from analysis.load import AnalysisError, load_runs
from analysis.verdicts import compare_study
from compared import BUDGETS, CONVENTIONS, WIDTHS, changed, extended, study
from conftest import ROOT

FRAME, TUNING = study()
PAIR = Pair("peer", "dense", BUDGETS[0])
C = BUDGETS[0]


def first_claim(frame, tuning=TUNING, view=View.FLOPS):
    return compare_study(frame, tuning=tuning).claims[view][0]


@pytest.fixture(scope="module")
def sound():
    return compare_study(FRAME, tuning=TUNING)


def test_a_claim_that_holds_is_made_at_every_equality(sound):
    for view in View:
        for claim in sound.claims[view]:
            assert claim.missing == {}
            assert claim.verdict == f"peer beats dense at {claim.pair.budget:.1e}".replace(
                "e+", "e"
            ).replace(".0e", "e")
    assert "9 claims shown" in report(sound)
    assert "Nothing is missing." in report(sound)


def flipped(column, value, **where):
    return lambda: (changed(FRAME, column, value, **where), TUNING)


def with_rates(**more):
    extra = changed(TUNING, "loss", lambda loss: loss - 0.1, lr=0.02, budget=C)
    return FRAME, extra


FLIPS = {
    "learning_rates_interior": with_rates,
    "equal_tuning": lambda: (FRAME, extended(TUNING, lr=0.04, loss=9.0)),
    "flops_realised": flipped("flops", lambda flops: flops * 1.0051, budget=C, size="x1.0"),
    "no_divergence": lambda: (extended(FRAME, status="diverged", loss=np.nan), TUNING),
    "causal": flipped("causal", None),
    "dropless": flipped("dropless", None),
    "same_winner": flipped("flops_6n_total", lambda flops: 2 * flops),
    "one_epoch": flipped("epochs", 1.5, size="x4.0", budget=C),
}


@pytest.mark.parametrize("name", FLIPS)
def test_one_condition_that_does_not_hold_is_enough(name):
    claim = first_claim(*FLIPS[name]())
    assert list(claim.missing) == [name]
    assert not claim.beats
    assert claim.verdict == f"not shown: {name}"
    assert claim.numbers_show


def test_a_law_that_misses_a_budget_left_out():
    off = FRAME.copy()
    off.loc[off["budget"] == BUDGETS[2], "loss"] += 0.3
    claim = first_claim(off)
    assert list(claim.missing) == ["held_out_error"]
    assert claim.missing["held_out_error"].status is Status.NOT_MET


def test_two_budgets_cannot_test_a_law():
    few = FRAME.loc[FRAME["budget"] < BUDGETS[2]]
    found = first_claim(few, TUNING.loc[TUNING["budget"] < BUDGETS[2]]).missing
    assert [found[name].status for name in found] == [Status.UNKNOWN]
    (own, _) = found["held_out_error"].parts
    assert own.settle[0].num_runs == 5 * len(WIDTHS)
    assert own.settle[0].flops == 4 * BUDGETS[1] * 5 * len(WIDTHS)
    assert "variant=dense budget=1.6e19 size=x0.25," in own.settle[0].command


def test_a_minimum_at_the_edge_shows_nothing():
    cut = FRAME.loc[(FRAME["variant"] != "peer") | ~FRAME["size"].isin(["x1.6", "x2.5", "x4.0"])]
    claim = first_claim(cut)
    assert {"optima_interior", *(f.name for f in fields(Statistics))} <= set(claim.missing)
    assert "peer: edge" in claim.missing["optima_interior"].evidence
    assert claim.winner is None


@pytest.mark.parametrize(
    ("sizes", "num_runs", "reason"),
    [
        (WIDTHS[:4], 2 * 5, "train two sizes above x1.0"),
        (WIDTHS[2:4], 2 * 5, "2 sizes, 4 are needed"),
    ],
)
def test_a_minimum_that_is_missing_names_its_runs(sizes, num_runs, reason):
    names = [f"x{width}" for width in sizes]
    cut = FRAME.loc[(FRAME["variant"] != "peer") | FRAME["size"].isin(names)]
    (step,) = first_claim(cut).missing["optima_interior"].settle
    assert reason in step.what
    assert (step.num_runs, step.flops) == (num_runs, num_runs * C)
    assert step.command == (
        "peer-train --config-name made variant=peer budget=1e18 size=<their names>"
    )


def test_one_learning_rate_per_size_says_nothing_of_the_tuning():
    claim = first_claim(FRAME, None)
    assert list(claim.missing) == ["learning_rates_interior", "equal_tuning"]
    assert claim.missing["learning_rates_interior"].status is Status.UNKNOWN
    (step, _) = claim.missing["learning_rates_interior"].parts[0].settle
    assert step.command == (
        "peer-train --config-name made variant=dense size=x1.0 budget=1e18 seed=0 optim.lr=0.005 "
        "study=made_lr0.005"
    )
    assert (step.num_runs, step.flops) == (1, 1e18)


def test_learning_rates_of_another_model_under_the_same_label_are_no_evidence():
    other = changed(TUNING, "num_params_total", lambda params: params + 1)
    assert list(first_claim(FRAME, other).missing) == ["learning_rates_interior", "equal_tuning"]


def test_nothing_is_claimed_of_identical_variants():
    same, tried = study(gap=0.0)
    for claims in compare_study(same, tuning=tried).claims.values():
        for claim in claims:
            assert {"gap_exceeds_mde", "interval_excludes_zero"} <= set(claim.missing)
            assert "paired_seeds" not in claim.missing


def test_learning_rates_are_compared_over_the_seeds_that_all_have():
    """Seed 4 alone was tried at the others; that it is lucky must not count for these."""
    lucky = TUNING.assign(loss=TUNING["loss"] - 0.5 * (TUNING["seed"] == 4))
    assert first_claim(FRAME, lucky).beats


def test_a_run_that_diverged_bounds_the_learning_rate():
    hot = TUNING["lr"] == 0.02
    burnt = TUNING.assign(
        loss=TUNING["loss"].mask(hot), status=TUNING["status"].mask(hot, "diverged")
    )
    assert first_claim(FRAME, burnt).beats


def test_divergence_far_from_the_minimum_is_no_obstacle():
    far = extended(FRAME, status="diverged", loss=np.nan, size="x4.0", num_params_total=np.nan)
    assert first_claim(far).beats


def test_divergence_of_unknown_size_is_unknown():
    odd = extended(FRAME, status="diverged", loss=np.nan, size="odd", num_params_total=np.nan)
    assert first_claim(odd).missing["no_divergence"].status is Status.UNKNOWN


def test_what_is_not_causal_is_never_ranked_and_not_in_holms_family():
    found = compare_study(changed(FRAME, "causal", False), tuning=TUNING)
    assert all(not claim.ranked and not claim.beats for claim in found.claims[View.FLOPS])
    assert found.num_tests(View.FLOPS) == 0
    verdict = found.claims[View.FLOPS][0].verdict
    assert verdict == "not ranked: peer is not causal: its loss is for reference"


def test_seeds_that_are_not_shared():
    claim = first_claim(changed(FRAME, "seed", lambda seed: seed + 100))
    assert list(claim.missing) == ["paired_seeds"]
    assert claim.missing["paired_seeds"].evidence.startswith("0 shared seeds, 3 are needed")
    (step,) = claim.missing["paired_seeds"].settle
    assert step.what == "3 more shared seeds"
    assert step.num_runs == 3 * 2 * len(WIDTHS)
    assert step.flops == step.num_runs * C
    assert step.command.endswith("variant=dense,peer budget=1e18 seed=105,106,107")


@pytest.mark.parametrize(
    ("t", "num_tests", "missing"),
    [
        (5.0, 1, []),
        (2.9, 1, ["gap_exceeds_mde"]),
        (4.5, 1, []),
        (4.5, 2, ["gap_exceeds_mde"]),
        (4.5, 30, ["gap_exceeds_mde", "interval_excludes_zero"]),
        (1.0, 1, ["gap_exceeds_mde", "interval_excludes_zero"]),
    ],
)
def test_the_numbers_must_exceed_the_mde_and_survive_holm(t, num_tests, missing):
    difference = Difference(0.001 * t, 0.001, 4.0, Source.SEEDS, 5, "")
    more = MoreSeeds("made", PAIR, (C,), 14, 14 * C, 5)
    p_holm = min(1.0, num_tests * difference.p_value)
    found = statistics(difference, p_holm, num_tests, more)
    assert list(found.missing()) == missing
    for condition in found.missing().values():
        (step,) = condition.settle
        assert step.num_runs > 0
        assert step.flops == step.num_runs * C


def test_of_both_the_worst_counts():
    met, not_met, unknown = (Condition(status, str(status)) for status in Status)
    assert both([met, unknown]).status is Status.UNKNOWN
    assert both([unknown, not_met]).status is Status.NOT_MET
    assert both([met, met]).met


def test_every_condition_is_a_field_and_a_row(sound):
    names = {field.name for kind in (Statistics, Protocol) for field in fields(kind)}
    table = claims_table(sound)
    assert len(names) == 13
    assert set(table["condition"]) == names
    assert len(table) == len(names) * len(View) * len(BUDGETS)
    assert set(table["status"]) == {"met"}


def test_conventions_that_change_the_winner_are_named():
    both_ways = changed(FRAME, list(CONVENTIONS[1:3]), lambda flops: 2 * flops)
    evidence = first_claim(both_ways).missing["same_winner"].evidence
    names = "flops_6n_active, flops_6n_total"
    assert evidence == f"convention-dependent: peer, but dense by {names}"
    missing = first_claim(changed(FRAME, CONVENTIONS[0], np.nan)).missing["same_winner"]
    assert missing.status is Status.UNKNOWN
    assert "105 of 210 runs have no flops_chinchilla" in missing.evidence


def test_nothing_is_shown_by_the_committed_study():
    found = compare_study(load_runs(ROOT / "docs" / "figures" / "isoflop_laptop"))
    table = comparison_table(found)
    assert len(table) == 6 * 3
    verdicts = pd.concat([table[name] for name in table if name.startswith("verdict")])
    assert all(re.match(r"not (shown|ranked): ", verdict) for verdict in verdicts)
    assert "paired_seeds, learning_rates_interior, equal_tuning" in " ".join(verdicts)
    assert "0 claims shown" in report(found)


def test_a_baseline_that_is_not_there():
    with pytest.raises(
        AnalysisError, match="--baseline x: no such variant; choose one of dense, p"
    ):
        compare_study(FRAME, baseline="x")
    with pytest.raises(AnalysisError, match="one variant, dense: nothing to compare"):
        compare_study(FRAME.loc[FRAME["variant"] == "dense"])


def test_another_baseline_turns_the_pairs_round(sound):
    turned = compare_study(FRAME, baseline="peer", tuning=TUNING)
    for a, b in zip(sound.claims[View.FLOPS], turned.claims[View.FLOPS], strict=True):
        assert b.pair == replace(a.pair, variant="dense", reference="peer")
        assert b.difference.nats == pytest.approx(-a.difference.nats, abs=1e-15)
        assert b.verdict == a.verdict
