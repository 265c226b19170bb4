"""Published fits, from the runs that they were fitted to (`$PEER_SCALING_DATA/scaling`)."""

import numpy as np
import pytest
from scipy.interpolate import Akima1DInterpolator

from analysis.diagnostics import (
    CHINCHILLA_STARTS,
    LIMIT_DELTA,
    certify,
    delta_sweep,
    held_out,
    held_out_power_law,
    held_out_routed,
)
from analysis.envelope import fit_loss_envelope
from analysis.fitting import FitStatus
from analysis.parametric import bootstrap_loss_surface, fit_loss_surface
from analysis.powerlaw import fit_power_law
from analysis.sparse_laws import fit_routed
from scaling_data import chinchilla, gemstones, table

pytestmark = pytest.mark.data
GEMSTONES = (
    "cool_end", "hot", "hot_100b+", "hot_sampled_like_chinchilla", "lr_ablation_hot", "slim_chinchilla",
)  # fmt: skip
ROUTERS = {
    "RL-R": (-0.083, -0.128, 0.0117, 1.114),
    "Hash": (-0.089, -0.146, 0.0134, 1.173),
    "S-Base": (-0.084, -0.123, 0.0104, 1.122),
}
"""a, b, c, d of the runs with top-1 routing in every second layer."""


@pytest.fixture
def chinchilla_surface(reference_data):
    return fit_loss_surface(*chinchilla(reference_data))


def test_chinchilla_has_the_published_minimum(chinchilla_surface):
    surface = chinchilla_surface
    assert surface.status is FitStatus.OK
    assert surface.objective == pytest.approx(0.001018274018, abs=1e-9)
    found = [surface.A, surface.B, surface.E, surface.alpha, surface.beta]
    assert found == pytest.approx([477.83, 2143.42, 1.81722, 0.34731, 0.36717], rel=2e-5)


def test_chinchilla_has_the_published_limit_of_small_delta(chinchilla_surface):
    (limit,) = delta_sweep(chinchilla_surface.fit, [LIMIT_DELTA])
    found = [limit.value(name) for name in ("A", "B", "E", "alpha", "beta")]
    assert found == pytest.approx([481.93, 2085.00, 1.81684, 0.34780, 0.36584], rel=2e-5)
    (closer,) = delta_sweep(chinchilla_surface.fit, [1e-9])
    assert [closer.value(n) for n in ("A", "B", "E", "alpha", "beta")] == pytest.approx(
        found, rel=3e-4
    )


@pytest.mark.slow
def test_no_start_of_chinchillas_grid_gets_lower(chinchilla_surface):
    certificate = certify(chinchilla_surface.fit, CHINCHILLA_STARTS)
    assert certificate.num_starts == 4500
    assert certificate.holds
    assert certificate.num_at_minimum > 4400


def test_chinchillas_bootstrap_has_the_published_standard_errors(reference_data):
    bootstrap = bootstrap_loss_surface(*chinchilla(reference_data))
    assert bootstrap.num_converged == 4000
    published = {"A": 124.52, "E": 0.02566, "alpha": 0.0154, "beta": 0.0206}
    for name, stderr in published.items():
        assert bootstrap.stderr(name) == pytest.approx(stderr, rel=0.06)
    # B has a long tail: its standard deviation depends on the draws, its interval hardly.
    assert bootstrap.interval("B") == pytest.approx((1042, 5810), rel=0.06)


@pytest.mark.parametrize("name", GEMSTONES)
def test_gemstones_objectives_are_never_worse_than_published(reference_data, name):
    runs, published = gemstones(reference_data, name)
    surface = fit_loss_surface(*runs)
    assert surface.status is FitStatus.OK
    # Published to ten decimals.
    assert surface.objective <= published["loss"]["0"] + 5e-11
    assert surface.objective == pytest.approx(published["loss"]["0"], rel=1e-5)
    assert [surface.alpha, surface.beta] == pytest.approx(published["exponents"]["0"], rel=5e-3)


def akima_minimum(params, loss):
    """N at the minimum of the interpolant of ln L in ln N; None at an edge."""
    order = np.argsort(params)
    x, y = np.log(params[order]), np.log(loss[order])
    fine = np.linspace(x[0], x[-1], 20001)
    at = int(np.argmin(Akima1DInterpolator(x, y)(fine)))
    return np.exp(fine[at]) if 0 < at < len(fine) - 1 else None


