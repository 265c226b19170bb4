"""`peer-eval` on real runs: what it writes, what it leaves alone, what it refuses."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch

from peer_scaling import eval_command, eval_sets, evaluator
from peer_scaling.eval_command import options_from
from peer_scaling.evaluator import evaluate_run
from peer_scaling.record import EVALUATION
from peer_scaling.train import run_once
from peer_scaling.trained import load_trained
from planned_runs import make_planned

TEXT = [
    "data=sotu",
    "data.tokenizer.kind=bytes",
    "data.tokenizer.vocab_size=257",
    "data.context=32",
]
CPU = torch.device("cpu")
SENTENCES = [
    f"The number of the year {year} was {year % 7}, and so it went on" for year in range(40)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One run per layer, trained for some steps on real text."""
    root = tmp_path_factory.mktemp("runs")
    made = {}
    for ffw in ("dense", "moe", "peer"):
        planned = make_planned(root, *TEXT, "study=eval", ffw=ffw)
        run_once(planned)
        made[ffw] = planned.folder
    return made


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": s}) + "\n" for s in SENTENCES))
    return path


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setattr(eval_sets, "_unreachable", lambda hub: "ConnectError")


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["peer-eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        eval_command.main()
    return ended.value.code, *capsys.readouterr()


def evaluation(folder):
    return json.loads((folder / EVALUATION).read_text())


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}  # fmt: skip


def test_sets_are_evaluated_and_what_is_missing_is_said(folders, text_file, monkeypatch, capsys):
    folder = folders["peer"]
    before = digests(folder)
    paths = [f"eval.sets.{name}.path={text_file}" for name in ("c4", "lambada")]
    code, out, err = command(monkeypatch, capsys, folder, *paths)
    assert (code, err) == (0, "")
    assert out.count("missing: ") == 3
    assert "eval.sets.curation_corpus.path=<file>" in out
    assert digests(folder).items() >= before.items()
    content = evaluation(folder)
    assert set(content["sets"]) == {"c4", "wikitext", "pile", "lambada", "curation_corpus"}
    counts = content["sets"]["lambada"]["counts"]
    assert (counts["documents"], counts["words"], counts["bytes"]) == (40, 40, 40 * len(" on"))
    (result,) = content["sets"]["c4"]["results"]
    assert (result["routing"], result["causal"]) == ("as trained", True)
    assert result["token_perplexity"] < 257
    assert str(text_file.parent) not in json.dumps(content)
    assert content["tokenizer"]["kind"] == "bytes"
    assert content["weights_sha256"] == before["model.safetensors"]


def test_bits_per_byte_of_bytes_is_the_token_loss(folders, text_file):
    """With a tokenizer of bytes both count the same things."""
    _, sets = options_from(["eval.only=[c4]", f"eval.sets.c4.path={text_file}"])
    entry = evaluate_run(load_trained(folders["dense"]), sets, CPU)["c4"]
    (result,), counts = entry["results"], entry["counts"]
    assert counts["tokens"] == counts["bytes"] == sum(map(len, SENTENCES))
    assert 2 ** result["bits_per_byte"] == pytest.approx(result["token_perplexity"], rel=1e-12)


def test_sets_of_an_earlier_evaluation_stay(folders, text_file, monkeypatch, capsys):
    folder = folders["dense"]
    for name in ("pile", "c4"):
        command(monkeypatch, capsys, folder, f"eval.only=[{name}]", f"eval.sets.{name}.path={text_file}")  # fmt: skip
    command(monkeypatch, capsys, folder, "eval.only=[c4]")  # cannot be read: the number stays
    kept = evaluation(folder)["sets"]
    assert all("results" in kept[name] for name in ("pile", "c4"))
    other = ["eval.only=[lambada]", f"eval.sets.lambada.path={text_file}", "eval.stride=8"]
    before = evaluation(folder)
    _, out, _ = command(monkeypatch, capsys, folder, "eval.only=[c4]", "eval.stride=8")
    assert "of another model or protocol, left as it is" in out  # nothing was evaluated
    assert evaluation(folder) == before
    _, out, _ = command(monkeypatch, capsys, folder, *other)  # another protocol: not mixed
    assert list(evaluation(folder)["sets"]) == ["lambada"]
    (aside,) = folder.glob("evaluation-*.json")
    assert f"that of another model or protocol is {aside.name} now" in out
    assert json.loads(aside.read_text()) == before
    aside.unlink()


