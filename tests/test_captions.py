"""What lies beside a figure: its caption names every run that does not count, its table has every
point that is drawn.
"""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection

from analysis import figures
from analysis.captions import isoflop_caption, isoflop_data, scaling_caption, scaling_data
from analysis.isoflop import fit_isoflop
from analysis.report import IsoflopReport, write
from surfaces import known, runs


@pytest.fixture(scope="module")
def frame():
    """A run that is excluded, one that failed without a loss, an outlier, a curve upside down."""
    frame = runs(known, noise=0.001, seeds=2)
    frame.loc[3, ["excluded", "loss"]] = ["superseded by another", 4.0]
    frame.loc[5, ["excluded", "loss"]] = ["failed: out of memory", np.nan]
    frame.loc[(frame["budget"] == 4e12) & (frame["variant"] == "dense"), "loss"] *= -1
    lowest = frame["loss"].min()
    frame.loc[frame["loss"] < 0, "loss"] += 3 - lowest
    frame.loc[frame["run_id"] == "peer-1e+12-0.75-0", "loss"] += 0.5
    return frame


@pytest.fixture(scope="module")
def fit(frame):
    return fit_isoflop(frame)


def test_captions_name_every_run_that_does_not_count(frame, fit):
    left = [far for profile in fit.profiles for far in profile.left_out]
    refused = [profile for profile in fit.profiles if not profile.ok]
    assert left
    assert refused
    for caption in (isoflop_caption(fit, frame), scaling_caption(fit, frame)):
        lines = caption.splitlines()
        for run, why in frame.loc[frame["excluded"].notna(), ["run_id", "excluded"]].to_numpy():
            assert f"- {run}: {why}" in lines
        for far in left:
            assert f"- {far.run}: {far.reason}" in lines
        for profile in refused:
            assert f"{profile.status} (" in caption
            assert profile.reason in caption
        assert "1e12, 4e12, 1.6e13" in caption
        assert "95 %" in caption


def test_the_table_of_the_isoflop_figure_has_every_point_that_is_drawn(frame, fit):
    figure, table = figures.plot_isoflop(fit, frame), isoflop_data(fit, frame)
    for ax, budget in zip(figure.axes, fit.budgets, strict=False):
        here = table.loc[table["budget"] == budget]
        drawn = [np.transpose(line.get_data()) for line in ax.lines if not _is_bar(line)]
        rings = [np.asarray(ring.get_offsets()) for ring in ax.collections if _is_ring(ring)]
        expected = here[["num_params", "loss"]].to_numpy()
        assert _sorted(np.concatenate([*drawn, *rings])) == pytest.approx(_sorted(expected))
        hollow = sum(
            len(line.get_xdata()) for line in ax.lines if line.get_markerfacecolor() == "none"
        )
        assert hollow == (here["kind"] == "excluded").sum()
    assert set(table["kind"]) == {"run", "excluded", "left out", "curve", "minimum"}


def test_the_table_of_the_scaling_figure_has_every_point_that_is_drawn(frame, fit):
    figure, table = figures.plot_scaling(fit, frame), scaling_data(fit)
    for ax, of in zip(figure.axes, "NDL", strict=True):
        drawn = np.concatenate([np.transpose(line.get_data()) for line in ax.lines])
        expected = table.loc[table["of"] == of, ["budget", "value"]].to_numpy()
        assert _sorted(drawn) == pytest.approx(_sorted(expected))
        bars = [bar[:, 1] for lines in ax.collections for bar in lines.get_segments()]
        ends = table.loc[(table["of"] == of) & (table["kind"] == "minimum"), ["low", "high"]]
        assert _sorted(bars) == pytest.approx(_sorted(ends))


def test_captions_and_tables_are_written_beside_the_figures(frame, fit, tmp_path):
    paths = {path.name: path for path in write(IsoflopReport(frame, fit, ()), tmp_path)}
    for name in ("isoflop", "scaling"):
        assert {f"{name}.{kind}" for kind in ("png", "svg", "csv", "caption.md")} <= paths.keys()
    assert paths["isoflop.caption.md"].read_text() == isoflop_caption(fit, frame) + "\n"
    again = pd.read_csv(paths["isoflop.csv"], float_precision="round_trip")
    assert again["loss"].tolist() == isoflop_data(fit, frame)["loss"].tolist()


def _is_bar(line):
    """The caps of an interval."""
    return line.get_marker() in ("|", "_", 2, 3)


def _is_ring(collection):
    return isinstance(collection, PathCollection)


def _sorted(points):
    points = np.asarray(points, dtype=float)
    return points[np.lexsort(points.T)]
