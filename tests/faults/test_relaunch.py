"""F26 to F28: what a second start of a study runs. Records are made up, so that nothing is trained."""

import csv
import json
import shutil
import statistics
import time
from copy import deepcopy

import pytest
import yaml

from analysis.load import load_runs
from commands import peer_train
from drive import run_all
from peer_scaling import planned
from planned_runs import make_run
from scorecard import report
from tiers import count

ARGUMENTS = ("--config-dir", "mine", "--config-name", "own")
SIZES = ["d8_l2", "d12_l2", "d16_l2", "d20_l2", "d24_l2", "d32_l2", "d40_l2", "d48_l2"]
VARIANTS = {
    "dense": {},
    "moe": {"num_experts": 4},
    "peer": {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8},
    "pkm": {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8},
}
NEW = {"peer_256": {**VARIANTS["peer"], "ffw": "peer", "num_experts": 256}}
LIMIT_SECONDS = 2.0


def study(sizes, budgets, variants):
    """The file of a study as plain values; every cell of it can be planned."""
    return {
        "defaults": [
            "train", {"override data": "synthetic"}, {"override tracker": "off"}, {"override hydra/sweeper": "isoflop"},
            {"override hydra/launcher": "local"}, "_self_",
        ],
        "study": "own", "progress": "off", "threads": 1, "eval": {"tokens": 1024},
        "data": {"num_tokens": 20000, "max_epochs": 1e9},
        "hydra": {
            "mode": "MULTIRUN",
            "sweeper": {
                "seeds": [0, 1], "ladder": [{"budget": budget, "sizes": sizes} for budget in budgets],
                "variants": {name: VARIANTS[name] for name in variants},
            },
        },
    }  # fmt: skip


SMALL = study(["d8_l2"], [1e10, 2e10], ["peer", "dense"])
LARGE = study(SIZES, [1e10, 2e10, 4e10, 8e10], list(VARIANTS))
STUDY = count(SMALL, LARGE)
CELLS = count(8, 256)
TEXT = yaml.safe_dump(SMALL, sort_keys=False)


def with_keys(values, changes):
    """A study with other values."""
    values = deepcopy(values)
    for path, value in changes.items():
        *above, last = path.split(".")
        node = values
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value
    return values


def with_cells(**axes):
    """The study with more cells."""
    values = deepcopy(STUDY)
    sweeper = values["hydra"]["sweeper"]
    for name, more in axes.items():
        sweeper[name] = {**sweeper[name], **more} if name == "variants" else sweeper[name] + more
    return values


def reordered(values):
    """The same keys in another order, and so the ladder, the seeds and the variants."""
    if isinstance(values, dict):
        return {k: v if k == "defaults" else reordered(v) for k, v in reversed(values.items())}
    return [reordered(v) for v in reversed(values)] if isinstance(values, list) else values


COSMETIC = {
    "progress": "lines", "threads": 2, "log_lines": 5, "save_model": False, "checkpoint.keep": 3,
    "checkpoint.every_seconds": 5.0, "claim.lease_seconds": 60.0, "device": "cpu", "kernels": "torch",
    "compile": True, "deterministic": True, "parallel": "fsdp", "activation_checkpointing": True,
    "rank_timeout_seconds": 9.0, "tracker.project": "other", "eval.every": 0.5, "data.max_epochs": 2e9,
    "hydra.sweeper.retries": 0, "hydra.launcher.workers": 1, "hydra.sweeper.on_failure": "stop", "hydra.sweeper.canary": False,
}  # fmt: skip
WRITING = {
    "comments": "# the same\n\n" + TEXT.replace("study: own", "study: own   # as before"),
    "notation": TEXT.replace("10000000000.0", "1.0e10").replace("20000000000.0", "2e10"),
    "order": yaml.safe_dump(reordered(SMALL), sort_keys=False),
    "flow": json.dumps(SMALL),
}
SEMANTIC = {
    "optim.lr_scale": 0.8, "data.seed": 1, "backbone.ffw.activation": "relu", "optim.weight_decay": 0.0,
    "optim.schedule": "wsd", "data.context": 32, "data.num_tokens": 30000, "data.order": "stream",
    "batch_size": 8, "precision": "bfloat16", "eval.tokens": 2048, "backbone.norm": "layer",
    "backbone.tie_embeddings": False,
}  # fmt: skip


def of_study():
    """Files of the study by name, after the first of them."""
    return {
        "again": STUDY,
        "budget": with_cells(ladder=[{"budget": 1.6e11, "sizes": count(["d8_l2"], SIZES)}]),
        "seed": with_cells(seeds=[2]),
        "variant": with_cells(variants=NEW),
        "cosmetic": reordered(with_keys(STUDY, COSMETIC)),
        "semantic": with_keys(STUDY, {"optim.lr_scale": 0.8, "data.seed": 1}),
    }


