"""What a study that is finished leaves in the user's cache, so that the same command need not work
out again that there is nothing to do: importing PyTorch and composing the study takes seconds.

A stamp is for one command in one folder. It holds a digest of what the cells of the study followed
from, how the prepared corpora looked, and the sha256 of the plan and of every record. All of it is
compared before it is believed; whatever is changed, missing or in doubt means the ordinary way, and
is never an error. Records stay the only truth.

Nothing here imports PyTorch, NumPy or Hydra.
"""

import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from peer_scaling.documents import source_identity
from peer_scaling.durable import temporary_of
from peer_scaling.faultpoints import VARIABLE
from peer_scaling.paths import PACKAGE, cache_folder, closed_folder, config_folder, inside

FORMAT = 1
"""Raised when stamps say something else."""
STAMPS = "finished"
"""Folder in the cache."""
NAME_FLAGS = ("--config-name", "-cn")
FOLDER_FLAGS = ("--config-dir", "-cd")
"""The only flags of commands that have a stamp."""
PATHS = ("runs_dir=", "data.path=")
"""Arguments that may lead upwards: they name no configuration."""
KEYED = ("PEER_SCALING_", "HYDRA_", "PYTHON", "LC_", "LANG", "HOME", "XDG_CACHE_HOME", "CUDA_")
"""Starts of the names of environment variables that a launch may follow from."""
REFUSED = (VARIABLE, "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR")
"""With one of these, a launch goes the ordinary way."""
MAX_ENTRIES = 10_000
"""Files and folders below the folders of configurations; more are not looked through."""


class DoubtError(Exception):
    """The outcome of a command may depend on something that no stamp knows of."""


@dataclass(frozen=True)
class Command:
    """A start of `peer-train`, with the places that its outcome depends on."""

    arguments: tuple[str, ...]
    folder: Path
    """The current one."""
    environment: Mapping[str, str]
    """The variables that it may follow from, and no other: launchers write down what they send."""
    search: tuple[str, ...]
    """Where Python looks for packages."""
    package: Path
    configs: tuple[Path, ...]
    """Folders of configurations that are always searched."""
    cache: Path

    @staticmethod
    def of_process() -> "Command":
        """The one that this process was started with."""
        return Command(
            arguments=tuple(sys.argv[1:]),
            folder=Path.cwd(),
            environment={
                name: value
                for name, value in os.environ.items()
                if name in REFUSED or name.startswith(KEYED)
            },
            search=tuple(sys.path),
            package=PACKAGE,
            configs=(config_folder("conf"), config_folder("sweeps")),
            cache=cache_folder(),
        )

    @property
    def stamp(self) -> Path:
        """Where its stamp is."""
        digest = _digest([str(self.folder), self.arguments])
        return self.cache / STAMPS / f"{digest[:32]}.json"

    def facts(self) -> str:
        """sha256 of all that the cells of a study and their identities follow from but corpora.

        Raises:
            DoubtError: it may be more than this looks at.
            OSError: a file cannot be read.
        """
        if any(name in self.environment for name in REFUSED):
            raise DoubtError
        code = _files(self.package, ".py")
        if not code:
            raise DoubtError  # in an archive
        folders = [*self.configs, *self._own_folders()]
        return _digest(
            [
                [FORMAT, sys.version, sys.platform, str(self.folder), self.arguments],
                sorted(self.environment.items()),
                [[str(file), _sha256(file)] for file in code],
                [[str(file), _config(file)] for f in folders for file in _files(f, ".yaml")],
                [[place, *_installed(Path(place))] for place in self.search],
                sorted(glob.glob("/dev/nvidia*")),
            ]
        )

    def _own_folders(self) -> Iterator[Path]:
        """The folders of configurations that the arguments name."""
        if any("../" in a and not a.startswith(PATHS) for a in self.arguments):
            raise DoubtError  # Hydra would follow it out of its folders
        arguments = iter(self.arguments)
        for argument in arguments:
            if not argument.startswith("-"):
                continue
            flag, given, value = argument.partition("=")
            if flag not in NAME_FLAGS + FOLDER_FLAGS:
                raise DoubtError
            value = value if given else next(arguments, "")
            if flag in FOLDER_FLAGS:
                yield self.folder / value


