"""Files that are complete or absent, whatever happens while they are written.

A new file is written under a temporary name, synced to the disk and renamed; then the folder is
synced, without which the name may be lost with the power. Every step is a fault point.
"""

import os
from pathlib import Path

from peer_scaling.faultpoints import fault_point


def write_atomically(path: Path, text: str, label: str) -> None:
    """Make `path` hold `text`: a reader sees the old content or all of the new one.

    Args:
        path: in a folder that exists.
        text: written as UTF-8.
        label: of the fault points `<label>.write`, `.sync`, `.rename`, `.publish`.

    Raises:
        OSError: it could not be written; the old content stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
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
