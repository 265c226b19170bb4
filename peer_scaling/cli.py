"""The command line around Hydra: our configs on its search path, one line per user error."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peer_scaling.config import suggestion
from peer_scaling.errors import EXIT_REQUEUE, EXIT_USAGE, UserError
from peer_scaling.paths import config_folder

DEFAULT_CONFIG = "train"
PLUGIN_MODULE = "hydra_plugins.peer_scaling"


class StudiesOnSearchPath(SearchPathPlugin):
    """Lets `--config-name <study>` find the studies in `sweeps/`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder of studies."""
        search_path.append("peer-scaling", f"file://{config_folder('sweeps')}")


class CommandTask:
    """A task for Hydra that reports user errors in one line each and remembers the exit code.

    An object and not a closure, so that launchers can send it to other processes.
    """

    def __init__(self, task: Callable[[DictConfig], int]) -> None:
        self._task = task
        self.exit_code = 0

    def __call__(self, config: DictConfig) -> int:
        """Run the task; the exit code of this configuration."""
        try:
            code = self._task(config)
        except UserError as error:
            _print_problems(error)
            code = error.exit_code
        self.exit_code = max(self.exit_code, code)
        return code


def run_command(task: Callable[[DictConfig], int], *plugins: type) -> None:
    """Run `task` through Hydra with this process's arguments, and exit with its code.

    Args:
        task: returns an exit code; may raise UserError.
        plugins: sweepers and launchers, in configs `hydra_plugins.peer_scaling.<Class>`.

    A traceback is shown for what is no user error, and for everything if HYDRA_FULL_ERROR is set.
    """
    wants_tracebacks = bool(os.environ.get("HYDRA_FULL_ERROR"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise, where it would print and exit with 1
    register_plugins(StudiesOnSearchPath, *plugins)
    command = CommandTask(task)
    entry = hydra.main(
        version_base="1.3", config_path=str(config_folder("conf")), config_name=DEFAULT_CONFIG
    )(command)
    try:
        entry()
    except UserError as error:
        _print_problems(error)
        sys.exit(error.exit_code)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if wants_tracebacks or not _is_of_hydra(error):
            raise
        for line in explain(error, sys.argv[1:]):
            print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt as error:
        what = str(error) or "interrupted"
        _print_error(f"{what}; the same command continues with what is missing")
        sys.exit(EXIT_REQUEUE)
    sys.exit(command.exit_code)


def _is_of_hydra(error: Exception) -> bool:
    """Whether Hydra raised it: for some things that it does not accept, it has no type."""
    frames = traceback.extract_tb(error.__traceback__)
    folder = str(Path(hydra.__file__).parent)
    return isinstance(error, HydraException | OmegaConfBaseException) or (
        frames[-1].filename.startswith(folder)
    )


def register_plugins(*plugins: type) -> None:
    """Make plugin classes known to Hydra in this process.

    Hydra only instantiates plugins whose name starts with `hydra_plugins.`, a top-level package
    that ours need not occupy: the classes stay importable (and picklable) under their real names.
    """
    known = Plugins.instance()
    for plugin in plugins:
        known.register(plugin)
        known.class_name_to_class[f"{PLUGIN_MODULE}.{plugin.__name__}"] = plugin


def explain(error: Exception, arguments: list[str]) -> list[str]:
    """One line per thing that Hydra did not accept among the command's arguments.

    Hydra stops at the first; to find all, each override is tried alone, on the choices of groups
    that are good.
    """
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        config_name = _config_name(arguments)
        base = _try_compose(config_name, [])
        if not isinstance(base, DictConfig):
            return [_explain_one(base, None, [])]
        given = [a for a in arguments if "=" in a and not a.startswith("-")]
        overrides = [single for override in given for single in _single_values(override)]
        groups = _group_choices(config_name, base, overrides)
        chosen = _try_compose(config_name, groups)
        base = chosen if isinstance(chosen, DictConfig) else base
        known = list(_flat_keys(OmegaConf.to_container(base, resolve=False)))
        tried = [
            (o, _try_compose(config_name, [o] if o in groups else [*groups, o])) for o in overrides
        ]
        lines = [_explain_one(e, o, known) for o, e in tried if not isinstance(e, DictConfig)]
    return lines or [_explain_one(error, None, known)]


def _group_choices(config_name: str, base: DictConfig, overrides: list[str]) -> list[str]:
    """The overrides that choose a good option of a group, one for each group."""
    choices = {}
    for override in overrides:
        group = override.split("=")[0]
        is_group = isinstance(base.get(group), DictConfig)
        if is_group and isinstance(_try_compose(config_name, [override]), DictConfig):
            choices[group] = override
    return list(choices.values())


def _try_compose(config_name: str, overrides: list[str]) -> DictConfig | Exception:
    try:
        return hydra.compose(config_name, overrides)
    except Exception as error:  # whatever it is, it is what the user is to be told
        return error


def _config_name(arguments: list[str]) -> str:
    for flag, value in pairwise(arguments):
        if flag in ("--config-name", "-cn"):
            return value
    joined = [a.split("=", 1)[1] for a in arguments if a.startswith("--config-name=")]
    return joined[0] if joined else DEFAULT_CONFIG


def _explain_one(error: Exception, override: str | None, known: list[str]) -> str:
    key = override.split("=")[0].lstrip("+~") if override else ""
    if isinstance(error, MissingConfigException):
        missing = (error.missing_cfg_file or "").split("/")
        options = ", ".join(error.options or _studies())
        what = override or f"--config-name {missing[-1]}"
        return f"{what}: unknown; choose one of {options}"
    if override and key not in known and not key.startswith("hydra"):
        return f"{key}: no such key{suggestion(key, known) or '; peer-train --help lists all keys'}"
    lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if not override and error.__cause__:
        text = f"{str(error).splitlines()[0]} ({text})"
    return f"{override}: {text}" if override else text


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
    except HydraException:
        return [override]
    if not parsed.is_discrete_sweep():
        return [override]
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]


def _print_problems(error: UserError) -> None:
    for problem in error.problems:
        _print_error(f"error: {problem}")


def _print_error(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's others would say the same
        print(line, file=sys.stderr)
