"""From records on disk to files: nothing is dropped silently, equal records give equal files."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from analysis import figures, tables
from analysis.isoflop import fit_isoflop
from analysis.load import AnalysisError, excluded, load_runs, usable
from analysis.profile import Profile
from analysis.report import analyse, summary, write
from peer_scaling.publish import write_record
from peer_scaling.record import RECORD, RunRecord, read_record
from surfaces import WIDTHS, known, runs

RECORD_OF = {
    "run_id": "dense-d8_l2-1e9-s0-0000", "study": "s", "status": "done", "reason": None,
    "ffw": "dense", "variant": "dense", "size": "d8_l2", "seed": 0, "budget": 1e9, "flops": 1e9,
    "loss": 3.0, "tokens": 1000, "num_params_total": 500, "num_params_active": 500,
    "protocol": "p", "finished_at": "2026-01-01T00:00:00+00:00", "config": {"ffw": {"name": "dense"}},
}  # fmt: skip


def written(root, **changes):
    record = RunRecord(**{**RECORD_OF, **changes})
    write_record(record, root / record.run_id)
    return record


def test_records_survive_a_round_trip(tmp_path):
    record = written(tmp_path, perplexity=float("nan"), flops_by_component={"head": 2.0})
    again = read_record(tmp_path / record.run_id / RECORD)
    assert again == replace(record, perplexity=None)
    assert asdict(again)["flops_by_component"] == {"head": 2.0}


def test_every_row_that_is_not_used_says_why(tmp_path):
    written(tmp_path)
    written(tmp_path, run_id="b", size="d16_l2", status="diverged", reason="loss nan", loss=None)
    written(
        tmp_path, run_id="c", size="d24_l2", protocol="other", finished_at="2025-01-01T00:00:00"
    )
    written(tmp_path, run_id="d", finished_at="2025-06-01T00:00:00")
    written(
        tmp_path,
        run_id="e",
        size="d32_l2",
        finished_at="2025-01-01T00:00:00",
        config={"ffw": {"ratio": 2}},
    )
    written(tmp_path, run_id="f", size="d48_l2", loss=None)
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / RECORD).write_text('{"schema": 1, "run')
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / RECORD).write_text('{"schema": 99}')
    frame = load_runs(tmp_path)
    assert usable(frame)["run_id"].tolist() == [RECORD_OF["run_id"]]
    reasons = dict(zip(excluded(frame)["run_id"], excluded(frame)["excluded"], strict=True))
    assert reasons["b"] == "diverged: loss nan"
    assert reasons["c"].startswith("other data, optimiser or backbone than s's latest run")
    assert reasons["d"] == f"superseded by {RECORD_OF['run_id']}"
    assert reasons["e"].startswith("other settings of dense")
    assert reasons["f"] == "no loss"
    assert "not readable as JSON" in reasons["g"]
    assert "schema 99 is newer" in reasons["h"]
    assert len(frame) == 8


def test_a_record_from_disk_is_data(tmp_path):
    (tmp_path / "x").mkdir()
    hostile = {**RECORD_OF, "schema": 1, "_target_": "os.system", "extra": 1}
    (tmp_path / "x" / RECORD).write_text(json.dumps(hostile))
    assert load_runs(tmp_path)["run_id"].tolist() == [RECORD_OF["run_id"]]


@pytest.mark.parametrize(
    "damage",
    [
        {"loss": "abc"}, {"loss": float("nan")}, {"budget": None}, {"config": None}, {"variant": None},
        {"finished_at": 5}, {"flops_per_second": "x"}, {"seed": True},
    ],
)  # fmt: skip
def test_a_damaged_record_is_a_row_with_a_reason(tmp_path, damage):
    written(tmp_path)
    values = json.loads((tmp_path / RECORD_OF["run_id"] / RECORD).read_text())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / RECORD).write_text(json.dumps(values | damage))
    (row,) = excluded(load_runs(tmp_path)).to_dict("records")
    assert row["run_id"] == "bad"
    assert f"not what a record holds: {next(iter(damage))}=" in row["excluded"]


def test_nothing_to_analyse_is_said_in_one_line(tmp_path):
    with pytest.raises(AnalysisError, match="no such folder"):
        load_runs(tmp_path / "nowhere")
    with pytest.raises(AnalysisError, match=r"no record\.json below it"):
        load_runs(tmp_path)
    written(tmp_path, status="failed", reason="x")
    with pytest.raises(AnalysisError, match="none of 1 runs is usable"):
        analyse(tmp_path)
    written(tmp_path / "a", run_id="1", study="a")
    written(tmp_path / "b", run_id="2", study="b")
    with pytest.raises(AnalysisError, match="several studies"):
        analyse(tmp_path)


@pytest.fixture
def study(tmp_path):
    """A study on disk: three variants, one of them not causal, one curve without a minimum."""
    frame = runs(known, variants=("dense", "moe", "peer"), noise=0.001)
    frame.loc[(frame["variant"] == "moe") & (frame["budget"] == 4e12), "loss"] = [
        3.5,
        3.3,
        3.15,
        3.05,
        3.0,
        2.98,
    ]
    for row in frame.to_dict("records"):
        fields = {
            k: row[k] for k in ("run_id", "variant", "ffw", "size", "budget", "seed", "causal")
        }
        numbers = {
            k: row[k] for k in ("flops", "loss", "tokens", "num_params_total", "num_params_active")
        }
        if row["variant"] == "peer":
            numbers |= {"expert_usage": 0.5, "expert_unevenness": 0.25}
        written(tmp_path / "made", **fields, **numbers, study="made")
    written(
        tmp_path / "made",
        run_id="x",
        size="huge",
        budget=1e12,
        status="failed",
        reason="out of memory",
    )
    return tmp_path / "made"


def test_the_report_is_complete(study, tmp_path):
    report = analyse(study)
    paths = write(report, tmp_path / "out")
    names = {path.name for path in paths}
    assert names >= {
        "isoflop.png", "isoflop.svg", "scaling.png", "optima.csv", "perplexity.md",
        "perplexity.tex", "perplexity.csv", "multipliers.csv", "summary.md", "runs.csv",
    }  # fmt: skip
    assert all(path.stat().st_size > 0 for path in paths)
    text = summary(report)
    for part in ("moe (not causal)", "moe at 4e12: edge", "x: failed: out of memory", "one seed"):
        assert part in text
    optima = pd.read_csv(tmp_path / "out" / "optima.csv")
    assert optima.loc[optima["variant"] == "peer", "loss"].tolist() == pytest.approx(
        [known("peer", C)[1] for C in (1e12, 4e12, 16e12)], abs=0.01
    )


def test_expert_use_is_that_of_the_best_trained_size(study):
    report = analyse(study)
    table = tables.expert_use_table(report.fit, report.frame)
    assert table.index.tolist() == ["peer"] * 3
    assert table["budget"].tolist() == ["1e12", "4e12", "1.6e13"]
    assert table["usage (%)"].tolist() == ["50.0"] * 3
    assert table["unevenness"].tolist() == ["0.25"] * 3
    best = [report.fit.profile("peer", C).best_loss for C in (1e12, 4e12, 1.6e13)]
    assert table["perplexity"].astype(float).tolist() == pytest.approx(np.exp(best), abs=0.01)
    assert "| 1048576 | batch | 20.64 | 100.0 | 1.06 |" in summary(report)


def test_what_is_not_causal_is_marked_wherever_it_is_shown(study, tmp_path):
    report = analyse(study)
    write(report, tmp_path / "out")
    for name in ("optima", "multipliers", "power_laws"):
        table = pd.read_csv(tmp_path / "out" / f"{name}.csv")
        assert table.loc[table["variant"] == "peer", "causal"].all()
        assert not table.loc[table["variant"] == "moe", "causal"].any()
    lines = summary(report).split("He 2024")[0] + summary(report).split("## Compute mult")[1]
    shown = [line for line in lines.splitlines() if line.startswith(("- moe", "| moe"))]
    assert len(shown) >= 6
    assert all("(not causal)" in line for line in shown if "sizes, lowest" not in line)
    (legend,) = figures.plot_scaling(report.fit, report.frame).legends
    assert any("moe (not causal)" in text.get_text() for text in legend.get_texts())


def test_equal_records_give_equal_files(study, tmp_path):
    for folder in ("one", "two"):
        write(analyse(study), tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_figure_shows_every_run_and_every_budget(study):
    report = analyse(study)
    figure = figures.plot_isoflop(report.fit, report.frame)
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in panels] == [
        f"{c} training FLOPs" for c in ("1e12", "4e12", "1.6e13")
    ]
    points = [line for line in panels[0].lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in points) >= 3 * len(WIDTHS)


def test_latex_special_characters_are_escaped():
    table = pd.DataFrame({"a_b": ["50 %"]}, index=pd.Index(["x & y"], name="variant"))
    assert r"x \& y & 50 \% \\" in tables.to_latex(table)
    assert r"a\_b" in tables.to_latex(table)


def test_unknown_variants_get_looks_of_their_own():
    assert len(set(figures.looks(["dense", "peer", "peer_16k", "peer_64k"]).values())) == 4


def test_analysis_imports_no_training_stack():
    heavy = ["torch", "hydra", "omegaconf", "wandb", "transformers", "datasets"]
    code = (
        "import analysis, importlib, pkgutil, sys;"
        "[importlib.import_module(f'analysis.{m.name}') for m in pkgutil.iter_modules(analysis.__path__)];"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_types_are_frozen():
    profile = fit_isoflop(runs(known)).profiles[0]
    assert isinstance(profile, Profile)
    with pytest.raises(AttributeError):
        profile.loss = 0.0
