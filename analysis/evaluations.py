"""Perplexities on evaluation sets: the `evaluation.json` that `peer-eval` writes beside a record.

The files may come from anywhere: what does not hold together is a line with the reason, and is not
used. Loss is in nats.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import exp, isclose, log
from pathlib import Path
from typing import Any

from analysis.schema import MAX_LOSS, NAME, AnalysisError, one_line, shown
from peer_scaling.record import EVALUATION, RECORD, RecordError, read_record

SCHEMA = 1
AS_TRAINED = "as trained"
"""The routing of training, and the only one of a causal layer."""
LAST_WORD = "last_word"
"""Of `scored`: one example per document, whose perplexity is per example."""
SCORED = ("document", LAST_WORD, "summary")
MAX_FILE_BYTES = 1 << 24
MAX_REASON = 200
SHA256 = re.compile(r"[0-9a-f]{64}")
ROUNDING = 1e-9
Key = tuple[str, str]
"""Study and run id."""


@dataclass(frozen=True)
class Protocol:
    """What two results on a set must have in common to be compared."""

    title: str
    """Of the set."""
    scored: str
    text: str
    """sha256 of all its texts."""
    num_documents: int
    num_tokens: int
    """Scored."""
    tokenizer: str
    """sha256."""
    context: int
    stride: int

    def differences(self, other: "Protocol") -> list[str]:
        """Names of what is not the same."""
        mine, theirs = vars(self), vars(other)
        return [name.removeprefix("num_") for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class SetResult:
    """A run's result on one set with one routing."""

    protocol: Protocol
    source: str
    """Where the texts are from: files, or dataset and split."""
    causal: bool
    nats: float
    """Mean per token; of last words, per example."""
    bits_per_byte: float
    accuracy: float | None
    """Last words: share of the examples whose every token is the most likely one."""


@dataclass(frozen=True)
class Evaluation:
    """Of one run."""

    results: Mapping[str, Mapping[str, SetResult]]
    """By set, then routing."""
    missing: Mapping[str, str]
    """By set: why it was not evaluated."""


@dataclass(frozen=True)
class Evaluations:
    """Of all runs of a source."""

    by_run: Mapping[Key, Evaluation] = field(default_factory=dict)
    problems: Mapping[Key, str] = field(default_factory=dict)
    """Why a run's file is not used."""

    def titles(self, name: str) -> list[str]:
        """What a set is called, by its runs."""
        found = (run.results.get(name, {}) for run in self.by_run.values())
        return sorted({r.protocol.title for results in found for r in results.values()})

    def sets(self) -> list[str]:
        """Keys of all sets that a run has, by name."""
        return sorted({name for run in self.by_run.values() for name in run.results})

    def lines(self) -> list[str]:
        """One per file that is not used."""
        return [
            f"{EVALUATION} of {run}: not used: {why}" for (_, run), why in self.problems.items()
        ]


def read_evaluations(source: str) -> Evaluations:
    """All below a folder of runs; none of any other source, which has none."""
    root = Path(source)
    by_run: dict[Key, Evaluation] = {}
    problems: dict[Key, str] = {}
    for path in sorted(root.rglob(EVALUATION)) if root.is_dir() else ():
        try:
            key = _key(path.parent)
        except RecordError as error:
            problems["", path.parent.name] = one_line(error, MAX_REASON)
            continue
        try:
            found = parse_evaluation(_text(path), key[1])
            if by_run.setdefault(key, found) != found:
                raise AnalysisError("a copy of this run has another one")
        except AnalysisError as error:
            problems[key] = _said(error)
    return Evaluations(by_run, problems)


def _key(folder: Path) -> Key:
    record = read_record(folder / RECORD)
    return record.study, record.run_id


