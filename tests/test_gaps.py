"""Loss gaps: paired over seeds where three are shared, from the profiles' errors otherwise."""

import numpy as np
import pytest

from analysis.compare import compute_multiplier
from analysis.difference import Source
from analysis.gaps import SeedLosses, find_gaps, find_pairs, paired_difference
from analysis.isoflop import fit_isoflop
from analysis.shapes import Shape
from compared import BUDGETS, changed, study
from drawn_surfaces import CHINCHILLA
from surfaces import known, runs

FRAME, _ = study(seeds=4)


def gaps_of(frame, **options):
    return find_gaps(fit_isoflop(frame), frame, **options)


def with_levels(frame, level):
    """What the runs of a seed share, in both variants."""
    return frame.assign(loss=frame["loss"] + level * np.array(frame["seed"], dtype=float))


def test_what_the_runs_of_a_seed_share_cancels():
    plain, shifted = gaps_of(FRAME), gaps_of(with_levels(FRAME, 0.5))
    for a, b in zip(plain, shifted, strict=True):
        assert a.difference.source is b.difference.source is Source.SEEDS
        assert (a.difference.num_seeds, a.difference.dof) == (4, 3)
        assert b.difference.nats == pytest.approx(a.difference.nats, abs=1e-4)
        assert b.difference.stderr == pytest.approx(a.difference.stderr, rel=0.2)
        assert a.difference.low < 0.05 < a.difference.high


def test_what_one_variant_shares_alone_is_part_of_the_error():
    """The errors of the profiles do not hold it: seeds that differ in one variant only."""
    alone = FRAME.copy()
    own = (alone["variant"] == "peer").to_numpy()
    alone.loc[own, "loss"] += 0.02 * np.array(alone.loc[own, "seed"], dtype=float)
    for gap in gaps_of(alone):
        assert gap.difference.stderr == pytest.approx(0.02 * np.std(range(4), ddof=1) / 2, rel=0.1)


def test_two_seeds_are_compared_by_the_errors_of_the_profiles():
    few = FRAME.loc[FRAME["seed"].isin([0, 1])]
    fit = fit_isoflop(few)
    gap = find_gaps(fit, few)[0].difference
    own, base = (fit.profile(name, BUDGETS[0]) for name in ("peer", "dense"))
    assert gap.source is Source.PROFILES
    assert gap.nats == base.loss - own.loss
    assert gap.stderr == pytest.approx(np.hypot(own.loss_stderr, base.loss_stderr))
    assert min(own.dof, base.dof) <= gap.dof <= own.dof + base.dof
    assert gap.note == "2 shared seeds, 3 are needed for differences by seed"


def test_seeds_that_differ_between_variants_do_not_cancel():
    apart = changed(with_levels(FRAME, 0.01), "seed", lambda seed: seed + 10)
    together = FRAME.loc[FRAME["seed"].isin([0, 1])]
    gap = gaps_of(apart)[0].difference
    assert (gap.source, gap.num_seeds) == (Source.PROFILES, 0)
    assert gap.stderr > 3 * gaps_of(together)[0].difference.stderr


def test_a_seed_without_a_minimum_is_left_out_and_named():
    odd = FRAME.copy()
    own = (odd["variant"] == "peer") & (odd["seed"] == 3) & (odd["budget"] == BUDGETS[0])
    odd = odd.loc[~(own & ~odd["size"].isin(["x0.25", "x0.4", "x0.63", "x1.0"]))]
    gap = gaps_of(odd)[0].difference
    assert (gap.source, gap.num_seeds) == (Source.SEEDS, 3)
    assert gap.note == "over each variant's own sizes; no minimum of its own: seeds 3"


def test_ladders_of_other_sizes_are_compared_over_their_own():
    names = changed(FRAME, "size", lambda size: size + "_wide")
    for a, b in zip(gaps_of(FRAME), gaps_of(names), strict=True):
        assert b.difference.nats == pytest.approx(a.difference.nats, abs=1e-12)
        assert b.difference.note == "over each variant's own sizes"


def test_the_minimum_of_a_seed_is_that_of_its_curve():
    x = np.log([0.25, 0.5, 1.0, 2.0, 4.0])
    sizes = list("abcde")
    losses = {s: dict(zip(sizes, 3 + s + 0.1 * (x - 0.2) ** 2, strict=True)) for s in (0, 1)}
    del losses[1]["a"]
    own = SeedLosses(Shape.PARABOLA, dict(zip(sizes, x, strict=True)), losses)
    assert own.minima([0, 1], sizes) == pytest.approx([3.0, 4.0])
    assert np.isnan(own.minima([0, 1], "abc")).all()


def test_without_a_minimum_there_is_no_gap():
    frame = FRAME.loc[(FRAME["variant"] != "peer") | FRAME["size"].isin(["x0.25", "x0.4", "x0.63"])]
    assert [gap.difference for gap in gaps_of(frame)] == [None] * 3
    assert gaps_of(frame)[0].reason == "no minimum (peer: too few sizes)"


def test_every_two_variants_are_a_pair_at_every_budget():
    fit = fit_isoflop(runs(known, variants=("dense", "moe", "pkm"), seeds=2, noise=0.01))
    pairs = find_pairs(fit, "pkm")
    assert len(pairs) == 3 * 3
    assert [(p.variant, p.reference) for p in pairs[:3]] == [
        ("dense", "pkm"), ("moe", "pkm"), ("moe", "dense"),
    ]  # fmt: skip


def test_the_minimum_detectable_gap_of_a_plan_is_as_computed_elsewhere():
    """Noise of 0.005 nats, 7 sizes over a factor of 4 to both sides, a parabola, 3 seeds: 0.0066
    nats by an independent simulation with known noise (2.80 standard errors).
    """
    rng = np.random.default_rng(0)
    N = CHINCHILLA.best(1e19) * np.geomspace(0.25, 4, 7)
    sizes = [f"{n:g}" for n in N]
    log_params = dict(zip(sizes, np.log(N), strict=True))
    variances = []
    for _ in range(400):
        drawn = CHINCHILLA.loss(N, 1e19) + rng.normal(0, 0.005, (2, 3, 7))
        own, base = (
            SeedLosses(
                Shape.PARABOLA,
                log_params,
                {s: dict(zip(sizes, row, strict=True)) for s, row in enumerate(side)},
            )
            for side in drawn
        )
        variances.append(paired_difference(own, base)[0].stderr ** 2)
    assert 2.8016 * np.sqrt(np.mean(variances)) == pytest.approx(0.0066, rel=0.05)


def test_multipliers_take_the_paired_gap_and_its_interval():
    fit = fit_isoflop(FRAME)
    gaps = find_gaps(fit, FRAME)
    paired, plain = compute_multiplier(fit, gaps=gaps), compute_multiplier(fit)
    for gap, m, other in zip(gaps, paired, plain, strict=True):
        assert (m.nats_below, m.nats_margin) == (gap.difference.nats, gap.difference.margin)
        assert m.multiplier == pytest.approx(other.multiplier, rel=0.02)
        assert m.low < m.multiplier < m.high