@pytest.mark.parametrize("ffw", ["dense", "moe", "peer"])
def test_the_batch_size_does_not_matter(folders, text_file, ffw):
    found = []
    for size in (1, 5, 64):
        _, sets = options_from(["eval.only=c4", f"eval.sets.c4.path={text_file}"])
        entry = evaluate_run(load_trained(folders[ffw]), sets, CPU, batch_size=size)["c4"]
        found.append([r["nats"] / entry["counts"]["tokens"] for r in entry["results"]])
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-4)


def test_expert_choice_is_scored_by_every_route(folders, text_file, monkeypatch, capsys):
    folder = folders["moe"]
    code, out, _ = command(monkeypatch, capsys, folder, "eval.only=[c4]", f"eval.sets.c4.path={text_file}")  # fmt: skip
    assert code == 0
    assert "as trained (not causal)" in out
    results = evaluation(folder)["sets"]["c4"]["results"]
    assert [(r["routing"], r["causal"]) for r in results] == [
        ("as trained", False),
        ("threshold", True),
        ("top1", True),
    ]
    assert len({r["nats"] for r in results}) == 3


def test_cutoffs_are_those_of_the_end_of_training(folders):
    """On the study's own validation tokens, the command's threshold routing gives the record's loss."""
    from peer_scaling.data import Windows
    from peer_scaling.scoring import Encoded
    from peer_scaling.trained import corpus_of

    trained = load_trained(folders["moe"])
    windows = Windows(corpus_of(trained), "validation", trained.run.data.context)
    number = trained.record.val_tokens // windows.context
    encoded = [Encoded(windows.read(range(i, i + 1))[0], 1) for i in range(number)]
    scorers = evaluator._scorers(trained, CPU, windows.context, 8)
    for route, loss in trained.record.causal_losses.items():
        scores = scorers[route](encoded)
        assert scores.nats_D.sum() / scores.tokens_D.sum() == pytest.approx(loss, abs=1e-5)


def test_a_study_is_evaluated_run_by_run(folders, text_file, monkeypatch, capsys):
    study = folders["dense"].parent
    arguments = ["eval.only=[c4]", f"eval.sets.c4.path={text_file}"]
    code, out, _ = command(monkeypatch, capsys, study, *arguments)
    assert code == 0
    assert all(folder.name in out for folder in folders.values())


def test_which_experts_are_used_is_a_file(folders, tmp_path, monkeypatch, capsys):
    record = load_trained(folders["peer"]).record
    path = tmp_path / "experts.csv"
    code, out, _ = command(monkeypatch, capsys, folders["peer"], "--experts", path)
    assert (code, f"{record.val_tokens:,} validation tokens" in out) == (0, True)
    table = pd.read_csv(path)
    assert list(table) == ["expert", "score", "choices"]
    assert len(table) == 64
    assert (table["score"] > 0).mean() == record.expert_usage
    assert table["choices"].sum() == record.val_tokens * 2 * 4  # heads times experts per head
    code, _, err = command(monkeypatch, capsys, folders["dense"], "--experts", path)
    assert (code, err) == (2, "error: --experts: ffw=dense has no experts; leave it out\n")


