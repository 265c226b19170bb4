"""The minimum of a curve against surfaces whose minimum is known."""

import math

import numpy as np
import pytest

from peer_scaling.curves import PUBLISHED, Points, Shape, fit_minima, fit_minimum, margins

STEPS = np.log(4.0) * np.arange(-1.5, 2)


def curve(x, alpha=0.34, beta=0.37):
    """Nats above E with the minimum at x = 0, where it is 1."""
    g = alpha * beta / (alpha + beta)
    return g / alpha * np.exp(-alpha * x) + g / beta * np.exp(beta * x)


def test_the_minimum_of_a_parabola_is_its_vertex():
    x = np.linspace(-1, 1.5, 9)
    flat = Shape(0.0, 1e-9, 0.0, 1e-9)
    found = fit_minimum(Points(x + 7, 2 + 0.1 * (x - 0.2) ** 2), 1e-2, flat)
    assert found is not None
    assert found.log_N == pytest.approx(7.2, abs=1e-5)
    assert found.loss == pytest.approx(2, abs=1e-7)
    assert found.curvature == pytest.approx(0.1, rel=1e-5)


def test_a_wide_ladder_does_not_bias_as_a_parabola_does():
    x = np.log(2.0) * np.arange(-4, 5)
    loss = curve(x, 0.25, 0.45)
    a, b, _ = np.polyfit(x, loss, 2)
    assert abs(b / (2 * a)) > 0.1
    found = fit_minimum(Points(x, loss), 0.003)
    assert found is not None
    assert abs(found.log_N) < 0.02
    assert found.loss == pytest.approx(1, abs=0.002)


def test_a_curve_that_opens_downwards_has_no_minimum():
    x = np.arange(5.0)
    assert fit_minimum(Points(x, -((x - 2) ** 2)), 0.01) is None


def test_intervals_hold_what_they_say():
    """90 % intervals of curves with random exponents and noise: at least 85 % hold the truth."""
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(150):
        noise = rng.uniform(0.003, 0.01)
        points = []
        for _ in range(3):
            x = STEPS + rng.normal(0, 0.3)
            points.append(
                Points(x, curve(x, *rng.uniform(0.28, 0.42, 2)) + rng.normal(0, noise, 4))
            )
        minima, dof = fit_minima(points, [PUBLISHED] * 3)
        for found in minima:
            assert found is not None
            own = margins(found, dof)
            inside.append((abs(found.log_N) <= own.log_N, abs(found.loss - 1) <= own.loss))
    assert np.all(np.mean(inside, axis=0) > 0.85)


def test_noise_comes_from_residuals_of_all_curves():
    rng = np.random.default_rng(1)
    x = np.repeat(STEPS, 12)
    points = [Points(x, curve(x) + rng.normal(0, 0.02, len(x))) for _ in range(4)]
    minima, dof = fit_minima(points, [PUBLISHED] * 4)
    assert minima[0] is not None
    assert minima[0].noise == pytest.approx(0.02, rel=0.15)
    assert 170 < dof < 190


def test_without_a_degree_of_freedom_there_is_no_interval():
    found = fit_minimum(Points(STEPS, curve(STEPS)), 0.01)
    assert margins(found, 0.2).log_N == math.inf
    assert margins(None, 9.0).loss == math.inf


def test_a_curvature_that_may_be_none_gives_no_interval_of_the_size():
    found = fit_minimum(Points(STEPS, curve(STEPS)), 0.5)
    assert found is not None
    own = margins(found, 10.0)
    assert own.log_N == math.inf
    assert own.loss < math.inf


def test_one_more_run_does_what_it_was_expected_to():
    points = Points(STEPS, curve(STEPS))
    before = fit_minimum(points, 0.01)
    assert before is not None
    more = Points(np.append(STEPS, 1.0), curve(np.append(STEPS, 1.0)))
    after = fit_minimum(more, 0.01)
    expected, found = margins(before.after(1.0), 5.0), margins(after, 5.0)
    assert expected.log_N == pytest.approx(found.log_N, rel=0.05)
    assert expected.loss == pytest.approx(found.loss, rel=0.05)
    assert expected.loss < margins(before, 5.0).loss
    size_S, loss_S = before.deviations_after(np.array([1.0, -1.0]))
    size_SS, loss_SS = before.deviations_after_two(np.array([1.0, -1.0]))
    assert np.all(np.diag(size_SS) < size_S)
    assert loss_SS[0, 1] == pytest.approx(loss_SS[1, 0])
    assert loss_SS[0, 1] < loss_S.min()


def test_the_shape_is_learnt_from_runs():
    x = np.repeat(np.log(2.0) * np.arange(-3, 4), 40)
    found = fit_minimum(Points(x, curve(x, 0.25, 0.45)), 0.003)
    assert found is not None
    assert found.shape.cubic == pytest.approx(0.2 / 3, abs=0.01)
    assert found.shape.cubic_spread < 0.2 * PUBLISHED.cubic_spread
    assert found.shape.drifted().cubic_spread > found.shape.cubic_spread
