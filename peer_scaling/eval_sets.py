"""The evaluation sets, and what of each is scored: the protocol that docs/evaluation.md explains.

A set is rows of text from the Hugging Face hub or from files. `scored` says which part of a row the
loss is of, `layout` how rows make documents.
"""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from peer_scaling.documents import check_hub, rows_of
from peer_scaling.errors import UserError, check, first_line

SCORED = ("document", "last_word", "summary")
LAYOUTS = ("rows", "wikitext")
SUMMARY_PROMPT = "\nTL;DR:"
"""Between article and summary (Borgeaud et al. 2022, 2112.04426, section 4.1)."""
TITLE = re.compile(r"= (?!= ).*(?<!=) =")
"""A line that starts an article of WikiText; sections have two or more `=`."""
DETOKENIZE: tuple[tuple[str, str], ...] = (
    (r"s '", "s'"),
    (r" @-@ ", "-"),
    (r" @,@ ", ","),
    (r" @\.@ ", "."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)
"""WikiText as written text, in this order: the rules of Megatron-LM (Shoeybi et al. 2019) that
lm-eval's task `wikitext` uses, without one that never matches."""


@dataclass(frozen=True)
class EvalSet:
    """Where a set's text is, and what of it is scored."""

    title: str
    hub: str
    """Name of the dataset on the Hugging Face hub."""
    split: str
    hub_config: str | None = None
    path: str | None = None
    """File or glob that is read instead of the hub: .txt, .raw, .jsonl, .jsonl.gz or .parquet."""
    scored: str = "document"
    """`document`, `last_word` (after the last space), or `summary` (of an article)."""
    layout: str = "rows"
    """`rows`: a document each, a text file one; `wikitext`: lines of articles, with spaces around
    punctuation."""
    field: str = "text"
    """Of a row: what is scored, or holds it."""
    article_field: str = "article"
    """`summary`: what is summarised."""
    max_documents: int | None = None
    """Only so many, from the first; all by default."""

    def __post_init__(self) -> None:
        problems = []
        for name, choices in (("scored", SCORED), ("layout", LAYOUTS)):
            if getattr(self, name) not in choices:
                choice = ", ".join(choices)
                problems.append(f"{name}={getattr(self, name)!r} is unknown; use {choice}")
        if self.max_documents is not None and self.max_documents < 1:
            problems.append(f"max_documents={self.max_documents} must be positive")
        check(problems)

    @property
    def source(self) -> str:
        """Where the text is from, without folders: the files' pattern, or dataset and split."""
        if self.path:
            return Path(self.path).name
        return " ".join(filter(None, (self.hub, self.hub_config, self.split)))


class Text(NamedTuple):
    """One document or example."""

    context: str | None
    """What stands before the scored text; None: the start of a document."""
    scored: str
    counted: str
    """The text that words and bytes are counted in: the scored one as the set has it."""


def texts(name: str, config: EvalSet) -> Iterator[Text]:
    """The documents of a set, in its order.

    Raises:
        UserError: it cannot be reached or read; the line says what to do.
    """
    rows = _rows(name, config)
    make = {"document": _document, "last_word": _last_word, "summary": _summary}[config.scored]
    if config.layout == "wikitext":
        lines = (_field(name, config.field, row).removesuffix("\n") for row in rows)
        rows = ({config.field: page} for page in pages(lines))
    yield from (make(name, config, row) for row in islice(rows, config.max_documents))


def pages(lines: Iterator[str]) -> Iterator[str]:
    """The articles of WikiText, each from its title to the next one's, white space as it is."""
    page: list[str] = []
    for line in lines:
        if TITLE.fullmatch(line.strip()):
            if "\n".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


def detokenized(page: str) -> str:
    """An article of WikiText with the spaces of written text."""
    for pattern, replacement in DETOKENIZE:
        page = re.sub(pattern, replacement, page)
    return page


def _document(name: str, config: EvalSet, row: dict[str, Any]) -> Text:
    text = _field(name, config.field, row)
    return Text(None, detokenized(text) if config.layout == "wikitext" else text, text)


def _last_word(name: str, config: EvalSet, row: dict[str, Any]) -> Text:
    context, space, word = _field(name, config.field, row).rpartition(" ")
    return Text(context, space + word, space + word)


def _summary(name: str, config: EvalSet, row: dict[str, Any]) -> Text:
    summary = f" {_field(name, config.field, row)}"
    return Text(_field(name, config.article_field, row) + SUMMARY_PROMPT, summary, summary)


def _field(name: str, field: str, row: dict[str, Any]) -> str:
    if field not in row:
        raise UserError(f"eval.sets.{name}: a row has no `{field}`; its fields: {', '.join(row)}")
    text = row[field]
    return text if isinstance(text, str) else ""  # a row without text is counted, and left out


def _rows(name: str, config: EvalSet) -> Iterator[dict[str, Any]]:
    if not config.path:
        return _hub_rows(name, config)
    files = sorted(
        filter(os.path.isfile, glob.glob(os.path.expanduser(config.path), recursive=True))
    )
    if not files:
        raise UserError(f"eval.sets.{name}.path={config.path}: no such file")
    return (row for file in files for row in _file_rows(name, config, file))


def _file_rows(name: str, config: EvalSet, file: str) -> Iterator[dict[str, Any]]:
    key = f"eval.sets.{name}.path"
    if not file.endswith((".txt", ".raw", ".tokens")):
        yield from rows_of(file, key)
        return
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={file}: not readable as UTF-8 ({first_line(error)})") from error
    for row in text.split("\n") if config.layout == "wikitext" else [text]:
        yield {config.field: row}


def _hub_rows(name: str, config: EvalSet) -> Iterator[dict[str, Any]]:
    _check_reachable(name, config.hub)
    from datasets import load_dataset

    try:
        data = load_dataset(config.hub, config.hub_config, split=config.split, streaming=True)
        yield from (dict(row) for row in data)
    except UserError:
        raise
    except Exception as error:  # each kind of dataset has its own for what it does not have
        raise UserError(
            f"eval.sets.{name}: {config.hub} cannot be read from the Hugging Face hub "
            f"({first_line(error)}); give eval.sets.{name}.path=<file>"
        ) from error


def _check_reachable(name: str, hub: str) -> None:
    cause = _unreachable(hub)
    if cause:
        raise UserError(
            f"eval.sets.{name}: {hub} cannot be reached on the Hugging Face hub ({cause}); give "
            f"eval.sets.{name}.path=<file>, or leave the set out (eval.only)"
        )


@cache
def _unreachable(hub: str) -> str | None:
    """Why a dataset does not answer; asked once per process, since a timeout takes seconds."""
    return check_hub(hub)
