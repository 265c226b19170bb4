"""A trained model as a folder that transformers loads, without this project.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The modelling code is `peer_scaling/exported`, copied as it is; the weights are the run's, renamed.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peer_scaling import exported
from peer_scaling.card import model_card
from peer_scaling.errors import UserError, first_line, without_secrets
from peer_scaling.publish import WEIGHTS
from peer_scaling.record import RECORD, RunRecord, record_text
from peer_scaling.tokenizer import END_OF_DOCUMENT
from peer_scaling.trained import Trained

if TYPE_CHECKING:
    from peer_scaling.exported.configuration_peer_scaling import PeerScalingConfig

CODE = (
    "configuration_peer_scaling.py",
    "layers_peer_scaling.py",
    "modeling_peer_scaling.py",
)
TOKENIZER = "tokenizer.json"
RENAMED = {"embedding_VD": "model.embed_tokens.weight", "head_VD": "lm_head.weight"}
"""Tensors whose name is not `model.` and ours: transformers ties, resizes and adapts by these."""
PATHS = ("runs_dir", "path")
"""Keys of a run's configuration whose values are paths on its machine."""


def export(trained: Trained, folder: Path, tokenizer_folder: Path | None) -> None:
    """Write weights, configuration, modelling code, tokenizer, record and model card.

    Args:
        trained: the run.
        folder: made now, complete or not at all; it may exist if it is empty.
        tokenizer_folder: of the prepared corpus, whose `tokenizer.json` is written along so that it
            encodes as in training; None writes no tokenizer.

    Raises:
        UserError: `folder` is not empty or cannot be written, the tokenizer is not the run's, or
            the run's feed-forward has no exported form.
    """
    _check_empty(folder)
    tokenizer, eod = (
        (None, None) if tokenizer_folder is None else _read_tokenizer(trained, tokenizer_folder)
    )
    config = _config(trained, eod)
    tensors = _tensors(trained)
    _check_fit(config, tensors)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({first_line(error)})") from error
    try:
        _write_model(temporary, config, tensors)
        _write_facts(temporary, trained, has_tokenizer=tokenizer is not None)
        if tokenizer is not None:
            data = trained.run.data
            eod_token = data.tokenizer.eod_token or END_OF_DOCUMENT
            _write_tokenizer(temporary, tokenizer, eod_token, data.context)
        temporary.chmod(0o755)
        temporary.rename(folder)  # over an empty folder too
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({first_line(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: there is something already; give a new or an empty folder")


def _config(trained: Trained, eod: int | None) -> "PeerScalingConfig":
    from peer_scaling.exported.configuration_peer_scaling import FEED_FORWARDS, PeerScalingConfig

    run, decoder = trained.run, trained.run.decoder
    if run.ffw_name not in FEED_FORWARDS:
        raise UserError(
            f"ffw={run.ffw_name} has no exported form, only {', '.join(FEED_FORWARDS)}: add one to "
            f"peer_scaling/exported/layers_peer_scaling.py"
        )
    return PeerScalingConfig(
        vocab_size=run.data.tokenizer.vocab_size,
        hidden_size=decoder.d_model,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_heads,
        max_position_embeddings=run.data.context,
        norm=decoder.norm,
        rotary_base=decoder.rotary_base,
        bias=decoder.bias,
        normalize_embeddings=decoder.normalize_embeddings,
        tie_word_embeddings=decoder.tie_embeddings,
        ffw=asdict(decoder.ffw),
        swapped_ffw={"name": run.ffw_name, **asdict(run.ffw)},  # pyright: ignore[reportArgumentType]
        architectures=["PeerScalingForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_peer_scaling.PeerScalingConfig",
            "AutoModel": "modeling_peer_scaling.PeerScalingModel",
            "AutoModelForCausalLM": "modeling_peer_scaling.PeerScalingForCausalLM",
        },
        dtype="float32",
        bos_token_id=eod,  # what stands before a document in training is the end of another
        eos_token_id=eod,
        pad_token_id=eod,
    )


def _tensors(trained: Trained) -> dict[str, Tensor]:
    own = trained.model.state_dict()
    return {RENAMED.get(n, f"model.{n}"): t.detach().contiguous() for n, t in own.items()}


def _check_fit(config: "PeerScalingConfig", tensors: Mapping[str, Tensor]) -> None:
    """The exported code, without weights, must have the tensors that are written."""
    from peer_scaling.exported.modeling_peer_scaling import PeerScalingForCausalLM

    with torch.device("meta"):
        model = PeerScalingForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if wrong:
        raise AssertionError(f"the exported code does not fit the model: {', '.join(wrong)}")


def _write_model(folder: Path, config: "PeerScalingConfig", tensors: dict[str, Tensor]) -> None:
    for name in CODE:
        shutil.copyfile(Path(exported.__path__[0]) / name, folder / name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / CODE[0], folder / WEIGHTS)  # safetensors' own is for the user alone
    config.to_json_file(folder / "config.json")
    special = {f"{n}_token_id": getattr(config, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    _write_json(folder / "generation_config.json", special)


def _write_facts(folder: Path, trained: Trained, *, has_tokenizer: bool) -> None:
    record = public_record(trained.record)
    (folder / RECORD).write_text(record_text(record), encoding="utf-8")
    card = model_card(record, has_tokenizer=has_tokenizer)
    (folder / "README.md").write_text(card, encoding="utf-8")


def public_record(record: RunRecord) -> RunRecord:
    """The record without the folders of the machine it was made on: a path is its last part."""
    return replace(record, config=_without_folders(record.config))


def _without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    paths = (*PATHS, "name") if values.get("kind") == "file" else PATHS
    return {key: _without_folder(value, key in paths) for key, value in values.items()}


def _without_folder(value: Any, is_path: bool) -> Any:
    if isinstance(value, Mapping):
        return _without_folders(value)
    if isinstance(value, list | tuple):
        return [_without_folder(item, is_path) for item in value]
    if not isinstance(value, str):
        return value
    absolute = (path(value).is_absolute() for path in (PurePosixPath, PureWindowsPath))
    if is_path or value.startswith("~") or any(absolute):
        return (PureWindowsPath if "\\" in value else PurePosixPath)(value).name
    return without_secrets(value)


def _read_tokenizer(trained: Trained, folder: Path) -> tuple[dict[str, Any], int]:
    """The tokenizer's document, and its end-of-document token. Without a post-processor, which may
    add tokens that training did not (`Tokenizer.encode`).
    """
    from tokenizers import Tokenizer as Backend

    path, config = folder / TOKENIZER, trained.run.data.tokenizer
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["post_processor"] = None
        backend = Backend.from_str(json.dumps(document))
    except Exception as error:  # `tokenizers` raises no type of its own
        raise UserError(f"{path}: no tokenizer ({first_line(error)}); prepare it again") from error
    eod = backend.token_to_id(config.eod_token or END_OF_DOCUMENT)
    num_tokens = max(backend.get_vocab().values()) + 1
    if eod is None or num_tokens > config.vocab_size:
        raise UserError(
            f"{path}: {num_tokens} tokens, end of a document {eod}: not the tokenizer of "
            f"{trained.record.run_id}, which has vocab_size={config.vocab_size}"
        )
    return document, eod


def _write_tokenizer(folder: Path, document: dict[str, Any], eod_token: str, context: int) -> None:
    _write_json(folder / TOKENIZER, document)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod_token,
        "eos_token": eod_token,
        "pad_token": eod_token,
        "padding_side": "left",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
