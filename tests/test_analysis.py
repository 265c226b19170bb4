"""Fits recover what is known, refuse by name what they cannot know."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import tables
from analysis.compare import compute_multiplier
from analysis.isoflop import IsoflopFit, fit_isoflop
from analysis.laws import power_law
from analysis.load import AnalysisError
from analysis.profile import Noise, ProfileStatus
from surfaces import known, runs


def test_minima_and_power_laws_are_recovered():
    fit = fit_isoflop(runs(known))
    for profile in fit.profiles:
        N_star, L_star = known(profile.variant, profile.budget)
        assert profile.status is ProfileStatus.OK
        assert profile.num_params == pytest.approx(N_star, rel=1e-9)
        assert profile.loss == pytest.approx(L_star, abs=1e-12)
        assert profile.loss_stderr < 1e-12
        assert profile.tokens == pytest.approx(profile.budget / (6 * N_star), rel=1e-9)
    laws = {(law.variant, law.of): law for law in fit.laws}
    assert laws["dense", "N"].exponent == pytest.approx(0.5, abs=1e-9)
    assert laws["dense", "D"].exponent == pytest.approx(0.5, abs=1e-9)
    assert laws["dense", "L"].exponent == pytest.approx(-0.1, abs=1e-9)
    law = laws["dense", "N"]
    assert power_law(law.log_coefficient, law.exponent, 1e14) == pytest.approx(1e6, rel=1e-6)


def test_a_frame_from_elsewhere_needs_the_documented_columns_only():
    columns = [
        "variant", "budget", "flops", "num_params_total", "num_params_active", "tokens", "loss", "seed",
    ]  # fmt: skip
    plain = pd.DataFrame(runs(known, noise=0.01, seeds=2)[columns])
    ours, theirs = fit_isoflop(runs(known, noise=0.01, seeds=2)), fit_isoflop(plain)
    assert [p.loss for p in ours.profiles] == [p.loss for p in theirs.profiles]
    assert [p.num_sizes for p in theirs.profiles] == [6] * 6
    plain.loc[0, "loss"] = float("nan")
    assert fit_isoflop(plain).profiles[0].num_runs == 11
    with pytest.raises(AnalysisError, match="axis=num_params_active: not every usable run"):
        fit_isoflop(plain.drop(columns="num_params_active"), "num_params_active")
    with pytest.raises(AnalysisError, match="runs without tokens"):
        fit_isoflop(plain.drop(columns="tokens"))


@pytest.mark.parametrize(
    ("losses", "status"),
    [
        ([3.0, 3.2, 3.3, 3.3, 3.2, 3.0], ProfileStatus.CONCAVE),
        ([3.5, 3.3, 3.15, 3.05, 3.0, 2.98], ProfileStatus.EDGE),
        ([2.98, 3.0, 3.05, 3.15, 3.3, 3.5], ProfileStatus.EDGE),
        ([3.01, 3.0, 3.02, 2.99, 3.0, 3.015], ProfileStatus.FLAT),
        ([3.2, 3.0, 3.2], ProfileStatus.TOO_FEW),
        ([3.3, 3.1, 3.0, 3.02, 3.12, 3.35], ProfileStatus.OK),
    ],
)
def test_what_has_no_minimum_is_refused_by_name(losses, status):
    frame = runs(known, variants=("dense",), budgets=(1e12,)).iloc[: len(losses)].copy()
    frame["num_params_total"] = 1e4 * 2.0 ** np.arange(len(losses))
    frame["loss"] = losses
    profile = fit_isoflop(frame).profiles[0]
    assert profile.status is status
    assert np.isfinite(profile.loss) == profile.ok
    assert profile.best_loss == min(losses)
    assert profile.ok or " train " in profile.reason


def test_seeds_say_how_large_the_noise_is():
    """A mean per size and one per seed leave (6 - 1) (3 - 1) degrees of freedom."""
    profile = fit_isoflop(runs(known, noise=0.01, seeds=3)).profiles[0]
    assert (profile.num_runs, profile.num_sizes, profile.dof) == (18, 6, 10)
    assert profile.noise is Noise.SEEDS
    assert 0.005 < profile.noise_stderr < 0.02


def test_six_n_d_beyond_int64_is_not_wrapped():
    frame = runs(lambda _, C: (1e12, 2.0), variants=("dense",), budgets=(6e25,))
    assert frame["budget"].dtype == "float64"
    assert fit_isoflop(frame).profiles[0].tokens == pytest.approx(1e13)


def table1_profiles(column="c4"):
    """The paper's Table 1 as profiles with a minimum."""
    template = fit_isoflop(runs(known)).profiles[0]
    rows = tables.published("table1").to_dict("records")
    return IsoflopFit(
        "num_params_total",
        tuple(
            replace(
                template,
                variant=r["method"],
                budget=float(r["budget"]),
                loss=float(np.log(r[column])),
            )
            for r in rows
        ),
        (),
    )


def test_compute_multipliers_of_the_papers_table():
    """He 2024, Table 1, C4, against the line through dense's two points (reference notes, 3)."""
    found = {(m.variant, m.budget): m.multiplier for m in compute_multiplier(table1_profiles())}
    published = {
        ("moe", 6e18): 1.63, ("moe", 2e19): 1.36, ("pkm", 6e18): 1.47,
        ("pkm", 2e19): 1.28, ("peer", 6e18): 1.93, ("peer", 2e19): 1.63,
    }  # fmt: skip
    for key, value in published.items():
        assert found[key] == pytest.approx(value, abs=0.006)


def test_multiplier_of_a_known_gap_and_its_direction():
    """L = 3 - 0.1 ln C for dense; a variant 0.1 nats below it is worth e^1 times the compute."""

    def linear(variant, C):
        return 1e5 * (C / 1e12) ** 0.5, 3.0 - 0.1 * np.log(C / 1e12) - 0.1 * (variant == "peer")

    found = compute_multiplier(fit_isoflop(runs(linear)))
    assert [m.multiplier for m in found] == pytest.approx([np.e] * 3)
    assert [m.nats_below for m in found] == pytest.approx([0.1] * 3)
    assert [m.extrapolated for m in found] == [False, False, True]
    worse = compute_multiplier(fit_isoflop(runs(linear)), baseline="peer")
    assert [m.multiplier for m in worse] == pytest.approx([1 / np.e] * 3)


def test_a_baseline_with_one_budget_gives_no_multiplier():
    found = compute_multiplier(fit_isoflop(runs(known, budgets=(1e12,))))
    assert np.isnan(found[0].multiplier)
    assert found[0].nats_below == pytest.approx(0.1)


def test_published_tables_are_complete():
    assert tables.published("table1").shape == (8, 7)
    assert tables.published("table2").shape == (8, 5)
    below = tables.published_nats_below_dense()
    assert below.loc["peer"].tolist() == ["+0.145", "+0.107"]
