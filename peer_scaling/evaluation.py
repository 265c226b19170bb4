"""Perplexities of a trained model on the evaluation sets, and the file that keeps them.

`evaluation.json` lies beside `record.json`, which is never changed. Loss is in nats.
"""

import collections
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import islice
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np

from peer_scaling.durable import write_atomically
from peer_scaling.errors import UserError
from peer_scaling.eval_sets import EvalSet, Text, texts
from peer_scaling.machine import git_commit
from peer_scaling.record import EVALUATION
from peer_scaling.scoring import Encoded, Scores
from peer_scaling.tokenizer import Tokenizer

SCHEMA = 1
DOCUMENTS_PER_CHUNK = 256
"""Encoded and scored together: what is in memory of a set."""
MAX_NATS = 700.0
"""Above, exp is no float64."""
AS_TRAINED = "as trained"


@dataclass(frozen=True)
class Counts:
    """What a set holds, as far as it was read."""

    documents: int
    without_text: int
    """Rows with nothing to score, which are no documents."""
    tokens: int
    """Scored, of the model's tokenizer."""
    words: int
    """Of the text as the set has it, between white space."""
    lines: int
    words_lm_eval: int
    """As lm-eval counts in documents: pieces between white space, empty ones at the ends too."""
    bytes: int
    """UTF-8, of the text as the set has it."""
    sha256: str
    """Of the texts: contexts and scored parts, each with its length."""


@dataclass(frozen=True)
class Perplexity:
    """The result of one set with one routing."""

    routing: str
    """`as trained`, or a causal route of a layer that is not causal."""
    causal: bool
    nats: float
    """Summed over all scored tokens."""
    token_perplexity: float | None
    """None, as the other perplexities, where it is no float64."""
    word_perplexity: float | None
    """Over the words as lm-eval counts them."""
    bits_per_byte: float
    example_perplexity: float | None
    """Last words: exp of the mean nats per example."""
    accuracy: float | None
    """Last words: share of the examples whose every token is the most likely one."""


def perplexity(
    config: EvalSet, counts: Counts, nats: float, greedy: int, routing: str, causal: bool
) -> Perplexity:
    """All measures of a summed loss."""
    by_example = config.scored == "last_word"
    return Perplexity(
        routing=routing,
        causal=causal,
        nats=nats,
        token_perplexity=_exp(nats / counts.tokens),
        word_perplexity=_exp(nats / counts.words_lm_eval) if counts.words_lm_eval else None,
        bits_per_byte=nats / log(2) / counts.bytes,
        example_perplexity=_exp(nats / counts.documents) if by_example else None,
        accuracy=greedy / counts.documents if by_example else None,
    )


def _exp(nats: float) -> float | None:
    return exp(nats) if nats < MAX_NATS else None


class Counter:
    """Counts texts as they are read."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._numbers = collections.Counter[str]()

    def add(self, text: Text, tokens: int) -> None:
        """Count a text of which so many tokens are scored."""
        if not tokens:
            self._numbers["without_text"] += 1
            return
        counted, words = text.counted, text.counted.split()
        found = {
            "documents": 1,
            "tokens": tokens,
            "words": len(words),
            "lines": counted.count("\n") + 1,
            # Of whole documents; after a context, a word is a word.
            "words_lm_eval": len(re.split(r"\s+", counted) if text.context is None else words),
            "bytes": len(counted.encode("utf-8", "replace")),
        }
        self._numbers.update(found)
        for part in (text.context or "", counted):
            raw = part.encode("utf-8", "replace")
            self._digest.update(f"{len(raw)}\n".encode() + raw)

    @property
    def counts(self) -> Counts:
        """So far."""
        numbers = {f.name: self._numbers[f.name] for f in fields(Counts) if f.name != "sha256"}
        return Counts(**numbers, sha256=self._digest.hexdigest())


def encoded(batch: list[Text], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokens of texts, and where the scored ones begin.

    A document starts after the end-of-document token, which is its first token's context. After a
    context, the scored tokens are those of both texts together but as many as the context alone has
    (lm-eval); the end of a document is never scored.
    """
    whole = tokenizer.encode([(text.context or "") + text.scored for text in batch])
    contexts = tokenizer.encode([text.context or "" for text in batch])
    found = []
    for tokens, context in zip(whole, contexts, strict=True):
        first = len(context) - 1
        own = tokens[:-1] if first else np.concatenate([[tokenizer.eod], tokens[:-1]])
        found.append(Encoded(own, max(1, first)))
    return found


