"""Scores of documents against a plain loop in float64, and what they must not depend on."""

import math

import numpy as np
import pytest
import torch

from peer_scaling.eval_command import options_from
from peer_scaling.eval_sets import texts
from peer_scaling.evaluation import encoded as encoded_texts
from peer_scaling.model import DecoderConfig, build_model
from peer_scaling.scoring import Encoded, score, windows
from peer_scaling.tokenizer import TokenizerConfig, make_tokenizer
from test_model import VARIANTS

VOCAB, CONTEXT = 53, 16
CONFIG = DecoderConfig(d_model=16, num_layers=2, num_heads=2)
SAME_NATS = 1e-4


def model_of(name, **settings):
    return build_model(CONFIG, VARIANTS[name], VOCAB, CONTEXT, 0).eval()


def documents(number=9, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [2, 3, 16, 17, 18, 33, 40, 61, 7][:number]
    return [Encoded(rng.integers(VOCAB, size=n), int(rng.integers(1, min(n, 5)))) for n in lengths]


def scored(model, encoded, stride=8, batch_size=4):
    autocast = torch.autocast("cpu", enabled=False)
    return score(
        model, encoded, context=CONTEXT, stride=stride, batch_size=batch_size, autocast=autocast
    )


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
@pytest.mark.parametrize("length", [2, 5, 16, 17, 18, 40])
@pytest.mark.parametrize("first", [1, 4, 30])
def test_every_token_is_scored_once_with_enough_before_it(stride, length, first):
    found = list(windows(0, Encoded(np.zeros(length, np.int64), first), CONTEXT, stride))
    targets = [i for w in found for i in range(w.first, w.stop)]
    assert targets == list(range(first, length))
    for w in found:
        assert w.inputs <= CONTEXT
        for i in range(w.first, w.stop):
            assert i - w.start >= min(i, CONTEXT - stride + 1)
        assert w.start == 0 or w.inputs == CONTEXT


def test_a_stride_of_the_context_gives_lm_eval_s_rolling_windows():
    """Non-overlapping, the last one with as much before it as fits."""
    found = list(windows(0, Encoded(np.zeros(41, np.int64), 1), 16, 16))
    assert [(w.start, w.first, w.stop) for w in found] == [(0, 1, 17), (16, 17, 33), (24, 33, 41)]


@pytest.mark.parametrize("name", ["dense", "pkm", "peer"])
def test_scores_equal_a_plain_loop(name):
    model, encoded = model_of(name).double(), documents()
    result = scored(model, encoded)
    for d, document in enumerate(encoded):
        nats, greedy = 0.0, True
        for w in windows(0, document, CONTEXT, 8):
            for i in range(w.first, w.stop):
                inputs = torch.from_numpy(document.tokens[None, w.start : i])
                with torch.no_grad():
                    log_V = model(inputs).logits_BTV[0, -1].log_softmax(0)
                nats -= float(log_V[document.tokens[i]])
                greedy &= int(log_V.argmax()) == document.tokens[i]
        assert result.nats_D[d] == pytest.approx(nats, abs=1e-5)
        assert result.greedy_D[d] == greedy
        assert result.tokens_D[d] == len(document.tokens) - document.first


def test_a_document_is_greedy_only_if_every_token_is():
    model = model_of("dense")
    tokens = torch.tensor([[5]])
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens).logits_BTV[:, -1:].argmax(-1)], 1)
    best = tokens[0].numpy()
    wrong = best.copy()
    wrong[-1] = (wrong[-1] + 1) % VOCAB
    empty = Encoded(best[:1], 1)
    found = scored(model, [Encoded(best, 1), Encoded(wrong, 1), empty]).greedy_D.tolist()
    assert found == [True, False, False]


def routed(name):
    """Models as they are evaluated: of expert choice, each causal route too."""
    model = model_of("moe" if name in ("threshold", "top1") else name)
    if name in ("threshold", "top1"):
        model.swapped.take_route(name, torch.full((VARIANTS["moe"].num_experts,), 0.2))
    return model


@pytest.mark.parametrize("name", ["dense", "pkm", "peer", "threshold", "top1"])
def test_neither_batch_size_nor_order_nor_companions_matter(name):
    model, encoded = routed(name), documents()
    base = scored(model, encoded, batch_size=1).nats_D
    for batch_size in (2, 3, 16):
        again = scored(model, encoded, batch_size=batch_size).nats_D
        assert np.abs(again - base).max() <= SAME_NATS
    order = np.random.default_rng(1).permutation(len(encoded))
    shuffled = scored(model, [encoded[i] for i in order], batch_size=4).nats_D
    assert np.abs(shuffled - base[order]).max() <= SAME_NATS
    others = scored(model, [encoded[6], *documents(seed=5)], batch_size=8).nats_D
    assert abs(others[0] - base[6]) <= SAME_NATS


def test_expert_choice_as_trained_depends_on_companions_unless_alone():
    """Why the command gives it each window alone: the same companions in a batch change it."""
    model, encoded = model_of("moe"), documents()
    alone = scored(model, encoded, batch_size=1).nats_D
    together = scored(model, encoded, batch_size=16).nats_D
    assert np.abs(alone - together).max() > SAME_NATS
    order = np.random.default_rng(1).permutation(len(encoded))
    again = scored(model, [encoded[i] for i in order], batch_size=1).nats_D
    assert np.array_equal(again, alone[order])


@pytest.mark.parametrize("name", VARIANTS)
def test_an_untrained_model_s_perplexity_is_the_vocabulary_s_size(name):
    vocab = 512
    rng = np.random.default_rng(0)
    encoded = [Encoded(rng.integers(vocab, size=200), 1) for _ in range(20)]
    model = build_model(CONFIG, VARIANTS[name], vocab, CONTEXT, 0).eval()
    result = scored(model, encoded, batch_size=1 if name == "moe" else 16)
    perplexity = math.exp(result.nats_D.sum() / result.tokens_D.sum())
    assert perplexity == pytest.approx(vocab, rel=0.01)


@pytest.mark.data
def test_an_untrained_model_s_perplexity_on_real_text_is_its_vocabulary_s_size(reference_data):
    """T5's 32,128 tokens. Of width 16: the first logits grow with the width, as its square root."""
    path = reference_data / "tokenizers" / "t5_spiece.model"
    config = TokenizerConfig("file", 32_128, name=str(path), eod_token="</s>")
    tokenizer = make_tokenizer(config, ())
    model = build_model(CONFIG, VARIANTS["peer"], config.vocab_size, CONTEXT, 0).eval()
    for name, file, most in (
        ("lambada", "lambada_test.jsonl", 900),
        ("wikitext", "wiki.test.raw", 2),
    ):
        own = f"eval.sets.{name}.path={reference_data / name / file}"
        _, sets = options_from([f"eval.only={name}", own, f"eval.sets.{name}.max_documents={most}"])
        found = list(texts(name, sets[name]))
        result = scored(model, encoded_texts(found, tokenizer), stride=16, batch_size=64)
        perplexity = math.exp(result.nats_D.sum() / result.tokens_D.sum())
        assert perplexity == pytest.approx(config.vocab_size, rel=0.01), name


def test_scoring_changes_no_state():
    model = model_of("peer")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random_state = torch.get_rng_state()
    scored(model, documents())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