def _text(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        raise AnalysisError("a link or no regular file")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise AnalysisError(f"more than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AnalysisError(f"not readable ({error})") from error


def parse_evaluation(text: str, run_id: str) -> Evaluation:
    """The content of a file.

    Raises:
        AnalysisError: it is no JSON, of a newer schema, of another run, or does not hold together.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise AnalysisError("not readable as JSON (too deep)") from error
    except ValueError as error:
        raise AnalysisError(f"not readable as JSON ({error})") from error
    facts = _mapping(values, "the file")
    schema = _count(facts, "schema")
    if schema > SCHEMA:
        raise AnalysisError(f"schema {schema} is newer than {SCHEMA}; update")
    if facts.get("run_id") != run_id:
        raise AnalysisError(f"of another run: run_id={shown(facts.get('run_id'))}")
    results: dict[str, dict[str, SetResult]] = {}
    missing: dict[str, str] = {}
    for name, entry in _mapping(facts.get("sets"), "sets").items():
        own = _mapping(entry, _name(name, "a set"))
        if "missing" in own:
            missing[name] = _said(own["missing"])
        else:
            results[name] = dict(_results(own, facts))
    return Evaluation(results, missing)


def _results(entry: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[tuple[str, SetResult]]:
    counts = _mapping(entry.get("counts"), "counts")
    tokenizer = _mapping(facts.get("tokenizer"), "tokenizer")
    scored = entry.get("scored")
    if scored not in SCORED:
        raise AnalysisError(f"scored={shown(scored)}")
    protocol = Protocol(
        title=_name(entry.get("title"), "title"),
        scored=scored,
        text=_sha256(counts, "counts"),
        num_documents=_count(counts, "documents"),
        num_tokens=_count(counts, "tokens"),
        tokenizer=_sha256(tokenizer, "tokenizer"),
        context=_count(facts, "context"),
        stride=_count(facts, "stride"),
    )
    listed = entry.get("results")
    if not isinstance(listed, list) or not listed:
        raise AnalysisError(f"results={shown(listed)}")
    for item in listed:
        values = _mapping(item, "a result")
        result = _result(values, protocol, counts, _said(entry.get("source")))
        yield _name(values.get("routing"), "routing"), result


def _result(
    values: Mapping[str, Any], protocol: Protocol, counts: Mapping[str, Any], source: str
) -> SetResult:
    """Whose measures follow from the summed loss and the counts."""
    if not isinstance(values.get("causal"), bool):
        raise AnalysisError(f"causal={shown(values.get('causal'))}")
    by_example = protocol.scored == LAST_WORD
    summed = _number(values, "nats")
    documents, num_bytes = protocol.num_documents, _count(counts, "bytes")
    _follows(values, "token_perplexity", summed / protocol.num_tokens)
    if by_example:
        _follows(values, "example_perplexity", summed / documents)
    bits = summed / log(2) / num_bytes
    if not isclose(_number(values, "bits_per_byte"), bits, rel_tol=ROUNDING):
        raise AnalysisError(f"bits_per_byte={shown(values['bits_per_byte'])} is not {bits:.6g}")
    return SetResult(
        protocol=protocol,
        source=source,
        causal=values["causal"],
        nats=summed / (documents if by_example else protocol.num_tokens),
        bits_per_byte=bits,
        accuracy=_number(values, "accuracy", 1.0) if by_example else None,
    )


def _follows(values: Mapping[str, Any], name: str, nats: float) -> None:
    """A perplexity is exp of the mean loss, or None where that is no float64."""
    if values.get(name) is None and nats >= MAX_LOSS:
        return
    given = _number(values, name)
    if nats >= MAX_LOSS or not isclose(given, exp(nats), rel_tol=1e-6):
        raise AnalysisError(f"{name}={shown(given)} does not follow from the nats and the counts")


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise AnalysisError(f"{what}: {shown(value)} is no object")
    return value


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 < value < 1 << 62:
        raise AnalysisError(f"{name}={shown(value)} is no positive whole number")
    return value


def _number(values: Mapping[str, Any], name: str, most: float = 1e60) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise AnalysisError(f"{name}={shown(value)}")
    return float(value)


def _sha256(values: Mapping[str, Any], what: str) -> str:
    value = values.get("sha256")
    if not isinstance(value, str) or not SHA256.fullmatch(value):
        raise AnalysisError(f"{what}: sha256={shown(value)}")
    return value


def _name(value: object, what: str) -> str:
    """A text that no table takes for more."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise AnalysisError(f"{what}={shown(value)} is no name")
    return value


def _said(value: object) -> str:
    """Text for a cell of a table."""
    return one_line(value, MAX_REASON).replace("|", "/")
