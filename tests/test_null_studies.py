"""The gate on many drawn studies: identical variants, a true gap, and the tests' own sizes."""

from dataclasses import fields

import numpy as np
import pytest
from scipy.special import stdtrit

from analysis.claims import Claim, MoreSeeds, Protocol, statistics
from analysis.conditions import Condition, Status
from analysis.difference import Difference, Source, by_seed, holm, minimum_detectable
from analysis.equal_cost import View
from analysis.gaps import Pair, SeedLosses, paired_difference
from analysis.shapes import Shape
from drawn_surfaces import CHINCHILLA

NUM_STUDIES = 200
SEEDS = 5
BUDGETS = (1e18, 4e18, 16e18)
WIDTHS = np.geomspace(0.25, 4, 7)
SIZES = [f"x{width:.2f}" for width in WIDTHS]
NOISE = 0.002
MET = Protocol(**{field.name: Condition(Status.MET, "given") for field in fields(Protocol)})


def drawn(rng, C, common_S, better=0.0):
    """One variant at one budget: what its seeds share with the other variants' (their data), what
    only its own runs of a seed share (their initialisation), and noise.
    """
    N = CHINCHILLA.best(C) * WIDTHS
    loss_SI = CHINCHILLA.loss(N, C) - better + rng.normal(0, NOISE, (SEEDS, len(N)))
    loss_SI += common_S[:, None] + rng.normal(0, NOISE / 2, (SEEDS, 1))
    losses = {s: dict(zip(SIZES, row, strict=True)) for s, row in enumerate(loss_SI.tolist())}
    return SeedLosses(Shape.CUBIC, dict(zip(SIZES, np.log(N), strict=True)), losses)


def drawn_claims(seed, variants, better=None):
    """Every pair of a study at every budget, through the gate with its protocol given as met."""
    rng = np.random.default_rng(seed)
    found = []
    for C in BUDGETS:
        common_S = rng.normal(0, 2 * NOISE, SEEDS)
        runs = {v: drawn(rng, C, common_S, (better or {}).get(v, 0.0)) for v in variants}
        for i, reference in enumerate(variants):
            for variant in variants[i + 1 :]:
                pair = Pair(variant, reference, C)
                found.append((pair, paired_difference(runs[variant], runs[reference])[0]))
    return gated(found)


def gated(found):
    adjusted = holm([difference.p_value for _, difference in found])
    claims = []
    for (pair, difference), p in zip(found, adjusted, strict=True):
        more = MoreSeeds("made", pair, (pair.budget,), 14, 1.0, SEEDS)
        shown = statistics(difference, p, len(found), more)
        claims.append(Claim(pair, View.FLOPS, difference, p, shown, MET))
    return claims


@pytest.fixture(scope="module", params=["ab", "abc"])
def null_studies(request):
    return [drawn_claims(seed, tuple(request.param)) for seed in range(NUM_STUDIES)]


def test_of_identical_variants_none_beats_another_in_19_of_20_studies(null_studies):
    wrong = [study for study in null_studies if any(claim.beats for claim in study)]
    assert len(wrong) <= 0.05 * NUM_STUDIES


def test_the_uncorrected_test_has_its_size(null_studies):
    """Else the count above says nothing: a plain test at 5 % finds 5 % of the gaps, and one in far
    more than 5 % of the studies.
    """
    p = np.array([[claim.difference.p_value for claim in study] for study in null_studies])
    assert 0.035 <= (p <= 0.05).mean() <= 0.065
    assert (p <= 0.05).any(axis=1).mean() > 0.1


def test_the_interval_holds_the_true_gap(null_studies):
    inside = [c.difference.low <= 0 <= c.difference.high for study in null_studies for c in study]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_a_gap_of_twice_the_minimum_detectable_is_shown(null_studies):
    stderr = np.sqrt(np.mean([c.difference.stderr**2 for study in null_studies for c in study]))
    gap = 2 * minimum_detectable(stderr, SEEDS - 1)
    shown, wrong = [], 0
    for seed in range(60):
        claims = drawn_claims(1000 + seed, ("a", "b"), {"b": gap})
        shown += [claim.beats for claim in claims]
        wrong += sum(claim.beats and claim.winner != "b" for claim in claims)
    assert np.mean(shown) > 0.8
    assert wrong == 0


@pytest.mark.parametrize("num_seeds", [3, 5, 20])
def test_the_minimum_detectable_gap_is_found_in_80_of_100_draws(num_seeds):
    rng, num, sd = np.random.default_rng(0), 20_000, 0.004
    gap = minimum_detectable(sd / np.sqrt(num_seeds), num_seeds - 1)
    drawn_RS = rng.normal(gap, sd, (num, num_seeds))
    t_R = drawn_RS.mean(axis=1) / (drawn_RS.std(axis=1, ddof=1) / np.sqrt(num_seeds))
    found = np.abs(t_R) > stdtrit(num_seeds - 1, 0.975)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_the_minimum_detectable_gap_of_many_seeds_is_the_textbooks():
    assert minimum_detectable(1.0, 1e6) == pytest.approx(1.959964 + 0.841621, abs=1e-4)
    assert np.isnan(minimum_detectable(float("nan"), 0.0))


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, none below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    with_gap = holm([0.01, float("nan"), 0.02])
    assert with_gap[::2] == pytest.approx([0.02, 0.02])
    assert np.isnan(with_gap[1])
    assert holm([]) == []


def test_so_many_seeds_settle_a_gap_and_one_less_does_not():
    difference = Difference(0.01, 0.006, 4.0, Source.SEEDS, 5, "")
    needed = difference.seeds_needed(0.05 / 9)
    assert needed is not None
    for num, enough in ((needed, True), (needed - 1, False)):
        stderr = 0.006 * np.sqrt(5 / num)
        assert (minimum_detectable(stderr, num - 1.0, 0.05 / 9) < 0.01) == enough
    assert Difference(1e-5, 0.006, 4.0, Source.SEEDS, 5, "").seeds_needed(0.05) is None


def test_seeds_that_are_copies_of_one_another_are_no_evidence():
    assert by_seed(np.full(5, 0.1)) is None
    assert by_seed(np.array([0.1, 0.11])) is None
    assert by_seed(np.array([0.1, 0.11, 0.12])).dof == 2
