"""Checkpoints of a run: folders of safetensors and JSON, complete and verified or not there.

    checkpoints/step-00001200/
        model.safetensors, moments.safetensors, squares.safetensors, course.safetensors
        state.json        everything that is no tensor
        history.jsonl     the run's history up to this step
        manifest.json     size and sha256 of each file, and of itself

A folder is written as `step-N.tmp`, every file synced, then renamed; the one before is deleted only
after the new one has been read back. A folder that does not verify is set aside, never used, and
never in the way of the one before it. JSON and safetensors, never pickle.

`Snapshot` is what a checkpoint holds; snapshot.py makes one from a run and puts it back.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from safetensors.torch import load, save
from torch import Tensor

from peer_scaling.durable import publish, sync_folder, write_synced
from peer_scaling.errors import check
from peer_scaling.faultpoints import fault_point
from peer_scaling.record import HISTORY

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
FORWARD_SEQUENCES = "forward_sequences"
"""In a snapshot's `state`: what the run was trained with; `micro_batch=auto` takes it again."""
FORMAT = 1
"""Raised when older code cannot read what newer code writes."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved. No part of its identity: a result does not depend on it."""

    every_seconds: float | None = 600.0
    """Save when so long has passed; None: never by time. A run shorter than that is saved only if a
    signal stops it."""
    every_tokens: int | None = None
    """Save after each so many training tokens, in whole steps; None: never by tokens. With both
    None nothing is saved, whatever happens."""
    keep: int = 2
    """Checkpoints that are kept."""
    max_share: float = 0.02
    """Largest share of a run's time that saving by time may take: where a save is slow,
    `every_seconds` stretches."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be positive, or null for never"
            for name in ("every_seconds", "every_tokens")
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        if self.keep < 2:
            problems.append(f"keep={self.keep} must be at least 2: one of them may be damaged")
        if not 0 < self.max_share <= 1:
            problems.append(f"max_share={self.max_share} must be in (0, 1]")
        check(problems)

    @property
    def enabled(self) -> bool:
        """Whether anything is ever saved."""
        return self.every_seconds is not None or self.every_tokens is not None


class CheckpointError(Exception):
    """A folder that is no checkpoint of this run, or no longer whole, with the reason."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a step."""

    step: int
    identity: str
    """Of the run (`PlannedRun.identity`): a checkpoint of another one is refused."""
    digest: str
    """sha256 of parameters, buffers and optimiser state (`state_digest`)."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File name without suffix -> its tensors."""
    state: Mapping[str, Any]
    """JSON values."""
    history: str
    """Lines of the run's history."""


