"""What Hydra may do for a configuration, which is data and may come from anywhere.

Hydra imports what a configuration calls `_target_`, a logging class, a callback or a package on the
search path, and writes where it calls a folder. `GuardedLoader` reads files and composes
configurations for Hydra, and refuses all of that before Hydra acts on it: the code that runs is the
same whatever a file says, and what is written lies below the study's folder.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch
from warnings import catch_warnings, filterwarnings

import hydra._internal.hydra as hydra_internal
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peer_scaling.config import interpolation_problems, leaves
from peer_scaling.errors import UserError, first_line, shown
from peer_scaling.launcher_keys import launcher_problems
from peer_scaling.paths import NAME, NAME_RULE

MAX_ARGUMENT = 4096
"""Characters of one override: as many as a path may have, and Hydra parses slowly."""
MAX_FILE_BYTES = 16_384
"""Of a configuration file: ours have at most 2,500, and YAML is parsed slowly."""
MAX_NODES = 5_000
"""Values in a file with its aliases written out."""
MAX_OPEN = 100
"""Brackets that are open at once: the YAML parser's time grows with the square of it."""
MAX_DEPTH = 30
"""Of nested values in a file."""

FIXED: Mapping[str, Any] = {
    "callbacks": {},
    "searchpath": [],
    "output_subdir": None,
    "run": {"dir": "."},
    "sweep": {"dir": "${runs_dir}/${study}", "subdir": "."},
    "job.chdir": False,
    "job.env_set": {},
    "job.env_copy": [],
}
"""Settings of Hydra that name code, folders or variables, as conf/train.yaml has them."""
LOGGING = {
    "job_logging": ("stdout", "none", "disabled"),
    "hydra_logging": ("default", "none", "disabled"),
}
"""Hydra's options that write no file."""
TARGETS = ("launcher._target_", "sweeper._target_")
"""May name plugins, and plugins only: Hydra looks them up among those it knows."""


@contextmanager
def guarded() -> Iterator[None]:
    """Within this context, Hydra reads and composes configurations through `GuardedLoader`."""
    with patch.object(hydra_internal, "ConfigLoaderImpl", GuardedLoader):
        yield


class GuardedLoader(ConfigLoaderImpl):
    """Hydra's loader: every configuration comes through it, of a run, a study, its cells, and of
    jobs in other processes.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository.sources = [
            GuardedFiles(s.provider, s.path) if s.scheme() == "file" else s
            for s in self.repository.sources
        ]

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a configuration.

        Raises:
            UserError: a file or the result is refused.
            HydraException: Hydra does not accept an override or a choice.
        """
        check_arguments(overrides)
        try:
            # Without `_self_`, what the file itself says would count for less than its defaults.
            with catch_warnings():
                filterwarnings("error", ".*Defaults list is missing `_self_`", UserWarning)
                # Ours of a plugin's launcher, for its defaults: Hydra calls that deprecated.
                filterwarnings("ignore", r"\s.*validated against ConfigStore schema", UserWarning)
                config = super().load_configuration(
                    config_name, overrides, run_mode, from_shell, validate_sweep_overrides
                )
        except (UserError, HydraException, OmegaConfBaseException):
            raise
        except RecursionError:
            problem = "nested too deep, or a part of itself"
            raise ConfigCompositionException(f"{config_name}: {problem}") from None
        except Exception as error:  # for some of what it does not accept, Hydra has no type
            raise ConfigCompositionException(f"{config_name}: {first_line(error)}") from error
        problems = self._problems(config)
        if problems:
            raise UserError(*problems)
        return config

    def _process_config_searchpath(
        self,
        config_name: str | None,
        parsed_overrides: list[Override],
        repo: CachingConfigRepository,
    ) -> None:
        """Refuse further folders and packages before Hydra reads or imports them."""
        primary = repo.load_config(config_name) if config_name else None
        named = any(override.key_or_group == "hydra.searchpath" for override in parsed_overrides)
        if named or (primary and OmegaConf.select(primary.config, "hydra.searchpath") is not None):
            raise UserError("hydra.searchpath: not to be set; use --config-dir for your own files")
        super()._process_config_searchpath(config_name, parsed_overrides, repo)

    def _problems(self, config: DictConfig) -> list[str]:
        raw = OmegaConf.to_container(config, resolve=False)
        assert isinstance(raw, dict)
        own = raw["hydra"]
        plugins = [name for name in ("launcher", "sweeper") if not isinstance(own[name], dict)]
        if plugins:
            return [f"hydra.{n}={shown(own[n])}: must be a group of keys" for n in plugins]
        values = {name: value for name, value in raw.items() if name != "hydra"}
        values["hydra"] = {name: own[name] for name in ("launcher", "sweeper")}
        return [
            *_fixed_problems(own),
            *(p for name in LOGGING for p in self._logging_problems(own, name)),
            *_target_problems(raw),
            *launcher_problems(own),
            *(interpolation_problems(values) or _study_problems(config)),
        ]

    def _logging_problems(self, own: dict[str, Any], name: str) -> Iterator[str]:
        choice = own["runtime"]["choices"].get(f"hydra/{name}")
        if choice is None and own[name] is None:
            return
        shipped = self.repository.load_config(f"hydra/{name}/{choice}")
        known = choice in LOGGING[name] and shipped and shipped.provider == "hydra"
        if not shipped or not known or OmegaConf.to_container(shipped.config) != own[name]:
            options = ", ".join(LOGGING[name])
            yield f"hydra.{name}: not to be set; choose hydra/{name}={options}, or hydra.verbose"


