"""Tokenise a corpus once, into immutable shards with a manifest.

The folder's name is a hash of everything that determines its content, so a folder that exists is
the right one. It is written under a temporary name and renamed when complete: a reader never sees
half of it, and of two writers one wins.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from peer_scaling.data import DOCUMENT_ENDS, MANIFEST, Corpus, DataConfig, Windows
from peer_scaling.documents import Split, check_reachable, open_documents, source_identity
from peer_scaling.errors import UserError
from peer_scaling.paths import cache_folder
from peer_scaling.synthetic import entropy_rate, markov_chain, transition_matrix
from peer_scaling.tokenizer import Tokenizer, make_tokenizer, tokenizer_identity

FORMAT = 2
"""Raised when the same configuration would give other shards."""
DOCUMENTS_PER_BATCH = 256
TOKENIZER_TRAINING_BYTES = 64_000_000
"""A BPE learns its merges from the first so many bytes of training text."""


def prepare(config: DataConfig, num_tokens: int = 0) -> Corpus:
    """The tokenised corpus of `config`, made now if it is not in the cache.

    Args:
        config: the source and its tokenizer.
        num_tokens: training tokens that the study needs. Only streamed sources (`c4`) look at it;
            the others are prepared whole.

    Raises:
        UserError: the source cannot be read, or is too small for one validation sequence.
    """
    if config.source == "c4":
        wanted = max(num_tokens, config.num_tokens or 0, 1)
        found = find_prepared(config)
        if found and len(Windows(found, "train", config.context)) * config.context >= wanted:
            return found
        # Whole shards: a larger study later reads the same first ones. A window does not cross
        # their borders, so that each gives a little less than it holds.
        usable = (config.shard_tokens - 1) // config.context * config.context
        num_tokens = -(-wanted // usable) * config.shard_tokens
    else:
        num_tokens = config.num_tokens or 0
    spec = _spec(config, num_tokens)
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / f"{config.source}-{digest[:16]}"
    if not (folder / MANIFEST).is_file():
        _write(config, num_tokens, spec, folder)
    return Corpus.load(folder)


def find_prepared(config: DataConfig) -> Corpus | None:
    """The corpus if it is local, or made without a network; None for a stream not yet prepared."""
    if config.source != "c4":
        return prepare(config)
    found = [Corpus.load(f.parent) for f in cache_folder().glob(f"c4-*/{MANIFEST}")]
    wanted = {k: v for k, v in _spec(config, 0).items() if k != "num_tokens"}
    fits = [c for c in found if wanted.items() <= c.manifest["spec"].items()]
    return max(fits, key=lambda corpus: corpus.num_tokens("train"), default=None)


def _spec(config: DataConfig, num_tokens: int) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "format": FORMAT,
        "source": config.source,
        "tokenizer": asdict(config.tokenizer) | tokenizer_identity(config.tokenizer),
        "num_tokens": num_tokens,
        "validation_tokens": config.validation_tokens,
        "shard_tokens": config.shard_tokens,
    }
    if config.source == "synthetic":
        return spec
    identity = source_identity(config.source, config.path)
    return {**spec, "identity": identity, "validation_fraction": config.validation_fraction}


def _write(config: DataConfig, num_tokens: int, spec: dict[str, Any], folder: Path) -> None:
    # Before the tokenizer, whose own download would retry for most of a minute.
    check_reachable(config.source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        fill = _fill_synthetic if config.source == "synthetic" else _fill_text
        manifest = fill(config, num_tokens, temporary)
        _check_sizes(manifest, config)
        (temporary / MANIFEST).write_text(json.dumps({"spec": spec, **manifest}, indent=1) + "\n")
        temporary.chmod(0o755)
        if not folder.exists():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill_text(config: DataConfig, num_tokens: int, folder: Path) -> dict[str, Any]:
    tokenizer = make_tokenizer(config.tokenizer, _tokenizer_texts(config))
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    limits: dict[Split, int | None] = {
        "train": num_tokens or None,
        "validation": config.validation_tokens,
    }
    dtype = np.dtype(np.uint16 if config.tokenizer.vocab_size <= 2**16 else np.uint32)
    writers: dict[Split, ShardWriter] = {
        split: ShardWriter(folder, split, dtype, config.shard_tokens, limit)
        for split, limit in limits.items()
    }
    documents = open_documents(config.source, config.path, config.validation_fraction)
    while batch := list(islice(_until_full(documents, writers), DOCUMENTS_PER_BATCH)):
        for (split, text), tokens in zip(batch, _encode(tokenizer, batch), strict=True):
            writers[split].add(tokens, len(text.encode("utf-8", "replace")))
    return {"tokenizer_sha256": tokenizer.fingerprint, "eod": tokenizer.eod, **_closed(writers)}


def _tokenizer_texts(config: DataConfig) -> Iterator[str]:
    read = 0
    for split, text in open_documents(config.source, config.path, config.validation_fraction):
        if split == "train":
            read += len(text)
            yield text
        if read >= TOKENIZER_TRAINING_BYTES:
            return


def _encode(tokenizer: Tokenizer, batch: list[tuple[Split, str]]) -> list[np.ndarray]:
    return tokenizer.encode([text for _, text in batch])


def _until_full(
    documents: Iterator[tuple[Split, str]], writers: dict[Split, "ShardWriter"]
) -> Iterator[tuple[Split, str]]:
    for split, text in documents:
        if not writers[split].full:
            yield split, text
        elif all(writer.full for writer in writers.values()):
            return


def _fill_synthetic(config: DataConfig, num_tokens: int, folder: Path) -> dict[str, Any]:
    """A first-order Markov chain over the vocabulary; the manifest holds its entropy rate."""
    matrix = transition_matrix(config.tokenizer.vocab_size)
    writers: dict[Split, ShardWriter] = {}
    sizes: tuple[tuple[Split, int], ...] = (
        ("train", num_tokens or 2**20),
        ("validation", min(config.validation_tokens, 2**18)),
    )
    for seed, (split, size) in enumerate(sizes):
        dtype = np.dtype(np.uint16)
        writers[split] = ShardWriter(folder, split, dtype, config.shard_tokens, None)
        writers[split].add(markov_chain(matrix, size, seed), 0)
    entropy = entropy_rate(matrix)
    return {"tokenizer_sha256": "synthetic", "entropy_nats": entropy, **_closed(writers)}


def _closed(writers: Mapping[Split, "ShardWriter"]) -> dict[str, Any]:
    shards = [shard for writer in writers.values() for shard in writer.close()]
    splits = {
        split: {"documents": writer.documents, "tokens": writer.tokens, "bytes": writer.text_bytes}
        for split, writer in writers.items()
    }
    writers["validation"].write_document_ends()
    dtype = next(iter(writers.values())).dtype.name
    return {"dtype": dtype, "splits": splits, "shards": shards}


def _check_sizes(manifest: dict[str, Any], config: DataConfig) -> None:
    for split, facts in manifest["splits"].items():
        if facts["tokens"] <= config.context:
            raise UserError(
                f"data={config.source}: {facts['tokens']} {split} tokens in {facts['documents']} "
                f"documents, fewer than one sequence of context={config.context}: give more "
                f"documents, or change data.validation_fraction={config.validation_fraction}"
            )


class ShardWriter:
    """Packs token arrays of one split into files of `shard_tokens` tokens."""

    def __init__(
        self, folder: Path, split: Split, dtype: np.dtype, shard_tokens: int, limit: int | None
    ) -> None:
        self.dtype = dtype
        self.documents = self.tokens = self.text_bytes = 0
        self._folder, self._split = folder, split
        self._shard_tokens, self._limit = shard_tokens, limit
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._shards: list[dict[str, Any]] = []
        self._document_ends: list[tuple[int, int]] = []

    @property
    def full(self) -> bool:
        """Whether the limit on tokens is reached."""
        return self._limit is not None and self.tokens >= self._limit

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document, cut where the limit is."""
        if self.full:
            return
        room = len(tokens) if self._limit is None else self._limit - self.tokens
        kept = tokens[:room].astype(self.dtype)
        self.documents += 1
        self.tokens += len(kept)
        # A document cut by the limit counts with its share of bytes.
        self.text_bytes += round(text_bytes * len(kept) / len(tokens))
        self._document_ends.append((self.tokens, self.text_bytes))
        self._pending.append(kept)
        self._num_pending += len(kept)
        if self._num_pending >= self._shard_tokens:
            self._flush(whole_only=True)

    def close(self) -> list[dict[str, Any]]:
        """Write what is left and describe all shards."""
        self._flush(whole_only=False)
        return self._shards

    def write_document_ends(self) -> None:
        """Write tokens and bytes up to the end of each document, int64 (documents, 2)."""
        ends_N2 = np.array(self._document_ends, dtype=np.int64).reshape(-1, 2)
        np.save(self._folder / DOCUMENT_ENDS, ends_N2, allow_pickle=False)

    def _flush(self, *, whole_only: bool) -> None:
        tokens = np.concatenate([*self._pending, np.empty(0, self.dtype)])
        end = len(tokens) // self._shard_tokens * self._shard_tokens if whole_only else len(tokens)
        for start in range(0, end, self._shard_tokens):
            self._write(tokens[start : min(end, start + self._shard_tokens)])
        self._pending, self._num_pending = [tokens[end:]], len(tokens) - end

    def _write(self, tokens: np.ndarray) -> None:
        name = f"{self._split}-{len(self._shards):05d}.bin"
        data = tokens.tobytes()
        (self._folder / name).write_bytes(data)
        self._shards.append(
            {
                "file": name,
                "split": self._split,
                "tokens": len(tokens),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