@dataclass(frozen=True)
class Stamp:
    """A finished study as one of its launches left it."""

    facts: str
    """Of the command."""
    text: str
    """What a launch prints that finds nothing to do."""
    runs_dir: str
    study: str
    results: Mapping[str, str]
    """sha256 by path in the study's folder: of the plan, and of every cell's record."""
    sources: Mapping[str, Mapping[str, str]]
    """Identity by path of the text that corpora were made from (`documents.source_identity`)."""
    states: Mapping[str, list[int] | None]
    """`state_of` by path: of prepared corpora and tokenizers."""

    def holds(self) -> bool:
        """Whether results and corpora are as they were.

        Raises:
            OSError, UserError, ValueError: one is missing, no file of its own, or leads elsewhere.
        """
        folder = closed_folder(Path(self.runs_dir), self.study)
        return (
            all(result_digest(folder, name) == seen for name, seen in self.results.items())
            and all(source_identity("local", path) == seen for path, seen in self.sources.items())
            and all(state_of(Path(path)) == seen for path, seen in self.states.items())
        )


@dataclass(frozen=True)
class Launch:
    """A command that has started, and what was there then."""

    command: Command
    facts: str

    @staticmethod
    def begin() -> "Launch | None":
        """The launch of this process; None if it goes the ordinary way and leaves no stamp."""
        try:
            command = Command.of_process()
            return Launch(command, command.facts())
        except Exception:  # stamps save time, and nothing that is wrong with one may cost a launch
            return None

    def finished_text(self) -> str | None:
        """What the launch has to print if it is known that there is nothing to do."""
        try:
            values = json.loads(self.command.stamp.read_text(encoding="utf-8"))
            stamp = Stamp(**values)
            known = stamp.facts == self.facts and _is_plain(stamp.text) and stamp.holds()
        except Exception:  # as above
            return None
        return stamp.text if known else None

    def leave(self, stamp: Stamp) -> None:
        """Write a stamp, if what the launch began with is there still.

        Raises:
            DoubtError, OSError: there is none, then.
        """
        if self.command.facts() != self.facts:
            raise DoubtError
        path = self.command.stamp
        temporary = temporary_of(path)  # the same command may run twice at a time
        try:
            temporary.write_text(json.dumps(asdict(stamp)), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def result_digest(folder: Path, name: str) -> str:
    """sha256 of the plan or a record, by its path in the study's folder.

    Raises:
        OSError, UserError, ValueError: it is missing, no regular file, or leads elsewhere.
    """
    parts = name.split("/")
    links = [inside(folder, *parts[:n]).is_symlink() for n in range(1, len(parts) + 1)]
    path = folder.joinpath(*parts)
    if any(links) or not path.is_file():
        raise ValueError(name)
    return _sha256(path)


def state_of(path: Path) -> list[int] | None:
    """What changes with a file's content, or with the names in a folder; None if there is none."""
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return None
    return [facts.st_mode, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def _files(root: Path, suffix: str) -> list[Path]:
    """Files below a folder, through links as Hydra looks for them."""
    found: list[Path] = []
    seen = 0
    for parent, folders, files in os.walk(root, followlinks=True):
        seen += len(folders) + len(files)
        if seen > MAX_ENTRIES:
            raise DoubtError
        found += [Path(parent) / name for name in files if name.endswith(suffix)]
    return sorted(found)


def _config(file: Path) -> str:
    """sha256 of a configuration that names no other one outside its folder."""
    if not file.is_file() or b"../" in file.read_bytes():
        raise DoubtError
    return _sha256(file)


def _installed(place: Path) -> list[list[object]]:
    """The packages in a folder that Python searches, with versions and times of installation, and
    the files of Hydra's plugins.
    """
    if not place.is_dir():
        return []
    names = [n for n in os.listdir(place) if n.endswith((".dist-info", ".egg-info", ".egg-link"))]
    paths = [*(place / name for name in names), *_files(place / "hydra_plugins", ".py")]
    return [[str(path), path.stat().st_mtime_ns] for path in sorted(paths)]


def _is_plain(text: str) -> bool:
    return all(line.isprintable() for line in text.splitlines())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