def of_small_one():
    """Each change alone, of the small study."""
    changes = {key: with_keys(SMALL, {key: value}) for key, value in (COSMETIC | SEMANTIC).items()}
    return count({}, WRITING) | {k: changes[k] for k in count(["optim.lr_scale"], list(changes))}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(folder, outcome, run ids that were launched) by name; each launch in a folder of its own, but
    the first ones where the study as it was had been launched.
    """
    root = tmp_path_factory.mktemp("studies")
    firsts, others = {"first": STUDY, "small": SMALL}, of_study() | of_small_one()
    for name, values in (firsts | others).items():
        text = values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False)
        (root / name / "mine").mkdir(parents=True)
        (root / name / "mine" / "own.yaml").write_text(text)
    outcomes = run_all([(root / name, ARGUMENTS) for name in firsts], "forge")
    assert [outcome["code"] for outcome in outcomes] == [0, 0], outcomes
    for name in others:
        before = "first" if name in of_study() else "small"
        shutil.copytree(root / before / "runs", root / name / "runs")
    outcomes += run_all([(root / name, ARGUMENTS) for name in others], "forge")
    ran = [[line[4:] for line in o["out"].splitlines() if line[:4] == "ran "] for o in outcomes]
    named = zip(firsts | others, outcomes, ran, strict=True)
    return {name: (root / name, outcome, ids) for name, outcome, ids in named}


def planned_ids(folder):
    with (folder / "runs" / "own" / "plan.csv").open() as file:
        return {row["run_id"] for row in csv.DictReader(file)}


def record_ids(folder):
    return {path.parent.name for path in (folder / "runs" / "own").glob("*/record.json")}


def test_every_launch_went_well(launched):
    for name, (_, outcome, _) in launched.items():
        assert (outcome["code"], outcome["err"]) == (0, ""), (name, outcome)


def test_a_study_runs_every_cell_once(launched):
    folder, _, ran = launched["first"]
    assert len(ran) == len(set(ran)) == CELLS
    assert set(ran) == planned_ids(folder) == record_ids(folder)
    _, again, none = launched["again"]
    assert none == []
    assert again["out"].startswith(f"own: {CELLS} cells, {CELLS} done; ")


def test_more_of_a_study_runs_what_is_new(launched):
    old, counts = set(launched["first"][2]), {}
    for name, part, new in (("budget", 2, "1.6e11"), ("seed", 3, "s2"), ("variant", 0, "peer")):
        folder, _, ran = launched[name]
        assert len(ran) == len(set(ran))
        assert not old & set(ran)
        assert {run.split("-")[part] for run in ran} == {new}
        assert old | set(ran) == planned_ids(folder) == record_ids(folder)
        counts[name] = len(ran)
    each = CELLS // count(2, 4)
    assert counts == {"budget": each, "seed": CELLS // 2, "variant": each}
    figures = ", ".join(f"{number} for a {name}" for name, number in counts.items())
    report("F27", f"{CELLS} runs done: {figures}, no other")


def test_a_cosmetic_change_runs_nothing(launched):
    names = [name for name in launched if name in {"cosmetic", *COSMETIC, *WRITING}]
    for name in names:
        folder, _, ran = launched[name]
        assert ran == [], name
        assert planned_ids(folder) == record_ids(folder)
    assert len(names) == count(1, 1 + len(COSMETIC) + len(WRITING))
    report("F27", f"{len(names)} files with cosmetic changes, all at once of {CELLS}: 0 runs")


def test_a_semantic_change_gives_new_runs_that_are_never_mixed_with_the_old(launched):
    names = [name for name in launched if name in {"semantic", *SEMANTIC}]
    for name in names:
        folder, outcome, ran = launched[name]
        before = launched["first" if name == "semantic" else "small"][2]
        assert f"{len(before)} cells, {len(before)} missing" in outcome["out"], name
        assert len(set(ran)) == len(before)
        assert not set(before) & set(ran), name
        assert planned_ids(folder) == set(ran)
        assert record_ids(folder) == {*before, *ran}
        frame = load_runs(folder / "runs" / "own")
        reasons = frame.set_index("run_id")["excluded"]
        assert reasons[ran].isna().all(), name
        assert reasons[before].str.contains("latest run").all(), name
    assert len(names) == count(2, 1 + len(SEMANTIC))
    report("F28", f"{len(names)} semantic changes, two at once of {CELLS}: all identities new, 0 old runs used")  # fmt: skip


def test_other_semantics_of_our_code_give_other_identities(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    before = planned.plan_run(run, None).identity
    assert planned.plan_run(run, None).identity == before
    monkeypatch.setattr(planned, "SEMANTICS", planned.SEMANTICS + 1)
    assert planned.plan_run(run, None).identity != before


def test_a_finished_study_ends_in_two_seconds(launched, tmp_path):
    """Best of a few, because tests run side by side; the first start works out all of it."""
    folder = launched["again"][0]
    environment = {"PEER_SCALING_CACHE": str(tmp_path)}
    text = launched["again"][1]["out"]
    before = tables(folder)
    seconds = []
    for _ in range(count(5, 6)):
        began = time.perf_counter()
        result = peer_train(*ARGUMENTS, folder=folder, **environment)
        seconds.append(time.perf_counter() - began)
        assert (result.returncode, result.stdout, result.stderr) == (0, text, "")
        assert len(list((tmp_path / "finished").iterdir())) == 1
        assert tables(folder) == before
    first, *again = seconds
    assert min(again) < LIMIT_SECONDS < first
    median, spread = statistics.median(again), f"{min(again):.2f} to {max(again):.2f}"
    report("F26", f"{CELLS} runs, {len(again)} starts: 0 runs, median {median:.2f} s ({spread}), without the stamp {first:.1f} s")  # fmt: skip


def tables(folder):
    """Every file of the study, by content and time, but the plan by content only."""
    return {
        str(path): (path.read_bytes(), path.name == "plan.csv" or path.stat().st_mtime_ns)
        for path in (folder / "runs").rglob("*")
        if path.is_file()
    }