def test_a_model_is_exported(folders, tmp_path, monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, folders["dense"], "--export", tmp_path / "out")
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    code, _, err = command(monkeypatch, capsys, folders["dense"], "--export", tmp_path / "out")
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["eval.only=[c4]"], "no RUN: nothing to evaluate"),
        (["{run}", "eval.stride=64"], "eval.stride=64 exceeds the context of 32 tokens"),
        (["{run}", "eval.device=tpu7"], "device=tpu7"),
        (["{run}", "eval.device=meta"], "eval.device=meta: use auto, cpu"),
        (["{run}", "eval.sets.c4=null"], "eval.sets.c4=None is no set"),
        (["{run}", "--experts", "record.json"], "must end in .csv"),
        (["{run}", "--experts", "x.csv", "eval.stride=3"], "eval.stride=3: nothing is evaluated"),
        (["{run}", "evall.only=x"], "evall"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(folders, monkeypatch, capsys, arguments, line):
    named = [a.format(run=folders["dense"]) for a in arguments]
    code, _, err = command(monkeypatch, capsys, *named)
    assert code == 2
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1


def test_a_run_without_weights_or_of_other_weights_is_refused(folders, tmp_path, monkeypatch, capsys):  # fmt: skip
    copy = tmp_path / "copy"
    shutil.copytree(folders["dense"], copy)
    (copy / "model.safetensors").write_bytes((folders["peer"] / "model.safetensors").read_bytes())
    code, _, err = command(monkeypatch, capsys, copy)
    assert (code, "not the weights of" in err) == (2, True)
    (copy / "model.safetensors").unlink()
    code, _, err = command(monkeypatch, capsys, copy)
    assert (code, "train the run with save_model=true" in err) == (2, True)


def test_nothing_evaluated_is_exit_code_1(folders, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, folders["dense"], "eval.only=[c4]")
    assert (code, out.count("missing: ")) == (1, 1)


@pytest.mark.parametrize("place", ["write", "sync", "rename", "publish"])
def test_a_kill_leaves_the_old_evaluation_or_the_new_one(tmp_path, place):
    from peer_scaling.evaluation import write_evaluation

    write_evaluation(tmp_path, {"run_id": "r"}, {"c4": {"results": []}})
    before = evaluation(tmp_path)
    code = (
        "from pathlib import Path; from peer_scaling.evaluation import write_evaluation; "
        f"write_evaluation(Path({str(tmp_path)!r}), {{'run_id': 'r'}}, {{'pile': {{'results': []}}}})"
    )
    environment = {**os.environ, "FAULT_AT": f"evaluation.{place}"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    after = evaluation(tmp_path)
    assert after == before or set(after["sets"]) == {"c4", "pile"}


def test_what_is_wrong_with_one_run_stops_no_other(folders, text_file, tmp_path, monkeypatch, capsys):  # fmt: skip
    study = tmp_path / "study"
    for name, ffw in (("a", "dense"), ("b", "peer")):
        shutil.copytree(folders[ffw], study / name)
    record = json.loads((study / "a" / "record.json").read_text())
    leaky = {**record, "status": "invalid", "reason": "leak: labels"}
    (study / "a" / "record.json").write_text(json.dumps(leaky))
    code, out, err = command(monkeypatch, capsys, study, "eval.only=c4", f"eval.sets.c4.path={text_file}")  # fmt: skip
    assert (code, err) == (1, "")
    assert "a: left out: " in out
    assert "invalid: leak: labels" in out
    assert "results" in evaluation(study / "b")["sets"]["c4"]


def test_rows_without_text_are_counted_and_left_out(folders, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "go home"}, {"text": None}, {"text": ""}, {"text": "stay here"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("lambada", "c4"):
        arguments = [f"eval.only=[{name}]", f"eval.sets.{name}.path={path}"]
        code, out, _ = command(monkeypatch, capsys, folders["peer"], *arguments)
        assert (code, "2 rows without text left out" in out) == (0, True)
        counts = evaluation(folders["peer"])["sets"][name]["counts"]
        assert (counts["documents"], counts["without_text"]) == (2, 2)
    only_space = tmp_path / "space.jsonl"
    only_space.write_text(json.dumps({"text": "go "}) + "\n")
    arguments = ["eval.only=[lambada]", f"eval.sets.lambada.path={only_space}"]
    assert command(monkeypatch, capsys, folders["peer"], *arguments)[0] == 0
    assert evaluation(folders["peer"])["sets"]["lambada"]["results"][0]["word_perplexity"] is None


def test_stored_reasons_name_no_folder(folders, tmp_path, monkeypatch, capsys):
    path = tmp_path / "nowhere" / "x.jsonl"
    _, out, _ = command(monkeypatch, capsys, folders["peer"], f"eval.sets.pile.path={path}")
    assert str(path) in out
    reason = evaluation(folders["peer"])["sets"]["pile"]["missing"]
    assert reason == "eval.sets.pile.path=x.jsonl: no such file"
