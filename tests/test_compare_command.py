"""`peer-analyze compare`: what it prints and writes, and what records say of a comparison."""

import sys
from dataclasses import replace

import pandas as pd
import pytest

from analysis import cli
from analysis.csv_runs import write_csv
from analysis.load import load_runs
from analysis.records import record_row
from compared import study
from conftest import ROOT
from peer_scaling.record import RECORD, read_record

LAPTOP = ROOT / "docs" / "figures" / "isoflop_laptop"


def compare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["peer-analyze", "compare", *map(str, arguments)])
    cli.main()


def test_verdicts_are_printed_and_written(tmp_path, monkeypatch, capsys):
    compare(monkeypatch, LAPTOP, "--out", tmp_path)
    text = capsys.readouterr().out
    assert (tmp_path / "compare.md").read_text() in text
    for part in (
        "| gap | equal FLOPs | equal wall-clock | equal memory |",
        "18 pairs and budgets, 9 of them ranked and tested at equal FLOPs; 0 claims shown",
        "not shown",
        "convention-dependent",
        "peer-train --config-name isoflop_laptop variant=dense,peer budget=2e10 seed=",
    ):
        assert part in text
    quoted = (ROOT / "docs" / "compare.md").read_text().splitlines()
    quoted = [line for line in quoted if line.startswith(("| peer - ", "| pkm - "))]
    assert len(quoted) == 9
    assert set(quoted) <= set(text.splitlines())
    table = pd.read_csv(tmp_path / "compare.csv")
    assert len(table) == 18
    assert table["mde"].gt(0).sum() == table["nats"].notna().sum() == 15
    assert table["seconds_nats"].notna().all()
    assert len(pd.read_csv(tmp_path / "claims.csv")) == 18 * 3 * 13


def test_a_study_without_dense_and_with_an_unusable_run(tmp_path, monkeypatch, capsys):
    frame, _ = study(variants=("a", "b"))
    frame.loc[0, "loss"] = float("nan")
    write_csv(frame, tmp_path / "runs.csv")
    compare(monkeypatch, tmp_path / "runs.csv", "--out", tmp_path)
    text = capsys.readouterr().out
    assert "209 of 210 runs used; 3 pairs and budgets" in text
    assert "| b - a at 1e18 | +0.0" in text
    assert "\n## Excluded runs\n\n- a-1e+18-0.25-0: " in text


def test_runs_at_other_rates_are_found_in_the_studies_beside_it(tmp_path, monkeypatch, capsys):
    _, both = study()
    write_csv(both, tmp_path / "runs.csv")
    compare(monkeypatch, tmp_path / "runs.csv", "--study", "made", "--out", tmp_path)
    assert "9 claims shown" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "compare.csv")
    assert table["verdict_memory"].tolist() == [
        f"peer beats dense at {C}" for C in ("1e18", "4e18", "1.6e19")
    ]
    assert table["numbers_alone"].tolist() == ["peer lower"] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([LAPTOP, "--baseline", "x"], "error: --baseline x: no such variant; choose one of dense"),
        ([LAPTOP, "--study", "x"], "no run of study x"),
        ([LAPTOP, "--out", LAPTOP / "summary.md"], "error: --out "),
    ],
)
def test_what_a_user_got_wrong_is_one_line(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        compare(monkeypatch, *arguments)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_records_say_what_was_dropped_and_on_which_device():
    frame = load_runs(LAPTOP)
    assert set(frame["device"]) == {"x86_64, threads=1"}
    assert set(frame.loc[frame["dropless"].isin([False]), "variant"]) == {"moe"}
    record = read_record(next(LAPTOP.glob("moe-*")) / RECORD)
    token_choice = {**record.config, "ffw": {**record.config["ffw"], "router": "token_choice"}}
    assert record_row(record)["dropless"] is False
    assert record_row(replace(record, config=token_choice))["dropless"] is True
    assert record_row(replace(record, config={}))["dropless"] is None
    two = {"device": "NVIDIA H100", "world_size": 2}
    assert record_row(replace(record, environment=two))["device"] == "2 x NVIDIA H100"
    assert record_row(replace(record, environment={}))["device"] is None
