"""Table 1's columns of evaluation sets, from files that are made up: the mean over seeds and its
interval, nats below dense, and what is missing, other or damaged.
"""

import json
import math

import numpy as np
import pytest

from analysis.evaluations import parse_evaluation, read_evaluations
from analysis.isoflop import fit_isoflop
from analysis.load import load_runs
from analysis.paper_command import write_tables
from analysis.paper_sets import perplexity_text
from analysis.paper_tables import beside_published, table1
from analysis.schema import AnalysisError
from evaluated import COUNTS, FACTS, entries, entry, evaluate, write_study
from peer_scaling.record import EVALUATION

NATS = {"dense": (4.0, 4.2), "peer": (3.8, 3.9)}
"""Per token, by seed."""


def table_of(root):
    frame = load_runs(root)
    return table1(fit_isoflop(frame), frame, read_evaluations(str(root)))


@pytest.fixture
def study(tmp_path):
    """Two variants at three budgets; all runs of the first budget evaluated."""
    cells = write_study(tmp_path)
    for folder, record in cells:
        if record.budget == 1e12:
            nats = NATS[record.variant][record.seed]
            evaluate(folder, record, entries({"as trained": nats}))
    return tmp_path, cells


def best(table, cells, method="peer (1e12)"):
    """Folders of the best size."""
    variant = method.partition(" ")[0]
    size = table.loc[method, "best trained size"]
    return [c for c in cells if (c[1].variant, c[1].size, c[1].budget) == (variant, size, 1e12)]


def test_cells_are_the_mean_of_the_seeds_with_its_interval(study):
    table = table_of(study[0])
    mean, spread = np.mean(NATS["peer"]), np.std(NATS["peer"], ddof=1)
    margin = 12.706204736 * spread / math.sqrt(2)  # Student's t, one degree of freedom
    low, high = math.exp(mean - margin), math.exp(mean + margin)
    for name in ("Curation Corpus", "Pile", "Wikitext", "C4"):
        assert table.loc["peer (1e12)", name] == f"{math.exp(mean):.2f} [{low:.2f}, {high:.2f}]"
        assert table.loc["peer (1e12)", f"nats below dense, {name}"] == "+0.250"
    columns = list(table.columns)
    sets = ["Curation Corpus", "Lambada", "Lambada accuracy", "Pile", "Wikitext", "C4"]
    assert columns[5:11] == sets
    assert columns[0] == "best trained size"
    bits = float(table.loc["peer (1e12)", "bits per byte, C4"])
    assert bits == pytest.approx(mean * COUNTS.tokens / math.log(2) / COUNTS.bytes)


def test_lambada_is_by_example(study):
    table = table_of(study[0])
    nats = np.mean(NATS["peer"]) * COUNTS.tokens / COUNTS.documents
    assert table.loc["peer (1e12)", "Lambada"].startswith(f"{math.exp(nats):.2f} [")
    assert table.loc["peer (1e12)", "Lambada accuracy"] == f"{200 / COUNTS.documents:.3f}"
    gap = 0.25 * COUNTS.tokens / COUNTS.documents
    assert table.loc["peer (1e12)", "nats below dense, Lambada"] == f"{gap:+.3f}"


def test_what_is_not_evaluated_says_the_command(study):
    root, cells = study
    table = table_of(root)
    size = table.loc["peer (4e12)", "best trained size"]
    runs = [r.run_id for _, r in cells if (r.variant, r.size, r.budget) == ("peer", size, 4e12)]
    assert table.loc["peer (4e12)", "C4"] == f"not evaluated: peer-eval {' '.join(runs)}"
    assert table.loc["peer (4e12)", "nats below dense, C4"] == ""
    (folder, record), other = best(table, cells)
    (folder / EVALUATION).unlink()
    text = table_of(root).loc["peer (1e12)", "Pile"]
    alone = f"{math.exp(NATS['peer'][other[1].seed]):.2f}"
    assert text == f"{alone}; 1 of 2 runs; not evaluated: peer-eval {record.run_id}"


