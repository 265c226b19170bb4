"""F30: no configuration runs code, reads a secret or writes outside its study's folder."""

import os
import random
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cases import Case, study, study_text
from drive import drive
from hostile import CALLS, CANARY, FAST, HANDLERS, SECRET, hostile, planned_id
from scorecard import report
from tiers import count

PLANTED = "import pathlib\npathlib.Path('CANARY').touch()\nx = None\n"
"""A module that a configuration may try to have imported."""


def attack(cases, tmp_path, **environment):
    """Run cases with secrets around; what each did: (case, folder, outcome, list of harms)."""
    root, home = tmp_path / "cases", tmp_path / "home"
    for folder in (root, home, tmp_path / "modules"):
        folder.mkdir()
    (tmp_path / "modules" / "planted_module.py").write_text(PLANTED)
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"), SECRET)
    python = {"HOME": str(home), "PYTHONPATH": str(tmp_path / "modules"), "WANDB_MODE": "offline"}
    results = drive(cases, root, "train", **secrets, **python, **environment)
    stray = (*tmp_path.iterdir(), *home.rglob("*"), *root.iterdir())
    known = {root, home, tmp_path / "modules", *(folder for _, folder, _ in results)}
    strays = [f"stray {path}" for path in stray if path not in known and ".cache" not in path.parts]
    harms = [(c, f, o, harm(c, f, o)) for c, f, o in results]
    return harms, strays


def harm(case, folder, outcome):
    """What a case did that it must not."""
    text = outcome["out"] + outcome["err"]
    harms = ["secret printed"] if SECRET in text else []
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent) / name for name in (*folders, *files)):
            within = path.relative_to(folder)
            harms += harm_of(case, path, within)
    return harms


def harm_of(case, path, within):
    if path.name == CANARY:
        return ["code ran"]
    if str(within) in case.links or path.is_dir():
        own = ("mine", "runs", "outside", "wandb")
        return [] if within.parts[0] in own or path.is_symlink() else [f"folder {within}"]
    if str(within) in case.files:
        changed = path.read_bytes() != case.files[str(within)].encode("utf-8", "surrogateescape")
        return [f"changed {within}"] if changed else []
    if path.is_file() and SECRET.encode() in path.read_bytes():
        return ["secret written"]
    return [] if within.parts[0] == "runs" and len(within.parts) > 2 else [f"wrote {within}"]


def test_hostile_configurations_do_nothing(tmp_path):
    cases = hostile(random.Random(30), count(30, 200))
    results, strays = attack(cases, tmp_path)
    bad = [(c.kind, c.arguments, c.files, o["err"][-500:], h) for c, _, o, h in results if h]
    tracebacks = [(c, o) for c, _, o, _ in results if "Traceback" in o["err"]]
    ran = sum("code ran" in h for *_, h in results)
    report(
        "F30",
        f"{len(cases)} hostile: {ran} executions, {len(bad)} harmful, {len(strays)} stray files, {len(tracebacks)} tracebacks",
    )
    assert not bad
    assert not strays
    assert not tracebacks
    assert sum(o["code"] == 2 for _, _, o, _ in results) > 0.8 * len(cases)


UNGUARDED = {
    "code ran": Case("callback", (*FAST, f"+hydra.callbacks.x={CALLS[0]}")),
    "code ran, logging": Case("logging", (*FAST, f"+hydra.job_logging.handlers.x={HANDLERS[1]}")),
    "code ran, variant": study(study_text(variants=f"{{dense: {CALLS[0]}}}"), kind="variant"),
    "code ran, module": Case("searchpath", (*FAST, "hydra.searchpath=[pkg://planted_module]")),
    "secret written": Case("reference", (*FAST, "variant=${oc.env:WANDB_API_KEY}")),
    "wrote escaped": Case("folder", (*FAST, "hydra.output_subdir=escaped")),
    "changed outside/history.jsonl": Case(
        "link", (*FAST, "study=own"), {"outside/history.jsonl": "untouched"},
        links={f"runs/own/{planned_id()}": "../../outside"},
    ),
}  # fmt: skip


def test_control_without_protection_all_of_it_happens(tmp_path):
    results, _ = attack(list(UNGUARDED.values()), tmp_path, UNGUARDED="1")
    for expected, (_, _, outcome, harms) in zip(UNGUARDED, results, strict=True):
        assert any(h.startswith(expected.split(",")[0]) for h in harms), (expected, harms, outcome)


def test_links_are_not_followed(tmp_path):
    results, _ = attack([UNGUARDED["changed outside/history.jsonl"]], tmp_path)
    ((*_, outcome, harms),) = results
    assert harms == []
    assert "leads out of runs; remove it" in outcome["err"]


def test_control_a_target_is_imported(tmp_path, monkeypatch):
    (tmp_path / "planted_module.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InstantiationException):
        instantiate(OmegaConf.create(CALLS[0]))
    assert Path(CANARY).exists()
