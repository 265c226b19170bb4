"""Files that are complete or absent, whatever happens while they are written.

A new file is written under a temporary name, synced to the disk and renamed; then the folder is
synced, without which the name may be lost with the power. Every step is a fault point.
"""

import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from peer_scaling.faultpoints import fault_point

TEMPORARY = re.compile(r"\..+\.tmp-[0-9a-f]{16}")


def temporary_of(path: Path) -> Path:
    """A name beside `path` that no other process has."""
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}")


def remove_temporaries(folder: Path) -> None:
    """Delete what processes that were killed left behind; for whoever owns the folder: a process
    that still writes there then fails to publish.
    """
    for name in os.listdir(folder):
        if TEMPORARY.fullmatch(name):
            with suppress(OSError):
                (folder / name).unlink()


def replace_text(path: Path, text: str) -> None:
    """Make `path` hold `text`, all of it at once, for what can be made again: not synced."""
    temporary = temporary_of(path)  # another process may write it just now
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_atomically(path: Path, text: str, label: str) -> None:
    """Make `path` hold `text`: a reader sees the old content or all of the new one.

    Args:
        path: in a folder that exists.
        text: written as UTF-8.
        label: of the fault points `<label>.write`, `.sync`, `.rename`, `.publish`.

    Raises:
        OSError: it could not be written; the old content stands.
    """
    temporary = temporary_of(path)
    try:
        write_synced(temporary, text.encode(), label)
        publish(temporary, path, label)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_synced(path: Path, data: bytes, label: str) -> None:
    """Write a new file and wait until the disk has it."""
    with path.open("wb") as file:
        half = len(data) // 2
        file.write(data[:half])
        fault_point(f"{label}.write")
        file.write(data[half:])
        file.flush()
        fault_point(f"{label}.sync")
        os.fsync(file.fileno())


def write_once(path: Path, text: str, label: str, last_look: Callable[[], object] = bool) -> None:
    """Make a file that is never written again, complete or not at all; see `write_atomically`.

    `last_look` is called when all is written under a temporary name. Whoever takes the folder over
    deletes that (`remove_temporaries`), so that nothing is published after it.

    Raises:
        FileExistsError: there is one; it stands.
        OSError: it could not be written.
    """
    temporary = temporary_of(path)
    try:
        write_synced(temporary, text.encode(), label)
        last_look()
        fault_point(f"{label}.rename")
        os.link(temporary, path)  # unlike a rename, one of several writers succeeds, on NFS too
        fault_point(f"{label}.publish")
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def publish(temporary: Path, final: Path, label: str) -> None:
    """Give a complete file or folder its name, and wait until the disk has the name."""
    fault_point(f"{label}.rename")
    temporary.replace(final)
    fault_point(f"{label}.publish")
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
