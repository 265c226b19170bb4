"""Studies with evaluations as `peer-eval` writes them, of sets and losses that are made up."""

from dataclasses import asdict, replace

from peer_scaling.eval_sets import EvalSet
from peer_scaling.evaluation import Counts, perplexity, write_evaluation
from peer_scaling.publish import write_record
from reported import record_of
from surfaces import known, runs

COUNTS = Counts(500, 0, 1000, 800, 60, 850, 4000, "a" * 64)
FACTS = {"tokenizer": {"kind": "bpe", "sha256": "b" * 64}, "context": 128, "stride": 64}
SETS = {
    "curation_corpus": ("Curation Corpus", "summary"),
    "lambada": ("LAMBADA", "last_word"),
    "pile": ("Pile", "document"),
    "wikitext": ("WikiText-103", "document"),
    "c4": ("C4", "document"),
}


def entry(name, nats, causal=True, title=None, counts=COUNTS):
    """Of a set; `nats` per token, by routing."""
    own, scored = SETS.get(name, (name, "document"))
    config = EvalSet(title=title or own, hub="x", split="y", scored=scored)
    results = [
        asdict(perplexity(config, counts, n * counts.tokens, 200, routing, causal or routing != "as trained"))
        for routing, n in nats.items()
    ]  # fmt: skip
    return {"title": config.title, "source": "x y", "scored": scored, "counts": asdict(counts), "results": results}  # fmt: skip


def entries(nats, causal=True):
    return {name: entry(name, nats, causal) for name in SETS}


def write_study(root, variants=("dense", "peer"), losses=None, **options):
    """Records on known curves, each in the folder of its name; (folder, record) of all."""
    found = []
    options = {"seeds": 2, "noise": 0.001} | options
    for row in runs(known, variants=variants, **options).to_dict("records"):
        record = record_of(row)
        if losses and record.causal is False:
            record = replace(record, causal_losses={k: record.loss + d for k, d in losses.items()})
        write_record(record, root / "made" / record.run_id)
        found.append((root / "made" / record.run_id, record))
    return found


def evaluate(folder, record, sets, **facts):
    write_evaluation(folder, FACTS | {"run_id": record.run_id} | facts, sets)
