"""Losses at equal seconds, memory and recounted FLOPs; what cannot be compared says why."""

import re

import numpy as np
import pytest

from analysis.conventions import recount
from analysis.difference import Source
from analysis.equal_cost import View, compare_at_equal, compare_measured, cost_cells
from analysis.gaps import Pair, find_gaps
from analysis.isoflop import fit_isoflop
from compared import BUDGETS, changed, study
from surfaces import runs

PAIR = Pair("peer", "dense", 4e12)


def straight(variant, C):
    """L* = 4 (C / 1e12)^-0.1, and 3 % below that."""
    return 1e5 * (C / 1e12) ** 0.5, 4.0 * (C / 1e12) ** -0.1 * (0.97 if variant == "peer" else 1.0)


def timed(slower=1.0, seeds=1, noise=0.0):
    """Trained at the optimum among others; seconds are FLOPs, `slower` times as many for peer."""
    frame = runs(straight, seeds=seeds, noise=noise)
    best = frame.loc[frame["size"] == "x0.75"].assign(size="x1")
    best["num_params_total"] /= 0.75
    L = [straight(v, C)[1] for v, C in zip(best["variant"], best["budget"], strict=True)]
    noise_U = noise * np.random.default_rng(1).standard_normal(len(best))
    frame = type(frame)(
        {name: [*frame[name], *column] for name, column in best.assign(loss=L + noise_U).items()}
    )
    times = np.where(frame["variant"] == "peer", slower, 1.0)
    return frame.assign(
        train_seconds=frame["flops"] * times,
        device="cpu",
        peak_memory_bytes=1e9 * frame["size"].str[1:].astype(float) * times,
    )


def at_equal(frame, view=View.SECONDS, pair=PAIR):
    return compare_measured(fit_isoflop(frame), frame, pair, view)


def test_a_variant_that_is_better_per_flop_is_worse_per_second():
    """Peer's L* at t seconds is 0.97 x 4 (t / 2e12)^-0.1, both straight lines in the logarithms."""
    found = at_equal(timed(slower=2.0))
    assert found.at == pytest.approx(4e12 * np.sqrt(2), rel=1e-12)
    t = found.at / 1e12
    expected = 4 * t**-0.1 - 0.97 * 4 * (t / 2) ** -0.1
    assert found.difference.nats == pytest.approx(expected, abs=1e-12)
    assert expected < -0.1 < 0.1 < at_equal(timed()).difference.nats


def test_without_three_shared_seeds_there_is_no_interval():
    found = at_equal(timed(seeds=2, noise=0.001)).difference
    assert found.source is Source.NONE
    assert np.isnan([found.margin, found.p_value, found.minimum_detectable]).all()
    assert found.note == "2 shared seeds, 3 are needed for an interval"


def test_seeds_give_an_interval_that_holds_the_truth():
    found = at_equal(timed(seeds=6, noise=0.001)).difference
    assert (found.source, found.num_seeds, found.dof) == (Source.SEEDS, 6, 5)
    truth = 0.03 * 4 * 4**-0.1
    assert found.nats == pytest.approx(truth, abs=0.003)
    assert 0 < found.margin < 0.004


def test_the_cost_stays_between_what_both_took_at_the_budget():
    """At the largest budget dense was never trained for longer than it took there."""
    found = at_equal(timed(slower=2.0), pair=Pair("peer", "dense", 16e12))
    assert found.at == pytest.approx(16e12)
    found = at_equal(timed(slower=2.0), pair=Pair("peer", "dense", 1e12))
    assert found.at == pytest.approx(2e12)


def test_costs_that_do_not_meet_are_not_compared():
    found = at_equal(timed(slower=1000.0))
    assert found.difference is None
    assert found.reason == (
        "train_seconds: none of 4e+12 to 4e+15, the costs at the budget, is covered by both (peer "
        "1e+15 to 1.6e+16, dense 1e+12 to 1.6e+13)"
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"train_seconds": np.nan}, "42 of 42 runs have no train_seconds or wall_seconds"),
        ({"device": None}, "42 of 42 runs do not say on which device train_seconds was measured"),
    ],
)
def test_what_the_runs_do_not_say_is_not_compared(values, reason):
    assert at_equal(timed().assign(**values)).reason == reason


def test_devices_are_not_compared_with_one_another():
    found = at_equal(changed(timed(), "device", "H100"))
    assert (found.difference, found.reason) == (
        None, "train_seconds is from several devices: H100; cpu",
    )  # fmt: skip


def test_the_whole_runs_time_stands_in_for_that_of_training():
    frame = timed()
    whole = frame.assign(wall_seconds=2 * frame["train_seconds"], train_seconds=np.nan)
    found = at_equal(whole)
    assert (found.column, found.at) == ("wall_seconds", pytest.approx(8e12))


def test_memory_is_compared_within_the_budget():
    """From another budget's runs the same bytes would give another loss. Dense's envelope ends at
    its minimum, 1e9 bytes: beyond, its losses rise.
    """
    found = at_equal(timed(slower=1.5), View.MEMORY)
    fit, frame = fit_isoflop(timed(slower=1.5)), timed(slower=1.5)
    alone = frame.loc[frame["budget"] == PAIR.budget]
    same = compare_at_equal(fit, alone, PAIR, "peak_memory_bytes")
    assert found.difference.nats == same.difference.nats
    assert found.at == same.at == pytest.approx(1e9)


def test_memory_that_hardly_depends_on_the_model_is_not_compared():
    frame = timed()
    process = frame.assign(peak_memory_bytes=1e9 + frame["peak_memory_bytes"] / 10)
    assert re.match(
        r"peak_memory_bytes hardly depends on the model: 1\.025e\+09 to 1\.4e\+09, less than 2 "
        r"times, on cpu",
        at_equal(process, View.MEMORY).reason,
    )


def test_the_envelope_is_lower_and_falls():
    frame = timed()
    cells = cost_cells(frame.loc[frame["variant"] == "dense"], "train_seconds")
    assert len(cells.cells) == 3 * 7
    curve = cells.curve()
    assert np.exp(curve.log_cost_V[[0, -1]]) == pytest.approx([1e12, 16e12])
    assert (np.diff(curve.log_loss_V) < 0).all()
    assert curve.loss(4e12) == pytest.approx(straight("dense", 4e12)[1])


def test_a_recount_that_costs_one_variant_more_turns_the_winner_round():
    frame, _ = study()
    dear = changed(frame, "flops_6n_total", lambda flops: 3 * flops)
    fit = fit_isoflop(dear)
    for gap in find_gaps(fit, dear):
        found = recount(fit, dear, gap)
        assert found.winner == "peer"
        assert found.changed == ("flops_6n_total",)
        assert found.unknown == ()
        same = [e.difference.nats for e in found.others if e.column != "flops_6n_total"]
        assert same == pytest.approx([0.05] * 3, abs=0.01)
    assert gap.pair.budget == BUDGETS[-1]


def test_a_recount_that_the_runs_lack_is_unknown():
    frame, _ = study()
    fit = fit_isoflop(frame)
    gap = find_gaps(fit, frame)[0]
    lacking = frame.assign(flops_6n_active=np.nan)
    (unknown,) = recount(fit, lacking, gap).unknown
    assert unknown.reason == "210 of 210 runs have no flops_6n_active"
