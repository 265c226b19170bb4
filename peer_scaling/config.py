"""The border to Hydra: from a composed configuration to a `Run`, with every problem named at once.

Values are plain data. The feed-forward is looked up by name among the files of `peer_scaling/ffw`;
nothing in a configuration names code.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

import peer_scaling.ffw
from peer_scaling.checkpoint import CheckpointConfig
from peer_scaling.data import DataConfig
from peer_scaling.errors import UserError, first_line
from peer_scaling.evaluate import EvalConfig
from peer_scaling.ffw.base import FFWConfig
from peer_scaling.model import DecoderConfig
from peer_scaling.optim import OptimConfig
from peer_scaling.run import Run, Settings
from peer_scaling.track import TrackerConfig

NAMES = ("study", "variant", "runs_dir")
UNION_BRANCHES = ("int", "literal['auto']")
"""What pydantic appends to the place of a value that fits no type of a union."""
SECTIONS = ("ffw", "size", "backbone", "data", "optim", "eval", "tracker", "checkpoint")


def run_from(config: DictConfig) -> Run:
    """The validated run that a composed Hydra configuration describes.

    Raises:
        UserError: one line per problem, each with key and value.
    """
    return run_from_values(plain_values(config))


def plain_values(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries with every interpolation resolved.

    Raises:
        UserError: a value is missing or an interpolation does not resolve.
    """
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        values = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def run_from_values(values: Mapping[str, Any]) -> Run:
    """The validated run that plain values describe; see `run_from`."""
    problems: list[str] = []
    ffw_values = dict(values.get("ffw") or {})
    ffw_name = str(ffw_values.pop("name", None))
    ffw_class = _find_variant(ffw_name, problems)
    decoder_values = {**(values.get("size") or {}), **(values.get("backbone") or {})}
    settings = {key: value for key, value in values.items() if key not in SECTIONS}
    # `study=2024` is a number to Hydra and a name to us.
    settings |= {key: str(settings[key]) for key in NAMES if isinstance(settings.get(key), int)}
    bound = {
        "settings": _bind(Settings, settings, "", problems),
        "ffw": ffw_class and _bind(ffw_class, ffw_values, "ffw.", problems),
        "decoder": _bind(DecoderConfig, decoder_values, "size/backbone.", problems),
        "data": _bind(DataConfig, values.get("data") or {}, "data.", problems),
        "optim": _bind(OptimConfig, values.get("optim") or {}, "optim.", problems),
        "eval": _bind(EvalConfig, values.get("eval") or {}, "eval.", problems),
        "tracker": _bind(TrackerConfig, values.get("tracker") or {}, "tracker.", problems),
        "checkpoint": _bind(
            CheckpointConfig, values.get("checkpoint") or {}, "checkpoint.", problems
        ),
    }
    if problems:
        raise UserError(*problems)
    return Run(ffw_name=ffw_name, **bound)  # pyright: ignore[reportArgumentType]


def variants() -> list[str]:
    """Names of the feed-forward variants: the files of `peer_scaling/ffw` that hold one."""
    names = [module.name for module in pkgutil.iter_modules(peer_scaling.ffw.__path__)]
    return [name for name in names if _variant_class(name)]


def _find_variant(name: str, problems: list[str]) -> type[FFWConfig] | None:
    known = variants()
    if name not in known:
        problems.append(f"ffw.name={name}: unknown variant; choose one of {', '.join(known)}")
        return None
    return _variant_class(name)


def _variant_class(name: str) -> type[FFWConfig] | None:
    """The final config class that a file of `peer_scaling/ffw` defines, if it defines one."""
    module = importlib.import_module(f"peer_scaling.ffw.{name}")
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, FFWConfig)
        and value.__module__ == module.__name__
        and not value.__abstractmethods__
    ]
    return own[0] if own else None


def _bind(cls: type, values: Mapping[str, Any], path: str, problems: list[str]) -> Any:
    """An instance of a frozen dataclass from plain values; problems are added to the list."""
    unknown = list(_unknown_keys(cls, values, path))
    try:
        bound = TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        problems += unknown
        for details in error.errors():
            problems += _lines(path, dict(details))
        return None
    problems += unknown
    return bound


def _unknown_keys(cls: type, values: Mapping[str, Any], path: str) -> list[str]:
    known = {field.name: hint for field, hint in _typed_fields(cls)}
    problems = []
    for key, value in values.items():
        if key not in known:
            problems.append(f"{path}{key}: no such key{suggestion(key, known)}")
        elif is_dataclass(known[key]) and isinstance(value, Mapping):
            problems += _unknown_keys(known[key], value, f"{path}{key}.")
    return problems


def suggestion(key: str, known: Mapping[str, Any] | list[str]) -> str:
    """`; did you mean ...?` with the nearest known key, or nothing."""
    near = get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _typed_fields(cls: type) -> list[tuple[Any, Any]]:
    hints = get_type_hints(cls)
    return [(field, hints[field.name]) for field in fields(cls)]


def _lines(path: str, details: dict[str, Any]) -> list[str]:
    where = path + ".".join(str(p) for p in details["loc"] if p not in UNION_BRANCHES)
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "missing":
        return [f"{where}: missing"]
    if details["type"] == "value_error":
        # Raised by the dataclass itself, which names its fields and their values.
        prefix = where if not where or where.endswith(".") else f"{where}."
        return [prefix + problem for problem in message.splitlines()]
    return [f"{where}={details['input']}: {message[0].lower()}{message[1:]}"]
