"""One study is one frame, wherever it is read from; what is unfinished loads with its reason."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from analysis import wandb_runs
from analysis.csv_runs import write_csv
from analysis.isoflop import fit_isoflop
from analysis.load import AnalysisError, as_frame, excluded, load_runs, usable
from analysis.profile import ProfileStatus
from analysis.schema import COLUMNS, NUMERIC, validate
from conftest import ROOT
from peer_scaling.publish import write_record
from peer_scaling.record import RECORD, read_record
from peer_scaling.track import RunLabels, TrackerConfig, WandbTracker, record_summary

COMMITTED = ROOT / "docs" / "figures" / "isoflop_laptop"
BROKEN = {
    "run_id": "peer-broken", "size": "d99_l2", "status": "diverged", "reason": "loss\nnan | \x00",
    "loss": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Records of a real study: one curve, and a run that diverged."""
    root = tmp_path_factory.mktemp("study") / "isoflop_laptop"
    for folder in sorted(COMMITTED.glob("dense-*-2e10-s0-*")):
        shutil.copytree(folder, root / folder.name)
    values = json.loads((folder / RECORD).read_text())
    (root / "peer-broken").mkdir()
    (root / "peer-broken" / RECORD).write_text(json.dumps(values | BROKEN))
    return root


@pytest.fixture(scope="module")
def offline(study, tmp_path_factory):
    """The same runs as the tracker mirrors them offline."""
    root = tmp_path_factory.mktemp("offline")
    for path in sorted(study.glob(f"*/{RECORD}")):
        mirror(read_record(path), root)
    return root


def mirror(record, root, finished=True):
    labels = RunLabels(record.run_id, record.study, ("tag",), record.config)
    tracker = WandbTracker(TrackerConfig(), labels, root / record.run_id, "offline")
    tracker.log({"tokens": 1, "flops": 2.0, "eval/loss": 9.0})
    tracker.finish(record if finished else None)


class FakeApi:
    """As much of `wandb.Api` as is used."""

    def __init__(self, runs=(), error=None):
        self.asked, self._runs, self._error = [], list(runs), error

    def runs(self, path, filters, lazy):
        self.asked.append((path, filters, lazy))
        if self._error:
            raise self._error
        return [run for run in self._runs if filters.get("group") in (None, run.group)]


def online(record, **changes):
    run = {"id": record.run_id, "group": record.study, "state": "finished"}
    config, summary = dict(record.config), record_summary(record)
    return SimpleNamespace(**{**run, "config": config, "summary_metrics": summary, **changes})


def test_records_csv_and_wandb_are_the_same_to_the_last_digit(study, offline, tmp_path):
    frame = load_runs(study)
    assert len(frame) == 7
    assert excluded(frame)["excluded"].tolist() == ["diverged: loss nan | \\x00"]
    write_csv(frame, tmp_path / "runs.csv")
    for again in map(load_runs, (tmp_path / "runs.csv", offline)):
        assert_frame_equal(again, frame, check_exact=True)
        assert repr(fit_isoflop(again)) == repr(fit_isoflop(frame))
    assert [p.status for p in fit_isoflop(frame).profiles] == [ProfileStatus.OK]


def test_online_runs_load_like_records_and_are_filtered_by_the_server(study, monkeypatch):
    records = [read_record(path) for path in study.glob(f"*/{RECORD}")]
    api = FakeApi([*map(online, records), online(records[0], group="other")])
    monkeypatch.setattr(wandb_runs, "_api", lambda: api)
    frame = load_runs("wandb:me/mine", "isoflop_laptop")
    assert api.asked == [("me/mine", {"group": "isoflop_laptop"}, False)]
    assert_frame_equal(frame, load_runs(study), check_exact=True)


def test_a_run_that_a_causal_route_ranks_is_the_same_from_each(tmp_path):
    record = read_record(next(COMMITTED.glob("moe-*-2e10-s0-*")) / RECORD)
    record = replace(record, causal_losses={"threshold": record.loss + 0.1, "top1": 3.0})
    write_record(record, tmp_path / "records" / record.run_id)
    mirror(record, tmp_path / "offline")
    frame = load_runs(tmp_path / "records")
    assert frame[["routing", "loss_top1"]].to_numpy().tolist() == [["threshold", 3.0]]
    write_csv(frame, tmp_path / "runs.csv")
    for again in map(load_runs, (tmp_path / "runs.csv", tmp_path / "offline")):
        assert_frame_equal(again, frame, check_exact=True)


