"""Batches of a tokenised corpus, as a pure function of (data seed, step).

A prepared corpus is a folder with `manifest.json` and memory-mapped shards of token numbers,
written once by `prepare.py` and never changed. Each shard is cut into windows of `context` + 1
tokens that overlap by one, so that every token but a shard's first is predicted once. Windows cross
document borders; documents end with the end-of-document token.

Shape suffixes: B sequences, T time (context).
"""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from peer_scaling.documents import Split
from peer_scaling.errors import UserError, check
from peer_scaling.paths import inside
from peer_scaling.tokenizer import TokenizerConfig

ORDERS = ("shuffled", "stream")
MANIFEST = "manifest.json"
DOCUMENT_ENDS = "validation-documents.npy"
MAX_SEED = 2**63


@dataclass(frozen=True)
class DataConfig:
    """Which text, how it is tokenised, and how it is read."""

    source: str
    """`sotu`, `c4`, `local` or `synthetic`."""
    tokenizer: TokenizerConfig
    context: int
    """Tokens per sequence that the model sees."""
    path: str | None = None
    """`local`: a file or glob of .txt, .jsonl, .jsonl.gz or .parquet."""
    validation_fraction: float = 0.05
    """Share of the documents held out, by hash; `c4` has its own split."""
    seed: int = 0
    """Seed of the order of the training windows; the same for every model of a study."""
    order: str = "shuffled"
    """`shuffled` (a new permutation per epoch) or `stream` (as stored: for corpora that come
    shuffled, whose first windows then do not depend on how much is prepared)."""
    max_epochs: float = 4.0
    """A run that would read the corpus more often is refused (Muennighoff et al. 2023, 2305.16264:
    up to 4 epochs cost little)."""
    num_tokens: int | None = None
    """Training tokens to prepare: `synthetic` generates so many, `c4` at least so many and what a
    study needs, the others at most so many."""
    validation_tokens: int = 4_194_304
    """At most so many validation tokens are prepared."""
    shard_tokens: int = 16_777_216
    """Tokens per shard."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be positive"
            for name in ("context", "max_epochs", "validation_tokens", "num_tokens")
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        if self.shard_tokens <= self.context:
            problems.append(f"shard_tokens={self.shard_tokens} must exceed context={self.context}")
        if not 0 <= self.seed < MAX_SEED:
            problems.append(f"seed={self.seed} must be in [0, 2^63)")
        if not 0 < self.validation_fraction < 1:
            problems.append(f"validation_fraction={self.validation_fraction} must be in (0, 1)")
        if self.order not in ORDERS:
            problems.append(f"order={self.order!r} is unknown; choose one of {', '.join(ORDERS)}")
        if self.source not in ("sotu", "c4", "local", "synthetic"):
            problems.append(f"source={self.source!r} is unknown; choose sotu, c4, local, synthetic")
        if self.source == "c4" and self.order != "stream":
            problems.append(
                f"order={self.order}: c4 is read as it streams, so that a run does not depend on "
                f"how much of it is prepared; use order=stream"
            )
        check(problems)


_DAMAGED = "damaged; delete {}, it is prepared again"


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    split: Split
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str


@dataclass(frozen=True)
class SplitSize:
    """What a split holds."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    """UTF-8 bytes of its text; 0 for synthetic data."""


@dataclass(frozen=True)
class Splits:
    """Sizes of both splits."""

    train: SplitSize
    validation: SplitSize


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds; it is read from disk and may come from anywhere."""

    spec: dict[str, Any]
    """What the corpus was made from."""
    tokenizer_sha256: str
    dtype: Literal["uint16", "uint32"]
    splits: Splits
    shards: list[Shard]
    entropy_nats: float | None = None
    """`synthetic`: entropy rate of the source."""
    eod: int | None = None
    """The token that ends documents."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: what its manifest says, and where it is."""

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    """A `Manifest` as plain values."""

    @staticmethod
    def load(folder: Path) -> "Corpus":
        """Read a folder that `prepare` wrote.

        Raises:
            UserError: no corpus there, its manifest or table of documents is none, or a shard is
                missing, lies elsewhere, or has another size than recorded.
        """
        path = inside(folder, MANIFEST)
        if not path.is_file():
            raise UserError(f"{folder}: no {MANIFEST}; delete the folder, it is prepared again")
        try:
            manifest = TypeAdapter(Manifest).validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{path}: {_DAMAGED.format(folder)}") from error
        for shard in manifest.shards:
            file = inside(folder, shard.file)
            if not file.is_file() or file.stat().st_size != shard.bytes:
                raise UserError(f"{file}: {_DAMAGED.format(folder)}")
        corpus = Corpus(folder, asdict(manifest))
        corpus.validation_bytes(0)
        return corpus

    def num_tokens(self, split: Split) -> int:
        """Tokens of a split, end-of-document tokens included."""
        return sum(s["tokens"] for s in self.manifest["shards"] if s["split"] == split)

    def validation_bytes(self, num_tokens: int) -> float | None:
        """UTF-8 bytes of the text of the first validation tokens; None for synthetic data.

        Exact at the end of each document, linear in tokens within one.
        """
        if not self.manifest["splits"]["validation"]["bytes"]:
            return None
        path = inside(self.folder, DOCUMENT_ENDS)
        if not path.is_file():
            raise UserError(f"{path}: {_DAMAGED.format(self.folder)}")
        try:
            with path.open("rb") as file:
                ends_N2 = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {_DAMAGED.format(self.folder)}") from error
        if ends_N2.ndim != 2 or ends_N2.shape[1:] != (2,) or ends_N2.dtype != np.int64:
            raise UserError(f"{path}: {_DAMAGED.format(self.folder)}")
        return float(np.interp(num_tokens, [0, *ends_N2[:, 0]], [0, *ends_N2[:, 1]]))

    def fingerprint(self, order: str) -> str:
        """sha256 of what training and evaluation read, the same wherever the corpus lies.

        With `stream` order the first training shard stands for all, so that preparing more tokens
        later leaves the identity of runs as it is.
        """
        facts = [self.manifest["tokenizer_sha256"], order]
        shards = self.manifest["shards"]
        facts += [s["sha256"] for s in shards if s["split"] == "validation"]
        train = [s["sha256"] for s in shards if s["split"] == "train"]
        facts += train[:1] if order == "stream" else train
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()


