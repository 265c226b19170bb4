"""Text to token numbers: a byte-level BPE of our own, raw bytes, or somebody else's tokenizer."""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from peer_scaling.errors import UserError, first_line

KINDS = ("bpe", "bytes", "file", "hf", "none")
END_OF_DOCUMENT = "<|endofdoc|>"
"""The end-of-document token of our own tokenizers."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer, and the size of the vocabulary that the model is built for."""

    kind: str = "bpe"
    """`bpe` (byte-level, trained on the training documents), `bytes`, `file` (a `tokenizers` JSON
    or a SentencePiece model), `hf` (a transformers tokenizer, by hub name or folder) or `none`
    (synthetic data: token numbers without text)."""
    vocab_size: int = 512
    """Rows of the embedding; token numbers are below it."""
    name: str | None = None
    """Path or hub name, for `file` and `hf`."""
    eod_token: str | None = None
    """The end-of-document token, for `file` and `hf`."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if self.kind in ("file", "hf") and not (self.name and self.eod_token):
            raise ValueError(f"kind={self.kind} needs name (a path or hub name) and eod_token")
        smallest = 257 if self.kind in ("bpe", "bytes") else 2
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size={self.vocab_size} is below {smallest}"
                + (": 256 bytes and the end of a document" if smallest == 257 else "")
            )


class Tokenizer:
    """Encodes documents; every document ends with the end-of-document token."""

    def __init__(self, backend: Any, eod: int) -> None:
        self._backend = backend
        self.eod = eod

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token numbers of each text, int64, the end-of-document token last."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [np.array([*e.ids, self.eod], dtype=np.int64) for e in encodings]

    def to_json(self) -> str:
        """The tokenizer as one `tokenizers` JSON document."""
        return self._backend.to_str()

    @property
    def num_tokens(self) -> int:
        """Largest token number + 1."""
        return max(self._backend.get_vocab().values()) + 1

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's JSON and its end-of-document token."""
        return hashlib.sha256(f"{self.eod}\n{self.to_json()}".encode()).hexdigest()


def make_tokenizer(config: TokenizerConfig, training_texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` describes; `training_texts` are read only to train a BPE.

    Raises:
        UserError: it cannot be loaded, lacks `eod_token`, or exceeds `vocab_size`.
    """
    if config.kind in ("bpe", "bytes"):
        texts = training_texts if config.kind == "bpe" else ()
        vocab_size = config.vocab_size if config.kind == "bpe" else 257
        backend = _byte_level_bpe(texts, vocab_size)
        return Tokenizer(backend, backend.token_to_id(END_OF_DOCUMENT))
    backend = _load_file(str(config.name)) if config.kind == "file" else _load_hub(str(config.name))
    eod = backend.token_to_id(str(config.eod_token))
    if eod is None:
        raise UserError(
            f"data.tokenizer.eod_token={config.eod_token!r} is not in the vocabulary of "
            f"{config.name}; name its end-of-text token"
        )
    tokenizer = Tokenizer(backend, eod)
    if tokenizer.num_tokens > config.vocab_size:
        raise UserError(
            f"data.tokenizer.vocab_size={config.vocab_size} is smaller than the "
            f"{tokenizer.num_tokens} tokens of {config.name}; set it to at least that"
        )
    return tokenizer


def tokenizer_identity(config: TokenizerConfig) -> dict[str, str]:
    """What tells one version of a tokenizer on disk from another; empty where its name suffices.

    Raises:
        UserError: there is no such file.
    """
    path = Path(str(config.name))
    if config.kind == "file":
        if not path.is_file():
            raise UserError(f"data.tokenizer.name={path}: no such file")
        return {"sha256": _sha256_of([path])}
    if config.kind == "hf" and path.is_dir():
        files = (f for f in path.iterdir() if f.suffix in (".json", ".model", ".txt"))
        return {"sha256": _sha256_of(sorted(files))}
    return {}


def load_tokenizer(folder: Path, eod: int) -> Tokenizer:
    """The tokenizer that a prepared corpus in `folder` was made with."""
    from tokenizers import Tokenizer as Backend

    return Tokenizer(Backend.from_file(str(folder / "tokenizer.json")), eod)


def _byte_level_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _load_file(path: str) -> Any:
    from tokenizers import Tokenizer as Backend

    if path.endswith(".json"):
        try:
            return Backend.from_file(path)
        except Exception as error:  # the type that `tokenizers` raises
            raise UserError(
                f"data.tokenizer.name={path}: no tokenizer of the library `tokenizers` "
                f"({first_line(error)})"
            ) from error
    # transformers converts SentencePiece models only out of a folder with this file name.
    with TemporaryDirectory() as folder:
        shutil.copy(path, Path(folder) / "spiece.model")
        return _load_hub(folder, tokenizer_class="T5Tokenizer")


def _load_hub(name: str, tokenizer_class: str = "AutoTokenizer") -> Any:
    import transformers

    try:
        return getattr(transformers, tokenizer_class).from_pretrained(name).backend_tokenizer
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.tokenizer.name={name} cannot be loaded ({first_line(error)}); give a folder, "
            f"or use data.tokenizer.kind=file with a tokenizer.json"
        ) from error


def _sha256_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()
