"""Where things are: shipped configs, the cache of tokenised corpora, runs.

What is stored below a folder (runs, plans, corpora) is data and may come from anywhere: `inside`
and `closed_folder` keep reading and writing below that folder.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from peer_scaling.errors import UserError, shown

NAME = re.compile(r"\w[\w .,=+@-]{0,59}")
"""What users may call a study, a variant, a size, a project: no path, nothing that a shell or a
Slurm script reads as more than text, short enough for a folder and for a W&B tag."""
NAME_RULE = "at most 60 letters, digits and ` .,=+@_-`, the first a letter or digit"
PACKAGE = Path(__file__).resolve().parent
TRACKER_FOLDER = "wandb"
"""In a run's folder."""
TRACKED = re.compile(r"(offline-)?run-\d{8}_\d{6}-.+")
"""In `TRACKER_FOLDER`: one start's, by its time; W&B never opens it again."""
MAX_NAME_BYTES = 255
"""Of a file or folder, on every common file system."""


def name_problems(what: str, names: Iterable[str]) -> list[str]:
    """A line for each that users may not call a `what`."""
    return [
        f"{what} {shown(repr(name))} must be a name: {NAME_RULE}"
        for name in dict.fromkeys(names)
        if not NAME.fullmatch(name)
    ]


def config_folder(name: str) -> Path:
    """The folder `conf` or `sweeps`: inside the package in a wheel, beside it in a checkout."""
    inside, beside = PACKAGE / name, PACKAGE.parent / name
    return inside if inside.is_dir() else beside


def cache_folder() -> Path:
    """Tokenised corpora: $PEER_SCALING_CACHE, else $XDG_CACHE_HOME/peer_scaling or ~/.cache."""
    own = os.environ.get("PEER_SCALING_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peer_scaling"


def is_plain_name(name: object) -> bool:
    """Whether `name` names something in a folder, and nothing above it or below a further one."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & set("/\\\0")
        and len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES
    )


def inside(root: Path, *names: str) -> Path:
    """`root/name/...`, each a plain name, none a link that leads out of `root`.

    `root` itself may be any path, a link too. Nothing of it needs to exist.

    Raises:
        UserError: it would lie outside `root`.
    """
    path = root
    for name in names:
        if not is_plain_name(name):
            raise UserError(f"{root}: {shown(repr(name))} is not the name of a file or folder")
        path = path / name
        if _leads_out(path, root):
            raise UserError(f"{path}: a link that leads out of {root}; remove it")
    return path


def closed_folder(root: Path, *names: str) -> Path:
    """`inside(root, *names)`, if no link below it leads out of `root` either: who wrote a file of
    that link's name would write there. Nobody writes to the folder that W&B made for an earlier
    start, which holds a link of W&B's to its log in the user's cache: it is not looked into.

    Raises:
        UserError: one does.
    """
    folder = inside(root, *names)
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent) / name for name in (*folders, *files)):
            if _leads_out(path, root):
                raise UserError(f"{path}: a link that leads out of {root}; remove it")
        if Path(parent).name == TRACKER_FOLDER:
            folders[:] = [name for name in folders if not TRACKED.fullmatch(name)]
    return folder


def _leads_out(path: Path, root: Path) -> bool:
    # realpath, because `Path.resolve` raises for a link to itself.
    return path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(
        os.path.realpath(root)
    )
