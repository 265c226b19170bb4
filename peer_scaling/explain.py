"""What Hydra did not accept, in one line for each thing."""

from collections.abc import Iterator

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from peer_scaling.config import suggestion
from peer_scaling.errors import UserError, first_line, shown
from peer_scaling.paths import config_folder


def explain(
    error: Exception, loader: ConfigLoader, config_name: str, overrides: list[str]
) -> list[str]:
    """One line per thing that Hydra did not accept among the overrides of a configuration.

    Hydra stops at the first; to find all, each override is tried alone, on the choices of groups
    that are good.
    """
    composer = _Composer(loader, config_name)
    base = composer.compose([])
    if not isinstance(base, DictConfig):
        return _explain_one(base, None, [])
    singles = [single for override in overrides for single in _single_values(override)]
    groups = composer.group_choices(base, singles)
    chosen = composer.compose(groups)
    base = chosen if isinstance(chosen, DictConfig) else base
    known = list(_flat_keys(OmegaConf.to_container(base, resolve=False)))
    lines = []
    for single in singles:
        tried = None if single in groups else composer.problem(single, groups, known)
        lines += _explain_one(tried, single, known) if tried else []
    return lines or _explain_one(error, None, known)


class _Composer:
    """Composes one configuration with different overrides."""

    def __init__(self, loader: ConfigLoader, config_name: str) -> None:
        self._loader, self._config_name = loader, config_name

    def compose(self, overrides: list[str]) -> DictConfig | Exception:
        """The configuration, or why there is none."""
        try:
            return self._loader.load_configuration(
                self._config_name, overrides, RunMode.RUN, from_shell=False
            )
        except Exception as error:  # whatever it is, it is what the user is to be told
            return error

    def problem(self, override: str, groups: list[str], known: list[str]) -> Exception | None:
        """What is wrong with one override, on good choices of groups."""
        try:
            key = OverridesParser.create().parse_override(override).get_key_element()
        except Exception as error:  # see `compose`
            return OverrideParseException(override, first_line(error))
        if key in known and "hydra" not in key and not any(k.startswith(f"{key}.") for k in known):
            return None  # a value of ours: Hydra takes what it can read
        tried = self.compose([*groups, override])
        return tried if isinstance(tried, Exception) else None

    def group_choices(self, base: DictConfig, overrides: list[str]) -> list[str]:
        """The overrides that choose a good option of a group, one for each group."""
        raw = OmegaConf.to_container(base, resolve=False)
        choices = {}
        for override in overrides:
            group = override.split("=")[0]
            is_group = isinstance(raw, dict) and isinstance(raw.get(group), dict)
            if is_group and isinstance(self.compose([override]), DictConfig):
                choices[group] = override
        return list(choices.values())


def _explain_one(error: Exception, override: str | None, known: list[str]) -> list[str]:
    if isinstance(error, UserError):
        return list(error.problems)
    key = override.split("=")[0].lstrip("+~") if override else ""
    if isinstance(error, MissingConfigException):
        *group, name = (error.missing_cfg_file or "").split("/")
        options = list(error.options or _studies())
        missing = f"{'/'.join(group)}={shown(name)}" if group else f"--config-name {shown(name)}"
        what = override or missing
        near = suggestion(name, options)
        return [f"{shown(what)}: unknown; choose one of {', '.join(options)}{near}"]
    if override and "=" not in override:
        return [f"{shown(override)}: no override; write key=value"]
    if override and key not in known and not key.startswith("hydra"):
        hint = suggestion(key, known) or "; peer-train --help lists all keys"
        return [f"{shown(key)}: no such key{hint}"]
    if override:
        if isinstance(error, OverrideParseException):
            text = (
                f"not readable; quote what is no plain word or number, {key}='\"a=b\"' in a shell"
            )
        else:
            text = first_line(error.__cause__ or error)
    else:
        texts = dict.fromkeys([str(error), str(error.__cause__ or error)])
        text = shown(
            "; ".join(line.strip() for t in texts for line in t.splitlines() if line.strip())
        )
    return [f"{shown(override)}: {text}" if override else text]


def _studies() -> list[str]:
    folders = (config_folder("sweeps"), config_folder("conf"))
    return sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))


def _flat_keys(node: object, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys below a plain configuration."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _flat_keys(value, f"{prefix}{key}.")


def _single_values(override: str) -> list[str]:
    """`a=1,2` as `a=1` and `a=2`; anything else as it is."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError):
        return [override]
    if not parsed.is_discrete_sweep():
        return [override]
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]