def test_the_columns_are_those_of_the_schema_and_numbers_are_float64(study):
    frame = load_runs(study)
    assert frame.columns.tolist() == [column.name for column in COLUMNS]
    assert set(frame[list(NUMERIC)].dtypes.map(str)) == {"float64"}
    assert validate(frame) == []
    assert (frame["flops_chinchilla"] > frame["flops_non_embedding"]).all()


def test_every_column_is_documented_with_its_unit():
    lines = (ROOT / "docs" / "data-format.md").read_text().splitlines()
    for column in COLUMNS:
        (line,) = (line for line in lines if line.startswith(f"| `{column.name}` |"))
        assert f"| {column.unit} |" in line, column.name


def test_a_running_study_loads_with_the_cells_that_have_no_record(study, tmp_path):
    running = tmp_path / "mine"
    shutil.copytree(study, running)
    (running / "dense-begun").mkdir()
    for folder in (
        "dense-begun",
        "dense-begun/checkpoints/step-1",
        "alone",
        "alone/checkpoints/step-1",
    ):
        (running / folder).mkdir(parents=True, exist_ok=True)
        (running / folder / "history.jsonl").write_text('{"step": 1}\n')
    done = next(running.glob("dense-*-s0-*")).name
    (running / "plan.csv").write_text(
        "run_id,variant,size,budget,seed,flops,epochs,state,reason\n"
        f"{done},dense,d12_l2,2e10,0,2e10,0.1,missing,\n"
        "dense-begun,dense,d64_l2,2e10,0,2e10,0.1,missing,\n"
        "../../etc,dense,d65_l2,2e10,0,2e10,0.1,missing,\n"
        "short\n"
    )
    frame = load_runs(running)
    reasons = dict(zip(frame["run_id"], frame["excluded"], strict=True))
    assert (len(usable(frame)), len(frame)) == (6, 11)
    assert reasons["dense-begun"] == "no record yet: begun"
    assert reasons["../../etc"] == reasons["short"] == "no record yet: not begun"
    assert reasons["alone"] == "no record yet: begun"
    assert reasons[done] is None
    assert frame.loc[frame["run_id"] == "dense-begun", "budget"].tolist() == [2e10]
    (running / "plan.csv").write_bytes(b"\xff\xfe")
    assert any("plan.csv: not UTF-8" in why for why in excluded(load_runs(running))["excluded"])
    (running / "plan.csv").write_text("secret\n")
    assert any("not the plan" in why for why in excluded(load_runs(running))["excluded"])


def test_wandbs_own_runs_have_what_is_read_of_them(study, tmp_path, monkeypatch):
    """W&B's class, filled as its server answers; the others are stand-ins of the same shape."""
    from wandb.apis.public.runs import Run

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    record = read_record(next(study.glob(f"dense-*/{RECORD}")))
    answer = {
        "name": record.run_id, "group": record.study, "state": "finished", "projectId": "1",
        "config": json.dumps({key: {"value": value} for key, value in record.config.items()}),
        "summaryMetrics": json.dumps(record_summary(record)), "systemMetrics": "{}",
        "user": {"name": "u", "username": "u"}, "sweepName": None,
    }  # fmt: skip
    api = FakeApi([Run(None, "me", "mine", record.run_id, answer, lazy=False)])
    monkeypatch.setattr(wandb_runs, "_api", lambda: api)
    assert load_runs("wandb:me/mine", record.study)["loss"].tolist() == [record.loss]


def test_runs_of_wandb_that_have_not_ended_say_so(study, tmp_path, monkeypatch):
    record = read_record(next(study.glob(f"dense-*/{RECORD}")))
    others = [
        online(record, id="running", state="running", summary_metrics={"loss": 3.0, "tokens": 5}),
        online(record, id="stopped", state="failed", summary_metrics={"status": "interrupted"}),
        online(record, id="torn", summary_metrics={"peer_scaling_record": '{"schema": 1, "run'}),
    ]
    monkeypatch.setattr(wandb_runs, "_api", lambda: FakeApi([online(record), *others]))
    frame = load_runs("wandb:me/mine")
    reasons = dict(zip(frame["run_id"], frame["excluded"], strict=True))
    assert reasons.pop(record.run_id) is None
    assert reasons["running"] == "running"
    assert reasons["stopped"] == "interrupted"
    assert "not readable as JSON" in reasons["torn"]
    assert frame.loc[frame["run_id"] == "running", "budget"].tolist() == [record.budget]


