"""A study that chooses its own sizes, from the command line: decided, run, and the same again."""

import csv
import json

import pytest

from commands import peer_train

STUDY = [
    "--config-name", "adaptive_smoke", "~hydra.sweeper.variants.peer", "hydra.sweeper.ladder=[{budget: 4e9}]",
    "hydra.sweeper.adaptive.sizes=[d8_l2,d12_l2,d16_l2,d20_l2,d24_l2]", "hydra.sweeper.adaptive.ladders=1.6",
]  # fmt: skip


def decisions_of(folder):
    lines = (folder / "runs" / "adaptive_smoke" / "decisions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def keys_of(decisions):
    return [(d["size"], d["seed"]) for d in decisions if d["size"] and d["seed"] is not None]


def plan_of(folder):
    with (folder / "runs" / "adaptive_smoke" / "plan.csv").open() as file:
        return [(row["size"], int(row["seed"]), row["run_id"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_study_chooses_runs_and_ends_and_starts_nothing_again(tmp_path):
    result = peer_train(*STUDY, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    decisions = decisions_of(tmp_path)
    keys, plan = keys_of(decisions), plan_of(tmp_path)
    assert [(size, seed) for size, seed, _ in plan] == keys
    assert [d["action"] for d in decisions[:4]] == ["start"] * 4
    assert decisions[-1]["action"] == "stop"
    assert len(keys) > 4
    assert result.stdout.count("nats, perplexity") == len(keys)
    assert result.stdout.splitlines()[0] == "round 1: 4 start; decisions.jsonl says why"
    assert f"dense at 4e9: {decisions[-1]['reason']}" in result.stdout

    again = peer_train(*STUDY, folder=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    num = len(keys)
    assert again.stdout == f"adaptive_smoke: {num} cells, {num} done\n", "by its stamp"
    assert decisions_of(tmp_path) == decisions

    (tmp_path / "runs" / "adaptive_smoke" / plan[1][2] / "record.json").unlink()
    third = peer_train(*STUDY, folder=tmp_path)
    assert third.stdout.count("nats, perplexity") == 1
    assert decisions_of(tmp_path) == decisions, "the same bits, so the same decisions"


def test_a_dry_run_shows_the_first_round(tmp_path):
    result = peer_train(*STUDY, "dry_run=true", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("round 1: 4 start")
    assert "adaptive_smoke: 4 cells, 4 missing" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_part_of_it_is_asked_for_by_size(tmp_path):
    refused = peer_train(*STUDY, "seed=1", folder=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: seed: this study chooses its cells")
    cells = peer_train(*STUDY, "size=d8_l2", "seed=1,2", "dry_run=true", folder=tmp_path)
    assert "adaptive_smoke: 2 cells, 2 missing" in cells.stdout


def test_what_cannot_be_an_adaptive_study(tmp_path):
    wrong = [
        "hydra.sweeper.ladder=[{budget: 4e9, sizes: [d8_l2]}]", "hydra.sweeper.seeds=[0,1]",
        "hydra.sweeper.adaptive.spacing=1", "hydra.sweeper.on_failure=go",
    ]  # fmt: skip
    result = peer_train("--config-name", "adaptive_smoke", *wrong, folder=tmp_path)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 4, lines
    for word in ("spacing=1", "sizes are chosen", "seeds=[0, 1]", "on_failure=go"):
        assert any(word in line for line in lines), word
    small = peer_train(*STUDY, "hydra.sweeper.ladder=[{budget: 1e8}]", folder=tmp_path)
    assert (small.returncode, small.stdout) == (2, "")
    assert "a curve needs 4" in small.stderr