class Windows:
    """The windows of one split, by number."""

    def __init__(self, corpus: Corpus, split: Split, context: int) -> None:
        dtype = np.dtype(corpus.manifest["dtype"])
        shards = [s for s in corpus.manifest["shards"] if s["split"] == split]
        self.context = context
        self._shards = [np.memmap(corpus.folder / s["file"], dtype, mode="r") for s in shards]
        counts = [max(0, (len(s) - 1) // context) for s in self._shards]
        self._first = np.concatenate(([0], np.cumsum(counts)))

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, numbers_B: np.ndarray) -> np.ndarray:
        """Windows by number, int64 (B, T + 1)."""
        shard_B = np.searchsorted(self._first, numbers_B, side="right") - 1
        start_B = (numbers_B - self._first[shard_B]) * self.context
        width = self.context + 1
        rows = [self._shards[s][a : a + width] for s, a in zip(shard_B, start_B, strict=True)]
        return np.stack(rows).astype(np.int64)


class TrainingBatches:
    """Batches for training: `batch(step)` depends on the data, the data seed and the step alone."""

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        seed: int,
        order: str,
        own_B: np.ndarray | None = None,
    ) -> None:
        """`own_B` are the places in a batch of the sequences that are read; by default all."""
        self._own_B = np.arange(batch_size) if own_B is None else own_B
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._order = order
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Sequences of a step, int64 (B, T + 1): inputs are all but the last, targets all but the
        first.
        """
        position_B = step * self._batch_size + self._own_B
        epoch_B, rank_B = np.divmod(position_B, len(self._windows))
        numbers_B = [self._order_of(int(e))[r] for e, r in zip(epoch_B, rank_B, strict=True)]
        return self._windows.read(np.array(numbers_B))

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._permutation = window_order(len(self._windows), self._seed, epoch, self._order)
            self._epoch = epoch
        return self._permutation


def window_order(num_windows: int, seed: int, epoch: int, order: str) -> np.ndarray:
    """The order of the windows in an epoch, int64 (num_windows,).

    Sorting raw Philox output, whose stream NumPy guarantees for all versions (NEP 19), where
    `Generator.permutation` may change.
    """
    if order == "stream":
        return np.arange(num_windows)
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(num_windows), kind="stable")
