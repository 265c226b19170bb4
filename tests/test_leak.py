"""Expert choice is ranked by its causal loss where it has one, whatever the other losses say; what
seeing later tokens is worth is told; runs without that loss are not mixed with those that have it.
"""

import sys
from dataclasses import replace

import numpy as np
import pytest

from analysis import cli, figures
from analysis.compare_command import write as write_comparison
from analysis.csv_runs import write_csv
from analysis.leak import EXPLAINED, TITLE, find_leaks, leak_table
from analysis.load import display_name, excluded, load_runs, not_causal, usable
from analysis.report import analyse, summary, write
from analysis.verdicts import compare_study
from conftest import ROOT
from peer_scaling.publish import write_record
from peer_scaling.record import RECORD, read_record
from reported import write_page

COMMITTED = ROOT / "docs" / "figures" / "isoflop_laptop"
ABOVE = (0.10, 0.12)
"""Of the threshold routing, by seed; top-1 is half of it, and so the better one."""


def ranked(record, **losses):
    above = ABOVE[record.seed]
    own = {"threshold": record.loss + above, "top1": record.loss + above / 2}
    return replace(record, causal_losses=own | losses)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Dense and expert choice at one budget, two seeds, as if trained after causal losses came."""
    root = tmp_path_factory.mktemp("ranked") / "isoflop_laptop"
    for path in sorted(COMMITTED.glob(f"*-2e10-s*/{RECORD}")):
        record = read_record(path)
        if record.ffw in ("dense", "moe"):
            new = record if record.causal else ranked(record)
            write_record(new, root / path.parent.name)
    return root


@pytest.fixture(scope="module")
def frame(study):
    return load_runs(study)


def test_the_first_route_ranks_and_the_better_one_is_reported(frame):
    before = load_runs(COMMITTED).set_index("run_id").loc[frame["run_id"]].reset_index()
    moe = (frame["variant"] == "moe").to_numpy()
    own, old = frame[moe], before[moe]
    above = np.array([ABOVE[seed] for seed in own["seed"]])
    assert own["loss"].tolist() == (old["loss"] + above).tolist()
    assert own["loss_as_trained"].tolist() == old["loss"].tolist()
    assert own["loss_top1"].tolist() == (old["loss"] + above / 2).tolist()
    assert (own["loss_top1"] < own["loss"]).all()
    assert own["perplexity"].tolist() == pytest.approx(np.exp(own["loss"]).tolist(), rel=1e-12)
    scale = (own["loss"] / old["loss"]).tolist()
    assert (own["bits_per_byte"] / old["bits_per_byte"]).tolist() == pytest.approx(scale, rel=1e-12)
    for column, value in (("causal", True), ("dropless", True), ("routing", "threshold")):
        assert set(own[column]) == {value}
    assert excluded(frame).empty
    assert frame[~moe].drop(columns="run_id").equals(before[~moe].drop(columns="run_id"))


def test_records_without_causal_losses_are_as_they_were():
    frame = load_runs(COMMITTED)
    assert frame[["routing", "loss_as_trained", "loss_top1"]].isna().to_numpy().all()
    assert not_causal(frame) == {"moe"}
    assert leak_table(frame).empty
    text = summary(analyse(COMMITTED))
    assert "moe (not causal)" in text
    assert TITLE not in text


def test_a_csv_of_it_is_the_same(study, frame, tmp_path):
    write_csv(frame, tmp_path / "runs.csv")
    again = load_runs(tmp_path / "runs.csv")
    assert again.equals(frame)
    assert find_leaks(again) == find_leaks(frame)


@pytest.mark.parametrize("losses", [{"threshold": None}, {"threshold": "3"}, {"threshold": 1e9}])
def test_without_a_number_the_run_is_excluded(losses, tmp_path):
    record = read_record(next(COMMITTED.glob("moe-*-2e10-s0-*")) / RECORD)
    write_record(ranked(record, **losses), tmp_path / "study" / "run")
    (row,) = load_runs(tmp_path).to_dict("records")
    wrong = losses["threshold"] == 1e9
    assert row["excluded"] == ("impossible: loss=1e+09" if wrong else "no loss")


def test_runs_without_the_loss_are_excluded_beside_runs_that_have_it(study, tmp_path):
    """Both ways round in time: the ranked ones are kept."""
    for finished, folder in (("2020-01-01T00:00:00", "old"), ("2030-01-01T00:00:00", "new")):
        for path in sorted(study.glob(f"*/{RECORD}")):
            record = read_record(path)
            if record.ffw == "moe" and record.seed == 1:
                record = replace(record, causal_losses={}, finished_at=finished)
            write_record(record, tmp_path / folder / path.parent.name)
        frame = load_runs(tmp_path / folder)
        left = excluded(frame)
        assert len(left) == 6
        assert set(left["variant"]) == {"moe"}
        assert left["excluded"].str.match("no loss with threshold routing, .* moe-.*-s0-").all()
        assert set(usable(frame).query("variant == 'moe'")["routing"]) == {"threshold"}
        assert not_causal(frame) == set()
        assert display_name("moe", frame) == "moe (threshold routing)"
        write_csv(frame, tmp_path / "runs.csv")
        assert load_runs(tmp_path / "runs.csv").equals(frame)


def test_the_leak_is_mean_and_range_over_the_runs(frame):
    threshold, top1 = find_leaks(frame)
    assert (threshold.variant, threshold.budget, threshold.routing) == ("moe", 2e10, "threshold")
    assert (threshold.ranked, top1.ranked) == (True, False)
    assert threshold.num_runs == top1.num_runs == 12
    expected = (np.mean(ABOVE), *ABOVE)
    assert (threshold.mean, threshold.least, threshold.most) == pytest.approx(expected)
    assert (top1.mean, top1.least, top1.most) == pytest.approx(np.array(expected) / 2)
    without = frame.assign(loss_top1=np.nan)
    assert [leak.routing for leak in find_leaks(without)] == ["threshold"]


ROW = "| moe | 2e10 | threshold | 12 | +0.1100 | +0.1000 | +0.1200 |"


def test_every_report_tells_it_and_names_the_routing(study, tmp_path, monkeypatch):
    report = analyse(study)
    paths = {path.name for path in write(report, tmp_path / "isoflop")}
    assert "leak.csv" in paths
    comparison = compare_study(report.frame)
    write_comparison(comparison, tmp_path)
    for text in (summary(report), (tmp_path / "compare.md").read_text()):
        assert ROW in text
        assert "| moe | 2e10 | top1 (not ranked) | 12 | +0.0550 |" in text
        assert EXPLAINED in text
        assert "moe (threshold routing)" in text
    assert (
        "# Comparison of dense, moe (threshold routing) in" in (tmp_path / "compare.md").read_text()
    )
    assert "moe (threshold routing)" in summary(report)
    assert "not causal" not in summary(report)
    (legend,) = figures.plot_isoflop(report.fit, report.frame).legends
    assert any("moe (threshold routing)" in text.get_text() for text in legend.get_texts())
    page = write_page(monkeypatch, study, tmp_path / "report.html")
    assert TITLE in page
    assert "moe (threshold routing)" in page


def test_the_pair_is_ranked(frame):
    claims = [claim for found in compare_study(frame).claims.values() for claim in found]
    assert all(claim.ranked for claim in claims)
    assert {claim.protocol.dropless.met for claim in claims} == {True}
    assert {claim.protocol.causal.evidence for claim in claims} == {
        "dense: causal; moe (threshold routing): causal"
    }


def test_a_prediction_names_the_routing(tmp_path, monkeypatch, capsys):
    for path in sorted(COMMITTED.glob(f"moe-*/{RECORD}")):
        write_record(ranked(read_record(path)), tmp_path / "isoflop_laptop" / path.parent.name)
    options = ["--budget", "2e11", "--variant", "moe", "--force"]
    monkeypatch.setattr(sys, "argv", ["peer-analyze", "predict", str(tmp_path), *options])
    cli.main()
    assert "# moe (threshold routing) at 2e11" in capsys.readouterr().out
