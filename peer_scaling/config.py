"""The border to Hydra: from a composed configuration to a `Run`, with every problem named at once.

Values are plain data. The feed-forward is looked up by name among the files of `peer_scaling/ffw`;
nothing in a configuration names code.
"""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

import peer_scaling.ffw
from peer_scaling.checkpoint import CheckpointConfig
from peer_scaling.claims import ClaimConfig
from peer_scaling.data import DataConfig
from peer_scaling.errors import UserError, first_line, shown
from peer_scaling.evaluate import EvalConfig
from peer_scaling.ffw.base import FFWConfig
from peer_scaling.model import DecoderConfig
from peer_scaling.optim import OptimConfig
from peer_scaling.run import Run, Settings
from peer_scaling.track import TrackerConfig

NAMES = ("study", "variant", "runs_dir")
UNION_BRANCHES = ("int", "literal['auto']")
"""What pydantic appends to the place of a value that fits no type of a union."""
SECTIONS = ("ffw", "size", "backbone", "data", "optim", "eval", "tracker", "checkpoint", "claim")
MAX_REFERENCES = 20
"""Interpolations in a configuration; ours have 7. Together they resolve to at most 3^(20/3) = 1,500
values."""
MAX_INT = 2**63
MAX_KEY = 100
"""Characters of an unknown key that is compared with the known ones."""


def run_from(config: DictConfig) -> Run:
    """The validated run that a composed Hydra configuration describes.

    Raises:
        UserError: one line per problem, each with key and value.
    """
    return run_from_values(plain_values(config))


