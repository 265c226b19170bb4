"""The same numbers as lm-eval (extra `lm-eval`) on an exported model, for WikiText and LAMBADA."""

import json
import math
import re

import pytest
import torch

from peer_scaling.eval_command import options_from
from peer_scaling.eval_sets import detokenized, pages
from peer_scaling.evaluator import evaluate_run
from peer_scaling.export import export
from peer_scaling.train import run_once
from peer_scaling.trained import corpus_of, load_trained
from planned_runs import make_planned

lm_eval = pytest.importorskip("lm_eval", reason="extra lm-eval is not installed")
ARTICLES, EXAMPLES = 3, 200
TEXT = [
    "data=sotu",
    "data.tokenizer.kind=bytes",
    "data.tokenizer.vocab_size=257",
    "data.context=64",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    planned = make_planned(tmp_path_factory.mktemp("runs"), *TEXT, ffw="peer")
    run_once(planned)
    return load_trained(planned.folder)


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("export") / "model"
    export(trained, folder, corpus_of(trained).folder)
    return HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32")


def asked(model, kind, arguments):
    from lm_eval.api.instance import Instance

    instances = [Instance(kind, {}, own, i) for i, own in enumerate(arguments)]
    return getattr(model, kind)(instances, disable_tqdm=True)


def ours(trained, name, path, most):
    overrides = [f"eval.only=[{name}]", f"eval.sets.{name}.path={path}"]
    _, sets = options_from([*overrides, f"eval.sets.{name}.max_documents={most}"])
    return evaluate_run(trained, sets, torch.device("cpu"), stride=64)[name]["results"][0]


@pytest.mark.data
def test_wikitext(trained, model, reference_data):
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    path = reference_data / "wikitext" / "wiki.test.raw"
    articles = list(pages(iter(path.read_text().split("\n"))))
    assert all(detokenized(a) == wikitext_detokenizer({"page": a}) for a in articles)
    texts = [(wikitext_detokenizer({"page": a}),) for a in articles[:ARTICLES]]
    nats = -sum(asked(model, "loglikelihood_rolling", texts))
    words = sum(len(re.split(r"\s+", a)) for a in articles[:ARTICLES])
    size = sum(len(a.encode()) for a in articles[:ARTICLES])
    result = ours(trained, "wikitext", path, ARTICLES)
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)


@pytest.mark.data
def test_lambada(trained, model, reference_data):
    path = reference_data / "lambada" / "lambada_test.jsonl"
    rows = [json.loads(line)["text"] for line in path.read_text().splitlines()][:EXAMPLES]
    pairs = [(r.rpartition(" ")[0], " " + r.rpartition(" ")[2]) for r in rows]
    answers = asked(model, "loglikelihood", pairs)
    result = ours(trained, "lambada", path, EXAMPLES)
    nats = -sum(log for log, _ in answers) / EXAMPLES
    assert result["example_perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    assert result["accuracy"] == sum(greedy for _, greedy in answers) / EXAMPLES