def test_porians_exponents_lie_within_their_intervals(reference_data):
    points = table(reference_data, "porian-rsld", "isoflop_points.csv")
    published = table(reference_data, "porian-rsld", "published_fits.csv")
    keys = ["file", "dataset", "hparams", "warmup", "decay", "param_count", "val"]
    cells = dict(iter(points.groupby(keys)))
    errors, inside = [], []
    for _, row in published.iterrows():
        minima = {
            C: akima_minimum(runs["params"].to_numpy(), runs["loss"].to_numpy())
            for C, runs in cells[tuple(row[keys])].groupby("flops")
        }
        found = {C: N for C, N in minima.items() if N is not None}
        law = fit_power_law(np.array([*found]), np.array([*found.values()]))
        errors.append(abs(law.exponent - row["a_basic"]))
        inside.append(row["ci_lo"] <= law.exponent <= row["ci_hi"])
    assert len(inside) == 15
    assert all(inside)
    assert np.mean(errors) <= 0.002


def test_nanochats_exponents_depend_on_what_counts_as_a_parameter(reference_data):
    optima = table(reference_data, "nanochat", "isoflop_optima_param_conventions.csv")
    laws = {
        name: fit_power_law(rows["flops"].to_numpy(), rows["eff_params"].to_numpy())
        for name, rows in optima.groupby("convention")
    }
    exponents = {name: round(law.exponent, 2) for name, law in laws.items()}
    assert exponents == {
        "projections_incl_lm_head_no_embed": 0.54,
        "all_params": 0.37,
        "transformer_only": 0.70,
    }
    errors = held_out_power_law(laws["all_params"], optima["flops"].unique())
    assert errors.mean_abs_error < 0.02


def test_marins_largest_run_is_predicted_from_the_smaller_ones(reference_data):
    best = table(reference_data, "marin-moe", "v16_best_per_budget.csv")
    rest, top = best[best["split"] == "fit"], best[best["split"] == "heldout"].iloc[0]
    for column, E in (("paloma_macro", 1.6), ("paloma_macro", None), ("c4_en_bpb", None)):
        law = fit_loss_envelope(rest["flops"].to_numpy(), rest[column].to_numpy(), E=E)
        assert law.status is FitStatus.OK
        assert law.loss("all", top["flops"]) == pytest.approx(top[column], rel=0.004)
    pinned = fit_loss_envelope(rest["flops"].to_numpy(), rest["paloma_macro"].to_numpy(), E=1.6)
    assert pinned.loss("all", 1e21) == pytest.approx(2.606, abs=0.0015)
    assert pinned.gamma[0] == pytest.approx(0.0941, abs=5e-4)
    every = fit_loss_envelope(best["flops"].to_numpy(), best["paloma_macro"].to_numpy(), E=1.6)
    found = held_out(every.fit, best["flops"].to_numpy())
    assert found.largest.mean_error == pytest.approx(pinned.loss("all", 1e21) / 2.599 - 1, abs=1e-9)


@pytest.mark.parametrize("router", ROUTERS)
def test_clarks_law_holds_for_deepminds_routed_runs(reference_data, router):
    curves = table(reference_data, "deepmind-routed", "curves.csv.gz")
    final = curves.sort_values("step").groupby("hyper_id").tail(1)
    assert len(final) == 223
    plain = final[
        (final["k"] == 1) & (final["flop_increase"] == 1) & (final["routing_frequency"] == 0.5)
    ]
    runs = plain[plain["router_type"].isin([router, "Dense"])]
    N, E, L = (
        runs[c].to_numpy() for c in ("dense_parameter_count", "num_experts", "loss_validation")
    )
    law = fit_routed(N, E, L)
    assert law.status is FitStatus.OK
    a, b, c, d = ROUTERS[router]
    assert [law.a, law.b, law.d] == pytest.approx([a, b, d], abs=0.001)
    assert law.c == pytest.approx(c, abs=1e-4)
    assert 0.0029 < law.rmse < 0.0033
    assert held_out_routed(N, E, L, N).mean_abs_error < 0.02