def plain_values(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries with every interpolation resolved.

    Raises:
        UserError: a value is missing, or an interpolation does not resolve or is refused
            (`interpolation_problems`).
    """
    keys: list[Any] = [key for key in config if key != "hydra"]  # a file's may be numbers
    own = OmegaConf.masked_copy(config, keys)
    problems = interpolation_problems(OmegaConf.to_container(own, resolve=False))
    problems = problems or list(_unresolved(own, ""))
    if problems:
        raise UserError(*problems)
    values = OmegaConf.to_container(own, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def interpolation_problems(raw: object, path: str = "") -> list[str]:
    """What interpolations in an unresolved configuration may not do, a line each.

    They may refer to other keys, as `${ffw.name}`, and call no resolver, as `${oc.env:NAME}` is:
    resolvers read the environment, whose secrets would end in records and logs, and make
    configurations out of text. Every call has a colon in the text, whatever it is wrapped in.
    Their number is limited, because each may double what those before it have made.
    """
    texts = [
        (key, text) for key, text in leaves(raw, path) if isinstance(text, str) and "${" in text
    ]
    problems = [
        f"{key}={shown(text)}: `${{...:...}}` calls a resolver; only references to other keys are "
        f"resolved, as ${{ffw.name}}: write the value out"
        for key, text in texts
        if ":" in text.split("${", 1)[1]
    ]
    counts = Counter[str]()
    for key, text in texts:
        counts[key.split(".")[0]] += text.count("${")
    if counts.total() > MAX_REFERENCES:
        keys = ", ".join(key for key, _ in counts.most_common(3))
        limit = f"above the limit of {MAX_REFERENCES}"
        problems.append(f"{keys}, ...: {counts.total()} references to other keys, {limit}")
    return problems


def leaves(node: object, path: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below a plain node that is no dictionary and no list."""
    if isinstance(node, Mapping | list):
        children = node.items() if isinstance(node, Mapping) else enumerate(node)
        for key, value in children:
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _unresolved(node: Any, path: str) -> Iterator[str]:
    """A line for each value of an OmegaConf container that is missing or refers to nothing."""
    raw: Any = OmegaConf.to_container(node, resolve=False)
    keys: Iterable[Any] = raw if isinstance(raw, dict) else range(len(raw))
    for key in keys:
        where = f"{path}{key}"
        if OmegaConf.is_missing(node, key):
            yield f"{where}: missing; give it a value"
            continue
        try:
            value = node[key]
        except (OmegaConfBaseException, RecursionError) as error:
            yield f"{where}={shown(raw[key])}: {first_line(error)}"
            continue
        if isinstance(value, DictConfig | ListConfig) and not OmegaConf.is_interpolation(node, key):
            yield from _unresolved(value, f"{where}.")


def run_from_values(values: Mapping[str, Any]) -> Run:
    """The validated run that plain values describe; see `run_from`."""
    problems: list[str] = []
    sections = {name: _section(values, name, problems) for name in SECTIONS}
    ffw_name = str(sections["ffw"].pop("name", None))
    ffw_class = _find_variant(ffw_name, problems)
    settings = {key: value for key, value in values.items() if key not in SECTIONS}
    # `study=2024` is a number to Hydra and a name to us.
    settings |= {k: str(settings[k]) for k in NAMES if type(settings.get(k)) is int}
    decoder_path = {key: f"{name}." for name in ("size", "backbone") for key in sections[name]}
    bound = {
        "settings": bind(Settings, settings, "", problems, others=SECTIONS),
        "ffw": ffw_class and bind(ffw_class, sections["ffw"], "ffw.", problems, others=("name",)),
        "decoder": bind(
            DecoderConfig, sections["size"] | sections["backbone"], decoder_path, problems
        ),
        "data": bind(DataConfig, sections["data"], "data.", problems),
        "optim": bind(OptimConfig, sections["optim"], "optim.", problems),
        "eval": bind(EvalConfig, sections["eval"], "eval.", problems),
        "tracker": bind(TrackerConfig, sections["tracker"], "tracker.", problems),
        "checkpoint": bind(CheckpointConfig, sections["checkpoint"], "checkpoint.", problems),
        "claim": bind(ClaimConfig, sections["claim"], "claim.", problems),
    }
    if problems:
        raise UserError(*problems)
    return Run(ffw_name=ffw_name, **bound)  # pyright: ignore[reportArgumentType]


def _section(values: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    section = values.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        problems.append(f"{name}={shown(section)}: must be a group of keys or one of its options")
        return {}
    return {str(key): value for key, value in section.items()}


def variants() -> list[str]:
    """Names of the feed-forward variants: the files of `peer_scaling/ffw` that hold one."""
    names = [module.name for module in pkgutil.iter_modules(peer_scaling.ffw.__path__)]
    return [name for name in names if _variant_class(name)]


def _find_variant(name: str, problems: list[str]) -> type[FFWConfig] | None:
    known = variants()
    if name not in known:
        choices = ", ".join(known)
        problems.append(f"ffw.name={shown(name)}: unknown variant; choose one of {choices}")
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


def bind(
    cls: type,
    values: Mapping[str, Any],
    path: str | Mapping[str, str],
    problems: list[str],
    others: Iterable[str] = (),
) -> Any:
    """An instance of a frozen dataclass from plain values; None if there are problems.

    Args:
        cls: the dataclass.
        values: by the names of its fields.
        path: what stands before a key in messages; a mapping if that is not the same for all.
        problems: gets a line for each problem.
        others: keys beside the dataclass's, that an unknown one may have been meant for.
    """
    before = len(problems)
    problems += _refusals(cls, values, path, others)
    try:
        bound = _adapter(cls).validate_python(dict(values))
    except ValidationError as error:
        for details in error.errors():
            problems += _lines(path, dict(details))
    else:
        return bound if len(problems) == before else None
    return None


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    """Made once for each type: a study binds all of them for every cell."""
    return TypeAdapter(cls)


def _refusals(
    cls: type, values: Mapping[str, Any], path: str | Mapping[str, str], others: Iterable[str] = ()
) -> Iterator[str]:
    """A line for each key that does not exist, and each number that Python or pydantic would take
    and a user cannot mean.
    """
    known = get_type_hints(cls)
    for key, value in values.items():
        where, hint = _where(path, key), known.get(key)
        if hint is None:
            names = [*known, *others]
            yield f"{where}: no such key{suggestion(key, names) or '; use ' + ', '.join(names)}"
        for part, inner in _parts(hint, value):
            if isinstance(inner, bool) and _is_number(part):
                yield f"{where}={shown(value)}: must be a number"
            elif isinstance(inner, int) and not -MAX_INT <= inner < MAX_INT:
                yield f"{where}={shown(value)} must be in [-2^63, 2^63)"
            elif is_dataclass(part) and isinstance(inner, Mapping):
                yield from _refusals(part, inner, f"{where}.")  # pyright: ignore[reportArgumentType]


def _parts(hint: Any, value: Any) -> list[tuple[Any, Any]]:
    """(type, value) of a field, or of the elements of one that is a tuple."""
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return [(get_args(hint)[0], element) for element in value]
    return [(hint, value)]


def _is_number(hint: Any) -> bool:
    return bool({int, float} & {hint, *get_args(hint)}) and bool not in (hint, *get_args(hint))


def suggestion(key: str, known: Mapping[str, Any] | list[str]) -> str:
    """`; did you mean ...?` with the nearest known key, or nothing."""
    near = get_close_matches(key[:MAX_KEY], list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _where(path: str | Mapping[str, str], key: str) -> str:
    before = path if isinstance(path, str) else path.get(key, next(iter(path.values()), ""))
    return before + shown(key)


def _lines(path: str | Mapping[str, str], details: dict[str, Any]) -> list[str]:
    parts = [str(part) for part in details["loc"] if part not in UNION_BRANCHES]
    first, *rest = parts or [""]
    where = ".".join([_where(path, first), *rest]) if first else ""
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "missing":
        return [f"{where}: missing"]
    if details["type"] == "value_error":
        # Raised by the dataclass itself, which names its fields and their values.
        return [_of_dataclass(path, where, problem) for problem in message.splitlines()]
    return [f"{where}={shown(details['input'])}: {message[0].lower()}{message[1:]}"]


def _of_dataclass(path: str | Mapping[str, str], where: str, problem: str) -> str:
    """A problem that starts with a field's name, with the path to that field."""
    name = problem.split("=")[0].split()[0]
    return shown(f"{where}.{problem}" if where else _where(path, name) + problem[len(name) :])