def evaluate_set(
    name: str,
    config: EvalSet,
    tokenizer: Tokenizer,
    scorers: Mapping[str, Callable[[list[Encoded]], Scores]],
    causal: Collection[str],
) -> dict[str, Any]:
    """One set's entry in the file: its counts, and a `Perplexity` per routing.

    Args:
        name: key of the set.
        config: the set.
        tokenizer: the model's.
        scorers: by routing.
        causal: the routings that are.

    Raises:
        UserError: the set cannot be read, or has no text.
    """
    counter = Counter()
    nats, greedy = dict.fromkeys(scorers, 0.0), dict.fromkeys(scorers, 0)
    stream = texts(name, config)
    while batch := list(islice(stream, DOCUMENTS_PER_CHUNK)):
        documents = encoded(batch, tokenizer)
        for text, document in zip(batch, documents, strict=True):
            counter.add(text, len(document.tokens) - document.first)
        for routing, scorer in scorers.items():
            scores = scorer(documents)
            nats[routing] += float(scores.nats_D.sum())
            greedy[routing] += int(scores.greedy_D.sum())
    counts = counter.counts
    if not counts.tokens:
        raise UserError(f"eval.sets.{name}: {config.source} has no text to score")
    results = [
        asdict(perplexity(config, counts, nats[r], greedy[r], r, r in causal)) for r in scorers
    ]
    return {"title": config.title, "source": config.source, "scored": config.scored,
            "git_commit": git_commit(), "counts": asdict(counts), "results": results}  # fmt: skip


def write_evaluation(folder: Path, facts: Mapping[str, Any], sets: Mapping[str, Any]) -> str | None:
    """Write the file. What it had of the same model and protocol stays in it; a file of others is
    kept under another name, and stays the file if none of `sets` has a result.

    Args:
        folder: of the run.
        facts: what holds for all sets: run, weights, tokenizer, window and stride.
        sets: entries by name; one without results has a `missing` reason.

    Returns:
        What became of a file of another model or protocol; None if there was none.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / EVALUATION
    there, same, digest = _earlier(path, facts)
    evaluated = any("results" in entry for entry in sets.values())
    if there and not same and not evaluated:
        return f"{EVALUATION}: of another model or protocol, left as it is"
    kept = {
        name: entry
        for name, entry in there.items()
        if same and (name not in sets or ("missing" in sets[name] and "missing" not in entry))
    }
    aside = path.with_name(f"{path.stem}-{digest}{path.suffix}") if there and not same else None
    if aside:
        write_atomically(aside, path.read_text(encoding="utf-8"), "evaluation")
    content = {"schema": SCHEMA, **facts, "sets": {**sets, **kept}}
    write_atomically(path, json.dumps(content, indent=1, sort_keys=True) + "\n", "evaluation")
    return f"{EVALUATION}: that of another model or protocol is {aside.name} now" if aside else None


def _earlier(path: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Any], bool, str]:
    """(The sets of the file, whether they are of the same model and protocol, a hash of it.)"""
    if path.is_symlink() or not path.is_file():
        return {}, False, ""
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        same = content["schema"] == SCHEMA and all(content[k] == v for k, v in facts.items())
        return dict(content["sets"]), same, hashlib.sha256(raw).hexdigest()[:8]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}, False, ""