class GuardedFiles(FileConfigSource):
    """Configuration files that are checked as text before anything is made of them."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one file.

        Raises:
            UserError: it is not YAML of plain values, or is too large.
        """
        path = Path(os.path.realpath(Path(self.path) / self._normalize_file_name(config_path)))
        try:
            if path.exists():
                _check_yaml(path)
            return super().load_config(config_path)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{path}: {_yaml_problem(error)}") from error
        except RecursionError as error:
            raise UserError(f"{path}: nested deeper than {MAX_DEPTH} levels") from error


def check_arguments(arguments: list[str]) -> None:
    """Raise a UserError for arguments too long or too deep to be parsed in reasonable time."""
    problems = []
    for argument in arguments:
        key = shown(argument.split("=")[0])
        if len(argument) > MAX_ARGUMENT:
            limit = f"above the limit of {MAX_ARGUMENT:,} on the command line"
            problems.append(f"{key}: {len(argument):,} characters, {limit}")
        elif _open_brackets(argument) > MAX_OPEN:
            problems.append(f"{key}: more than {MAX_OPEN} open brackets")
    if problems:
        raise UserError(*problems)


def _open_brackets(text: str) -> int:
    """The most brackets that are open at once."""
    return max(accumulate((c in "[{(") - (c in "]})") for c in text), default=0)


def _check_yaml(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: not a regular file")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{path}: {size:,} bytes, above the limit of {MAX_FILE_BYTES:,}")
    _check_text(path, path.read_text(encoding="utf-8"))


@cache  # a study reads the same few files for every model
def _check_text(path: Path, text: str) -> None:
    if _open_brackets(text) > MAX_OPEN:
        raise UserError(f"{path}: more than {MAX_OPEN} open brackets")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: not a mapping of keys to values")
    keys = [str(key.value) for key, _ in root.value]
    near = [] if "defaults" in keys else get_close_matches("defaults", keys)
    if near:  # a study without defaults would be explained by what it lacks
        raise UserError(f"{path}: {near[0]}: no such key; did you mean defaults?")
    counts: dict[int, int] = {}
    if _count(root, path, counts, 0) > MAX_NODES:
        raise UserError(f"{path}: more than {MAX_NODES:,} values, with aliases written out")


def _count(node: yaml.Node, path: Path, counts: dict[int, int], depth: int) -> int:
    """Values at and below a node, those of an alias each time; counts each node once.

    Raises:
        UserError: a value of no plain type, nested too deep, or inside itself.
    """
    if id(node) in counts:
        return counts[id(node)]
    line = f"{path}: line {node.start_mark.line + 1}"
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise UserError(f"{line}: the type {shown(node.tag)} is refused: plain values only")
    if depth > MAX_DEPTH:
        raise UserError(f"{line}: nested deeper than {MAX_DEPTH} levels")
    if not isinstance(node, yaml.CollectionNode):
        return 1
    children = node.value
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    total = 1 + sum(_count(child, path, counts, depth + 1) for child in children)
    counts[id(node)] = total
    return total


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
        return f"line {mark.line + 1}: {shown(error.problem or error.context)}"
    key = getattr(error, "full_key", None)
    return f"{key}: {first_line(error)}" if key else first_line(error)


def _fixed_problems(own: dict[str, Any]) -> Iterator[str]:
    for path, expected in FIXED.items():
        value = own
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value != expected:
            yield (
                f"hydra.{path}={shown(value)}: not to be set; it is {expected} in the config "
                f"`train`, which the defaults of every study begin with"
            )


def _target_problems(raw: object) -> Iterator[str]:
    allowed = {f"hydra.{target}" for target in TARGETS}
    for path, value in leaves(raw, ""):
        at = path.split(".")
        if "_target_" in at and path not in allowed:
            yield f"{path}={shown(value)}: a configuration names no code; remove `_target_`"


def _study_problems(config: DictConfig) -> Iterator[str]:
    """Hydra makes the folder of a multirun before the run is validated."""
    try:
        study = config.get("study")
    except OmegaConfBaseException:
        return  # `plain_values` says so
    if study is not None and not NAME.fullmatch(str(study)):
        yield f"study={shown(repr(study))} must be the name of a folder: {NAME_RULE}"