def test_a_set_that_is_missing_says_why(study):
    root, cells = study
    for folder, record in best(table_of(root), cells):
        (folder / EVALUATION).unlink()
        sets = {"c4": {"title": "C4", "missing": "no network | {x}\nsecond"}}
        evaluate(folder, record, sets)
    table = table_of(root)
    assert table.loc["peer (1e12)", "C4"] == "missing: no network / {x} second"
    assert table.loc["peer (1e12)", "Pile"].startswith("not evaluated: peer-eval peer-1e+12")


def test_another_set_is_named_and_not_compared(study):
    root, cells = study
    for folder, record in best(table_of(root), cells):
        nats = {"as trained": 3.0}
        evaluate(folder, record, {"pile": entry("pile", nats, title="pile_like"), "mine": entry("mine", nats)})  # fmt: skip
    table = table_of(root)
    name = "Pile (ours: Pile, pile_like)"
    assert table.loc["peer (1e12)", name].startswith("20.09 [")
    other = "not compared: other title than dense's"
    assert table.loc["peer (1e12)", f"nats below dense, {name}"] == other
    assert table.loc["peer (1e12)", "mine"].startswith("20.09 [")
    beside = beside_published(table, read_evaluations(str(root)))
    assert beside.loc["peer (6e18), He 2024", name] == "19.01"
    assert beside.loc["peer (6e18), He 2024", f"nats below dense, {name}"] == "+0.256"
    assert beside.loc["peer (6e18), He 2024", "mine"] == ""


def test_seeds_with_other_protocols_are_not_averaged(study):
    root, cells = study
    folder, record = best(table_of(root), cells)[0]
    evaluate(folder, record, entries({"as trained": 3.0}), stride=32)
    text = table_of(root).loc["peer (1e12)", "C4"]
    assert text.startswith(f"evaluations differ in stride: peer-eval {record.run_id} peer-")


def test_the_causal_route_ranks_and_the_others_have_rows_of_their_own(tmp_path):
    cells = write_study(tmp_path, ("dense", "moe"), {"threshold": 0.1, "top1": 0.05}, seeds=1)
    by_routing = {"as trained": 3.0, "threshold": 3.5, "top1": 3.4}
    for folder, record in cells:
        nats = by_routing if record.variant == "moe" else {"as trained": 4.0}
        evaluate(folder, record, entries(nats, causal=record.variant != "moe"))
    table = table_of(tmp_path)
    rows = [name for name in table.index if name.endswith("(1e12)")]
    assert rows == [
        "dense (1e12)",
        "moe (threshold routing) (1e12)",
        "moe (as trained, not causal) (1e12)",
        "moe (top1 routing, not ranked) (1e12)",
    ]
    for row, nats in zip(rows[1:], (3.5, 3.0, 3.4), strict=True):
        assert table.loc[row, "C4"] == f"{math.exp(nats):.2f}"
        assert table.loc[row, "nats below dense, C4"] == f"{4 - nats:+.3f}"
    losses = [float(table.loc[row, "its perplexity"]) for row in rows[1:]]
    assert np.log(losses) - np.log(losses[1]) == pytest.approx([0.1, 0, 0.05], abs=1e-3)
    assert table.loc[rows[2], "perplexity at the minimum"] == "no curve: not ranked"


def test_a_cell_without_a_run_says_what_would_make_one(tmp_path):
    for folder, record in write_study(tmp_path):
        if (record.variant, record.budget) == ("peer", 4e12):
            (folder / "record.json").unlink()
    table = table_of(tmp_path)
    missing = "no run: peer-train --config-name made variant=peer budget=4e12"
    assert table.loc["peer (4e12)", "best trained size"] == missing


