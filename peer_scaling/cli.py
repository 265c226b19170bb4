"""The command line around Hydra: our configs on its search path, one line per user error."""

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from peer_scaling.errors import (
    EXIT_FAILED,
    EXIT_REQUEUE,
    EXIT_USAGE,
    StudyIncompleteError,
    UserError,
    traceback_text,
    without_secrets,
)
from peer_scaling.explain import explain
from peer_scaling.guard import GuardedLoader, check_arguments, guarded
from peer_scaling.paths import config_folder
from peer_scaling.stamp import Launch

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

    def __init__(self, task: Callable[[DictConfig], int], launch: Launch | None = None) -> None:
        self._task, self.launch = task, launch
        self.exit_code = 0

    def __call__(self, config: DictConfig) -> int:
        """Run the task; the exit code of this configuration."""
        try:
            code = self._task(config)
        except UserError as error:
            print_problems(error.problems)
            code = error.exit_code
        self.exit_code = max(self.exit_code, code)
        return code


def run_command(
    task: Callable[[DictConfig], int], *plugins: type, launch: Launch | None = None
) -> NoReturn:
    """Run `task` through Hydra with this process's arguments, and exit with its code.

    Args:
        task: returns an exit code; may raise UserError.
        plugins: sweepers and launchers, in configs `hydra_plugins.peer_scaling.<Class>`.
        launch: of this process, if its study is to leave a stamp when it is finished.

    A traceback is shown for what is no user error, and for everything if HYDRA_FULL_ERROR is set;
    in either case without secrets.
    """
    wants_tracebacks = bool(os.environ.get("HYDRA_FULL_ERROR"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise, where it would print and exit with 1
    register_plugins(StudiesOnSearchPath, *plugins)
    command = CommandTask(task, launch)
    entry = hydra.main(
        version_base="1.3", config_path=str(config_folder("conf")), config_name=DEFAULT_CONFIG
    )(command)
    try:
        with guarded():
            _check_flags(sys.argv[1:])
            entry()
    except UserError as error:
        if isinstance(error, StudyIncompleteError) and error.details:
            _print_error(without_secrets(error.details))
        print_problems(error.problems)
        sys.exit(error.exit_code)
    except Exception as error:  # Hydra has no type for some of what it does not accept
        if wants_tracebacks or not _is_of_hydra(error):
            _exit_with_traceback(error)
        print_problems(_explained(error))
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt as error:
        what = str(error) or "interrupted"
        _print_error(f"{what}; the same command continues with what is missing")
        sys.exit(EXIT_REQUEUE)
    sys.exit(command.exit_code)


def _check_flags(arguments: list[str]) -> None:
    check_arguments(arguments)
    flags = get_args_parser().parse_args(arguments)
    if flags.experimental_rerun:
        raise UserError("--experimental-rerun: refused, the file it reads may hold code")
    if flags.config_dir and not Path(flags.config_dir).is_dir():
        raise UserError(f"--config-dir {flags.config_dir}: no such folder")


def _explained(error: Exception) -> list[str]:
    """What was wrong with this process's arguments."""
    flags = get_args_parser().parse_args()
    setup_globals()
    path = create_config_search_path(flags.config_path or str(config_folder("conf")))
    if flags.config_dir:
        path.prepend("command-line", f"file://{Path(flags.config_dir).resolve()}")
    loader = GuardedLoader(path)
    return explain(error, loader, flags.config_name or DEFAULT_CONFIG, flags.overrides)


def _exit_with_traceback(error: Exception) -> NoReturn:
    print(traceback_text(error), end="", file=sys.stderr)
    sys.exit(EXIT_FAILED)


def _is_of_hydra(error: Exception) -> bool:
    """Whether Hydra raised it."""
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


def print_problems(problems: Iterable[str]) -> None:
    """A line of standard error for each, without secrets."""
    for problem in problems:
        _print_error(f"error: {without_secrets(problem)}")


def _print_error(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's others would say the same
        print(line, file=sys.stderr)