def test_anybodys_wandb_runs_load_by_the_documented_names(monkeypatch):
    config = {"variant": "mine", "num_params_total": 10**6, "seed": 3, "lr": {"max": 1}}
    runs = [
        SimpleNamespace(
            id=name,
            group=None,
            state="finished",
            config=config,
            summary_metrics={"flops": 1e12, **summary},
        )
        for name, summary in {
            "a": {"loss": 3.25, "tokens": 2**70},
            "b": {"loss": "NaN", "tokens": 5},
            "c": {"tokens": 5},
        }.items()
    ]
    monkeypatch.setattr(wandb_runs, "_api", lambda: FakeApi(runs))
    frame = load_runs("wandb:mine")
    assert usable(frame)[["variant", "budget", "tokens", "loss", "size"]].values.tolist() == [
        ["mine", 1e12, 2.0**70, 3.25, "1e6"]
    ]
    assert excluded(frame)["excluded"].tolist() == ["impossible: loss='NaN'", "no loss"]


def test_a_run_that_was_started_again_offline_is_one_row(study, tmp_path):
    record = read_record(next(study.glob(f"dense-*/{RECORD}")))
    mirror(record, tmp_path)
    mirror(record, tmp_path, finished=False)
    (tmp_path / "offline-run-x").mkdir()
    (tmp_path / "offline-run-x" / "run-x.wandb").write_bytes(b"\x00junk" * 100)
    frame = load_runs(f"wandb-offline:{tmp_path}")
    assert usable(frame)["loss"].tolist() == [record.loss]
    assert excluded(frame)["run_id"].tolist() == ["offline-run-x"]
    assert "run-x.wandb: not readable" in excluded(frame)["excluded"].iloc[0]


def test_what_wandb_cannot_give_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    broken = FakeApi(error=ConnectionError(f"no route with {'f' * 40}\nsecond line"))
    monkeypatch.setattr(wandb_runs, "_api", lambda: broken)
    with pytest.raises(AnalysisError) as error:
        load_runs("wandb:me/mine")
    assert str(error.value).startswith("wandb:me/mine: no route with ***; it needs a network")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(wandb_runs, "_api", FakeApi)
    with pytest.raises(AnalysisError, match="no run in group s"):
        load_runs("wandb:me/mine", "s")
    with pytest.raises(AnalysisError, match=r"no \*\.wandb below it"):
        load_runs(f"wandb-offline:{tmp_path}")
    (tmp_path / "run.wandb").write_bytes(b"")
    monkeypatch.setattr(wandb_runs, "INSPECT", ("-m", "wandb", "leet", "no-such-command", "--json"))
    with pytest.raises(AnalysisError, match="pip install --upgrade wandb"):
        load_runs(f"wandb-offline:{tmp_path}")


def test_one_study_of_several(study, tmp_path):
    shutil.copytree(study, tmp_path / "runs" / "isoflop_laptop")
    other = json.loads(next(study.glob(f"dense-*/{RECORD}")).read_text()) | {"study": "other"}
    (tmp_path / "runs" / "other" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "x" / RECORD).write_text(json.dumps(other))
    assert len(load_runs(tmp_path / "runs")) == 8
    assert set(load_runs(tmp_path / "runs", "other")["study"]) == {"other"}
    with pytest.raises(AnalysisError, match="no run of study third"):
        load_runs(tmp_path / "runs", "third")


def test_everything_wrong_with_a_frame_is_said_at_once():
    frame = pd.DataFrame({"variant": ["a"], "budget": ["much"], "loss": [3]})
    with pytest.raises(AnalysisError) as error:
        as_frame(frame)
    assert str(error.value).splitlines() == [
        "runs without num_params_total, tokens: every run needs these columns",
        f"column budget is {frame['budget'].dtype}, not float64: 'much'",
    ]
    good = {"variant": "a", "budget": 1e9, "num_params_total": 9, "tokens": 2**62, "loss": 3}
    twice = pd.DataFrame([[*good.values(), 3]], columns=[*good, "loss"])
    with pytest.raises(AnalysisError, match="column loss occurs twice"):
        as_frame(twice)
    frame = as_frame([good | {"status": "failed"}, good])
    assert frame["excluded"].tolist() == ["failed", None]
    assert (frame["tokens"] * 6 * frame["num_params_total"]).min() > 2**63


def test_importing_analysis_is_cheap():
    """Seconds of CPU, because tests run side by side; wall time is more only on a busy machine."""
    heavy = ["torch", "hydra", "omegaconf", "wandb", "transformers", "datasets", "matplotlib"]
    code = (
        "import analysis, analysis.cli, sys, time;"
        f"print(time.process_time(), [m for m in {heavy} if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        for _ in range(3)
    ]
    assert {output.split(maxsplit=1)[1].strip() for output in outputs} == {"[]"}
    assert min(float(output.split()[0]) for output in outputs) < 1.5
