"""F31: no file that we read is unpickled; a pickle in its place is refused or made anew."""

import shutil
from itertools import islice, product

import pytest
from safetensors import SafetensorError

from drive import run_all
from peer_scaling.publish import load_weights
from peer_scaling.tokenizer import load_tokenizer
from pickles import FORMS, load
from planned_runs import make_run
from scorecard import report
from studies import COMMANDS, failures, trained_study
from tiers import count

CORPUS = (
    "cache/*/manifest.json", "cache/*/train-00000.bin", "cache/*/validation-*.bin",
    "cache/*/validation-documents.npy",
)  # fmt: skip
TARGETS = (
    "runs/own/*/record.json", "runs/own/*/history.jsonl", "runs/own/*/model.safetensors",
    "runs/own/plan.csv", "cache/*/tokenizer.json", "mine/own.yaml", *CORPUS,
)  # fmt: skip
"""Patterns of the files that a command may read in a folder with a study that has run."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_study(tmp_path_factory)


def test_no_pickle_is_executed_by_a_command(trained, tmp_path):
    pairs = list(islice(((t, f) for f, t in product(FORMS, TARGETS)), count(10, 50)))
    commands, canaries = [], []
    for number, (target, form) in enumerate(pairs):
        folder = tmp_path / str(number)
        shutil.copytree(trained, folder, copy_function=shutil.copy2)
        canaries.append(tmp_path / f"canary-{number}")
        (place,) = folder.glob(target)
        place.write_bytes(form(canaries[-1]))
        commands += [(folder, command) for command in COMMANDS]
    outcomes = run_all(commands, "commands")
    executed = [pair for pair, canary in zip(pairs, canaries, strict=True) if canary.exists()]
    bad = failures(commands, outcomes)
    report(
        "F31",
        f"{len(pairs)} pickles, {len(commands)} commands: {len(executed)} executed, {len(bad)} tracebacks",
    )
    assert not executed
    assert not bad
    damaged = [o for o in outcomes if o["code"] == 2 and "damaged; delete" in o["err"]]
    assert len(damaged) == sum(target in CORPUS for target, _ in pairs)


@pytest.mark.parametrize("form", FORMS)
def test_no_pickle_is_executed_by_a_loader(tmp_path, form):
    canary = tmp_path / "canary"
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(form(canary))
    model = make_run(tmp_path, ffw="dense").model()
    with pytest.raises(SafetensorError):
        load_weights(model, tmp_path)
    with pytest.raises(Exception, match=r"expected value|UTF-8|utf-8"):
        load_tokenizer(tmp_path, 0)
    assert not canary.exists()


@pytest.mark.parametrize("form", FORMS)
def test_control_a_careless_loader_executes_it(tmp_path, form):
    canary = tmp_path / "canary"
    load(form, form(canary))
    assert canary.exists()
