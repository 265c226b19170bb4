"""The figure of gaps shows the comparison's numbers, and hollow what is not ranked."""

import numpy as np
import pytest

from analysis.compare_figures import plot_gaps
from analysis.equal_cost import View
from analysis.verdicts import compare_study
from compared import BUDGETS, changed, study


def lines(figure):
    (ax,) = figure.axes
    return {str(box.get_label()): box for box in ax.containers}


@pytest.fixture(scope="module")
def frame():
    return study(gap=0.05, seeds=3)[0]


def test_points_are_the_gaps_with_their_intervals(frame):
    comparison = compare_study(frame)
    (box,) = lines(plot_gaps(comparison)).values()
    data, _, (bars,) = box
    gaps = [claim.difference for claim in comparison.claims[View.FLOPS]]
    assert data.get_xdata() == pytest.approx(BUDGETS)
    assert data.get_ydata() == pytest.approx([gap.nats for gap in gaps])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert ends == pytest.approx(np.array([[gap.low, gap.high] for gap in gaps]))
    assert data.get_markerfacecolor() != "white"


def test_a_variant_that_is_not_ranked_is_hollow(frame):
    figure = plot_gaps(compare_study(changed(frame, "causal", False)))
    (box,) = lines(figure).values()
    assert box[0].get_markerfacecolor() == "white"
    assert "not causal" in box.get_label()


def test_another_reference(frame):
    assert lines(plot_gaps(compare_study(frame), "peer")) == {}
    turned = compare_study(frame, baseline="peer")
    (box,) = lines(plot_gaps(turned, "peer")).values()
    assert (box[0].get_ydata() < 0).all()
