"""Power laws over minima, envelopes and laws with sparsity, on data that obey them."""

import subprocess
import sys

import numpy as np
import pytest

from analysis.diagnostics import held_out, held_out_power_law, held_out_routed
from analysis.envelope import fit_envelope, fit_loss_envelope, lower_envelope
from analysis.fitting import FitStatus
from analysis.load import AnalysisError
from analysis.powerlaw import fit_power_law
from analysis.sparse_laws import fit_fine_grained, fit_routed, fit_sparse_surface
from scaling_data import SURFACE

BUDGETS = np.array([1e18, 2.15e18, 4.64e18, 1e19, 1e20])
KRAJEWSKI = {
    "a": 18.1,
    "alpha": 0.115,
    "b": 30.8,
    "beta": 0.147,
    "g": 2.1,
    "gamma": 0.58,
    "c": 0.47,
}
"""Krajewski et al. 2024 (2402.07871), table 1."""
ROUTED = {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_start": 1.847, "E_max": 314.5}


def sparse_runs(num_runs=120, noise=0.001):
    rng = np.random.default_rng(0)
    active, tokens = 10 ** rng.uniform(7, 10, num_runs), 10 ** rng.uniform(9, 11.5, num_runs)
    total = active * np.where(rng.random(num_runs) < 0.3, 1.0, 10 ** rng.uniform(0, 2, num_runs))
    loss = 1.7 + 400 / (active**0.33 * (total / active) ** 0.1) + 1000 / tokens**0.36
    return active, total, tokens, loss * np.exp(noise * rng.standard_normal(num_runs))


def test_a_power_law_is_recovered_and_least_squares_says_how_surely():
    law = fit_power_law(BUDGETS, 0.1 * BUDGETS**0.5)
    assert law.exponent == pytest.approx(0.5, abs=1e-12)
    assert law.at(1e24) == pytest.approx(1e11, rel=1e-9)
    rng = np.random.default_rng(0)
    draws = [
        fit_power_law(BUDGETS, BUDGETS**0.5 * np.exp(0.05 * rng.standard_normal(5)))
        for _ in range(400)
    ]
    spread = np.std([draw.exponent for draw in draws])
    assert np.sqrt(np.mean([draw.exponent_stderr**2 for draw in draws])) == pytest.approx(
        spread, rel=0.1
    )
    covered = [low < 0.5 < high for low, high in (draw.exponent_interval for draw in draws)]
    assert 0.92 < np.mean(covered) < 0.98
    at_top = np.std([np.log(draw.at(1e21)) for draw in draws])
    assert np.sqrt(np.mean([d.log_stderr(1e21) ** 2 for d in draws])) == pytest.approx(
        at_top, rel=0.1
    )


def test_weights_count_and_errors_are_never_below_the_scatter():
    y = BUDGETS**0.5 * np.array([1.0, 1.0, 1.0, 1.0, 2.0])
    unsure = np.array([0.01, 0.01, 0.01, 0.01, 100.0])
    law = fit_power_law(BUDGETS, y, log_stderr=unsure)
    assert law.exponent == pytest.approx(0.5, abs=1e-6)
    sure = fit_power_law(BUDGETS, y, log_stderr=np.full(5, 1e-3))
    assert sure.exponent_stderr == pytest.approx(fit_power_law(BUDGETS, y).exponent_stderr)
    honest = fit_power_law(BUDGETS, BUDGETS**0.5, log_stderr=np.full(5, 0.1))
    assert honest.exponent_stderr > 0.01


def test_each_point_of_a_power_law_is_left_out_in_turn():
    y = BUDGETS**0.5 * np.array([1.0, 1.1, 0.9, 1.05, 1.2])
    law = fit_power_law(BUDGETS, y)
    for i in range(5):
        others = np.arange(5) != i
        without = fit_power_law(BUDGETS[others], y[others])
        assert law.exponents_without[i] == pytest.approx(without.exponent)
        assert law.left_out[i] == pytest.approx(np.log(without.at(BUDGETS[i]) / y[i]))
    found = held_out_power_law(law, BUDGETS)
    assert found.largest.mean_error == pytest.approx(np.expm1(law.left_out[-1]))
    two = fit_power_law(BUDGETS[:2], y[:2])
    assert two.status is FitStatus.UNDETERMINED
    assert np.isnan(two.exponent_stderr)
    assert np.isnan(two.exponent_interval).all()
    with pytest.raises(AnalysisError, match="1 budget: a power law needs two"):
        fit_power_law(np.full(3, 1e18), np.ones(3))


def test_the_envelope_of_training_curves_is_the_compute_optimal_front():
    """Curves of 25 sizes; a run counts where no mixture of cheaper and dearer ones beats it."""
    sizes = np.geomspace(1e7, 1e11, 25)
    tokens = np.geomspace(1e8, 1e13, 120)
    N, D = (grid.ravel() for grid in np.meshgrid(sizes, tokens))
    s = SURFACE
    L = s["E"] + s["A"] * N ** -s["alpha"] + s["B"] * D ** -s["beta"]
    C = 6 * N * D
    middle = (C > 1e18) & (C < 1e23)
    found = fit_envelope(N[middle], D[middle], L[middle], C[middle])
    exponent = s["beta"] / (s["alpha"] + s["beta"])
    assert found.N.exponent == pytest.approx(exponent, abs=0.03)
    assert found.N.exponent + found.D.exponent == pytest.approx(1, abs=1e-9)
    kept = np.flatnonzero(middle)[found.rows]
    assert (np.diff(C[kept]) > 0).all()
    assert (np.diff(L[kept]) < 0).all()
    with pytest.raises(AnalysisError, match="2 of 3 runs on the lower envelope"):
        fit_envelope(*np.array([[1e6, 2e6, 3e6], [1e9] * 3, [3.0, 2.9, 2.5], [1e16, 2e16, 3e16]]))


def test_the_lower_envelope_leaves_out_what_lies_above_it():
    C, L = np.array([1e18, 1e18, 1e19, 1e20, 1e21]), np.array([4.0, 5.0, 3.9, 3.0, 3.5])
    assert lower_envelope(C, L).tolist() == [0, 3]


def test_variants_share_the_loss_floor():
    C = np.tile(np.geomspace(1e18, 1e21, 6), 3)
    names = np.repeat(["dense", "moe", "peer"], 6)
    A, gamma = (
        {"dense": 90.0, "moe": 80.0, "peer": 75.0},
        {"dense": 0.095, "moe": 0.094, "peer": 0.096},
    )
    L = np.array([1.6 + A[v] * c ** -gamma[v] for v, c in zip(names, C, strict=True)])
    found = fit_loss_envelope(C, L, names)
    assert found.variants == ("dense", "moe", "peer")
    assert found.status is FitStatus.OK
    assert pytest.approx(1.6, rel=1e-6) == found.E
    assert found.gamma == pytest.approx(tuple(gamma.values()), rel=1e-6)
    assert found.compute("peer", found.loss("peer", 3e20)) == pytest.approx(3e20, rel=1e-9)
    assert found.compute("peer", 1.5) == np.inf
    pinned = fit_loss_envelope(C, L, names, E=1.6)
    assert pinned.pinned
    assert pinned.E == 1.6
    assert pytest.approx(tuple(A.values()), rel=1e-6) == pinned.A
    assert "E" not in pinned.fit.names
    off = fit_loss_envelope(C, L, names, E=1.9)
    assert off.objective > 1e-5 > pinned.objective
    with pytest.raises(AnalysisError, match="E=9: it must lie between 0 and the lowest loss"):
        fit_loss_envelope(C, L, names, E=9.0)


def test_a_law_with_active_and_total_parameters_is_recovered():
    active, total, tokens, loss = sparse_runs()
    found = fit_sparse_surface(active, total, tokens, loss)
    assert found.status is FitStatus.OK
    truth = {"alpha": 0.33, "gamma": 0.1, "beta": 0.36, "E": 1.7}
    for name, value in truth.items():
        stderr = found.fit.stderr(name) * (value if name == "E" else 1)
        assert abs(found.coefficients[name] - value) < 4 * stderr
        assert stderr < 0.1 * value
    errors = held_out(found.fit, np.round(np.log10(6 * active * tokens)))
    assert errors.mean_abs_error < 0.003
    dense = fit_sparse_surface(active, active, tokens, loss)
    assert dense.status is FitStatus.UNDETERMINED
    with pytest.raises(AnalysisError, match="is below active"):
        fit_sparse_surface(active, active / 2, tokens, loss)


def test_the_law_of_fine_grained_experts_is_recovered():
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(7, 10, 80), 10 ** rng.uniform(9, 11.5, 80)
    G = 2.0 ** rng.integers(0, 7, 80)
    k = KRAJEWSKI
    L = k["c"] + (k["g"] / G ** k["gamma"] + k["a"]) / N ** k["alpha"] + k["b"] / D ** k["beta"]
    found = fit_fine_grained(N, D, G, L)
    assert found.status is FitStatus.OK
    assert found.coefficients == pytest.approx(KRAJEWSKI, rel=1e-6)
    assert held_out(found.fit, np.round(np.log10(N))).mean_abs_error < 1e-6
    one = fit_fine_grained(N, D, np.ones(80), L)
    assert one.status in (FitStatus.UNDETERMINED, FitStatus.VANISHED)


def test_clarks_law_is_recovered_and_its_experts_saturate():
    N, E = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 6), 2.0 ** np.arange(10)))
    saturated = 1 / (
        1 / (E - 1 + 1 / (1 / ROUTED["E_start"] - 1 / ROUTED["E_max"])) + 1 / ROUTED["E_max"]
    )
    x, y = np.log10(N), np.log10(saturated)
    L = 10 ** (ROUTED["a"] * x + ROUTED["b"] * y + ROUTED["c"] * x * y + ROUTED["d"])
    found = fit_routed(N, E, L)
    assert found.status is FitStatus.OK
    for name, value in ROUTED.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4)
    assert found.loss(N, E) == pytest.approx(L, rel=1e-6)
    assert found.loss(1e8, 1e9) == pytest.approx(found.loss(1e8, 1e12), rel=1e-6)
    assert held_out_routed(N, E, L, N).mean_abs_error < 1e-4
    assert fit_routed(N, np.ones(len(N)), L).status is FitStatus.UNDETERMINED
    with pytest.raises(AnalysisError, match="6 runs for 6 coefficients"):
        fit_routed(N[:6], E[:6], L[:6])


def test_imports_are_light():
    """No training stack, and 1.5 s at most: of the processor, since other tests share it."""
    modules = "analysis.diagnostics, analysis.envelope, analysis.parametric, analysis.sparse_laws"
    code = f"import time; t = time.process_time(); import sys, analysis, {modules}; print('torch' in sys.modules, time.process_time() - t)"
    command = [sys.executable, "-c", code]
    said = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert {torch for torch, _ in said} == {"False"}
    assert min(float(seconds) for _, seconds in said) < 1.5