def damaged(**changes):
    """The text of a good file, changed."""
    sets = {
        "c4": entry("c4", {"as trained": 3.0}),
        "lambada": entry("lambada", {"as trained": 0.1}),
    }
    content = {"schema": 1, "run_id": "run", **FACTS, "sets": sets}
    result, counts = content["sets"]["c4"]["results"][0], content["sets"]["c4"]["counts"]
    for where in (content, content["sets"]["c4"], result, counts):
        where |= {k: v for k, v in changes.items() if k in where}
    return json.dumps(content)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "schema 2 is newer"),
        ({"schema": True}, "schema=True is no positive whole number"),
        ({"run_id": "other"}, "of another run: run_id='other'"),
        ({"title": "<b>|x"}, "title='<b>|x' is no name"),
        ({"routing": "a\nb"}, "routing="),
        ({"nats": 2999.0}, "token_perplexity"),
        ({"nats": float("nan")}, "nats=nan"),
        ({"nats": -1.0}, "nats=-1"),
        ({"token_perplexity": None}, "token_perplexity=None"),
        ({"bits_per_byte": 1.0}, "bits_per_byte=1 is not 1.08"),
        ({"tokens": 0}, "tokens=0 is no positive whole number"),
        ({"sha256": "../../etc"}, "sha256='../../etc'"),
        ({"scored": "all"}, "scored='all'"),
        ({"causal": "yes"}, "causal='yes'"),
        ({"results": []}, "results=[]"),
        ({"sets": [1]}, "sets: [1] is no object"),
        ({"stride": 1.5}, "stride=1.5"),
        ({"tokenizer": None}, "tokenizer: None is no object"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(changes, reason):
    with pytest.raises(AnalysisError) as error:
        parse_evaluation(damaged(**changes), "run")
    assert reason in str(error.value)
    assert str(error.value).isprintable()


def test_what_no_float64_holds_is_a_power():
    assert [perplexity_text(nats) for nats in (2, 40, 800)] == ["7.39", "2.35e+17", "e^800"]
    text = damaged(nats=8e5, token_perplexity=None, bits_per_byte=8e5 / math.log(2) / COUNTS.bytes)
    assert parse_evaluation(text, "run").results["c4"]["as trained"].nats == 800.0


def test_a_bad_file_is_a_line_and_a_cell(study, tmp_path):
    root, cells = study
    (first, one), (second, two) = best(table_of(root), cells)
    (first / EVALUATION).write_text("[" * 100_000)
    (second / EVALUATION).unlink()
    (second / EVALUATION).symlink_to(first / EVALUATION)
    lines = write_tables(str(root), None, tmp_path / "out")
    assert [line for line in lines if line.startswith("evaluation.json")] == [
        f"evaluation.json of {one.run_id}: not used: not readable as JSON (too deep)",
        f"evaluation.json of {two.run_id}: not used: a link or no regular file",
    ]
    text = (tmp_path / "out" / "table1.md").read_text()
    assert "evaluation not used: a link or no regular file" in text
    header, csv_header = text.splitlines()[0], (tmp_path / "out" / "table1.csv").read_text()
    assert "bits per byte" not in header
    assert "bits per byte, C4" in csv_header.splitlines()[0]
    assert all(line.count("|") == header.count("|") for line in text.splitlines())
    caption = (tmp_path / "out" / "table1.caption.md").read_text()
    protocol = (
        "LAMBADA from x y, scored last word, 500 documents, 1,000 tokens, context 128, stride 64"
    )
    assert f"- Lambada: {protocol}, text {'a' * 12}, tokenizer {'b' * 12} (22 runs)" in caption


def test_a_copy_of_a_run_with_another_evaluation_is_refused(study):
    root, cells = study
    folder, record = best(table_of(root), cells)[0]
    (root / "copy").mkdir()
    evaluate(root / "copy", record, entries({"as trained": 1.0}))
    (root / "copy" / "record.json").write_bytes((folder / "record.json").read_bytes())
    problems = read_evaluations(str(root)).problems
    assert problems == {("made", record.run_id): "a copy of this run has another one"}