@final
class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_folder: Path, keep: int) -> None:
        """`keep` are kept when a new one is there; 2 at least, so that one may go bad."""
        self.folder = run_folder / FOLDER
        self._keep = keep

    def save(self, snapshot: Snapshot) -> None:
        """Make the snapshot durable, then delete what is no longer needed.

        Raises:
            OSError: it is not durable; the earlier ones are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self._folder_of(snapshot.step)
        temporary = final.with_suffix(".tmp")
        self._remove_leftovers()
        try:
            temporary.mkdir()
            _write_files(snapshot, temporary)
            if final.exists():  # of an earlier attempt, whose state was the same if it is whole
                self._set_aside(final)
            publish(temporary, final, "checkpoint")
            for _ in verified_files(final):
                pass
        except CheckpointError as error:  # the disk gave back something else than was written
            self._set_aside(final)
            raise OSError(f"written, but read back as {error}") from error
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._retire()

    def newest(self, identity: str) -> Snapshot | None:
        """The newest checkpoint that verifies; None if there is none.

        One that does not verify is renamed to `bad-...`, with a line on the screen.
        """
        for folder in self._folders():
            try:
                snapshot = read_checkpoint(folder)
                if snapshot.identity != identity:
                    raise CheckpointError(f"of another run ({snapshot.identity[:8]})")
                return snapshot
            except CheckpointError as error:
                self._reject(folder, str(error))
        return None

    def reject(self, step: int, reason: str) -> None:
        """Set the checkpoint of a step aside, with a line on the screen."""
        self._reject(self._folder_of(step), reason)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, newest first, verified or not."""
        return [int(folder.name.removeprefix("step-")) for folder in self._folders()]

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _reject(self, folder: Path, reason: str) -> None:
        self._set_aside(folder)
        print(f"{folder}: {reason}; set aside, the one before is used", flush=True)

    def _folders(self) -> list[Path]:
        """Complete ones, newest first."""
        if not self.folder.is_dir():
            return []
        found = self.folder.glob("step-" + "[0-9]" * 8)
        return sorted((f for f in found if not f.is_symlink()), reverse=True)

    def _retire(self) -> None:
        for folder in self._folders()[self._keep :]:
            # Renamed first: a folder that is half deleted must not look like a checkpoint.
            doomed = folder.with_suffix(".old")
            try:
                fault_point("checkpoint.retire")
                folder.replace(doomed)
            except OSError as error:  # the new checkpoint is durable all the same
                print(f"{folder}: not deleted ({error.strerror})", flush=True)
            shutil.rmtree(doomed, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for pattern in ("step-*.tmp", "step-*.old"):
            for folder in self.folder.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    def _set_aside(self, folder: Path) -> None:
        number = 1
        while (aside := folder.with_name(f"bad-{folder.name}-{number}")).exists():
            number += 1
        try:
            folder.replace(aside)
        except OSError:  # a read-only disk: it is not used all the same
            return


def remove_checkpoints(run_folder: Path) -> None:
    """Delete all checkpoints of a run that has its record, bad ones too."""
    folder = run_folder / FOLDER
    try:
        if folder.exists():
            fault_point("checkpoint.clear")
            shutil.rmtree(folder)
    except OSError as error:  # the record stands all the same
        print(f"{folder}: not deleted ({error.strerror})", flush=True)


def read_checkpoint(folder: Path) -> Snapshot:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: a file is missing, has changed, or is not what it should be.
    """
    files = verify(folder)
    try:
        state = json.loads(files.pop(STATE))
        history = files.pop(HISTORY).decode()
        if state["format"] > FORMAT:
            raise CheckpointError(f"format {state['format']} is newer than {FORMAT}; update")
        tensors = {name.removesuffix(".safetensors"): load(data) for name, data in files.items()}
        return Snapshot(
            step=state["step"],
            identity=state["identity"],
            digest=state["digest"],
            tensors=tensors,
            state=state["state"],
            history=history,
        )
    except CheckpointError:
        raise
    except Exception as error:  # whole, but made by something else; safetensors has its own types
        raise CheckpointError(f"not a checkpoint ({type(error).__name__}: {error})") from error


def verify(folder: Path) -> dict[str, bytes]:
    """The contents of all files; see `verified_files` for what it raises."""
    return dict(verified_files(folder))


def verified_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file, one at a time, with the size and sha256 of the manifest.

    Raises:
        CheckpointError: with the first file that differs.
    """
    for name, entry in _read_manifest(folder).items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror})") from error
        if entry != _entry(content):
            raise CheckpointError(f"{name} is damaged (size or sha256 differ)")
        yield name, content


def _write_files(snapshot: Snapshot, folder: Path) -> None:
    entries = {}
    for name, data in _serialised(snapshot):
        write_synced(folder / name, data, "checkpoint")
        entries[name] = _entry(data)
    write_synced(folder / MANIFEST, _manifest(entries), "checkpoint.manifest")
    fault_point("checkpoint.folder")
    sync_folder(folder)


def _serialised(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file, one at a time: only one stands in memory a second time."""
    for name, tensors in snapshot.tensors.items():
        yield f"{name}.safetensors", save({k: t.contiguous() for k, t in tensors.items()})
    yield HISTORY, snapshot.history.encode()
    facts = {
        "format": FORMAT,
        "step": snapshot.step,
        "identity": snapshot.identity,
        "digest": snapshot.digest,
        "state": snapshot.state,
    }
    yield STATE, json.dumps(facts, allow_nan=False).encode()


def _entry(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest(entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Canonical, and with its own checksum: any changed byte makes it another text."""
    body = json.dumps(entries, sort_keys=True)
    own = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({"files": entries, "sha256": own}, sort_keys=True, indent=1).encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        data = (folder / MANIFEST).read_bytes()
        entries = json.loads(data)["files"]
        whole = _manifest(entries) == data and not any("/" in name for name in entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    if not whole or STATE not in entries or HISTORY not in entries:
        raise CheckpointError(f"{MANIFEST} is damaged")
    return entries
