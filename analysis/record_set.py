"""The records behind a study: their files, one hash of all of them, and what only they say."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.csv_runs import read_table
from analysis.load import usable
from analysis.schema import AnalysisError
from peer_scaling.record import PLAN, RecordError, RunRecord, find_records, read_record


@dataclass(frozen=True, eq=False)
class RecordSet:
    """What stands behind a frame of runs, as far as the source has it."""

    used: tuple[RunRecord, ...]
    """Of the runs that are used, by path; empty for a source without records."""
    folders: Mapping[str, str]
    """By run id: the folders of its records, below the source."""
    num_planned: int | None
    """Cells of the study's plan; None without one."""
    sha256: str
    hashed: str
    """What it is the hash of."""


def read_record_set(source: str, frame: pd.DataFrame) -> RecordSet:
    """Of a source that `load_runs` made the frame of.

    A folder's hash is that of the lines that `sha256sum` prints for its records, paths below the
    folder and in byte order; a CSV file's is its own; W&B's is that of the frame as CSV.
    """
    path = Path(source)
    if path.is_dir() and (paths := list(find_records(path))):
        return _of_folder(path, paths, frame)
    if path.is_file():
        return RecordSet((), {}, None, _sha256(path.read_bytes()), "the CSV file")
    table = frame.to_csv(index=False).encode()
    return RecordSet((), {}, None, _sha256(table), "the runs as `peer-analyze load --csv` has them")


def _of_folder(root: Path, paths: list[Path], frame: pd.DataFrame) -> RecordSet:
    names = {path: path.relative_to(root).as_posix() for path in paths}
    lines = sorted((names[path], _sha256(_content(path))) for path in paths)
    listing = "".join(f"{digest}  {name}\n" for name, digest in lines)
    rows = usable(frame)
    wanted = set(zip(rows["study"], rows["run_id"], strict=True))
    used, folders = [], {}
    for path in paths:
        try:
            record = read_record(path)
        except RecordError:
            folders.setdefault(path.parent.name, []).append(names[path])
            continue
        folders.setdefault(record.run_id, []).append(names[path])
        if (record.study, record.run_id) in wanted:
            used.append(record)
    hashed = f"the lines of `sha256sum` for {len(paths)} records, by path below the folder"
    return RecordSet(
        used=tuple(used),
        folders={run: ", ".join(_folder(name) for name in own) for run, own in folders.items()},
        num_planned=_num_planned(root, {str(study) for study in rows["study"]}),
        sha256=_sha256(listing.encode()),
        hashed=hashed,
    )


def _folder(name: str) -> str:
    return name.rpartition("/")[0] or "."


def _content(path: Path) -> bytes:
    """Nothing of a link, which is no record."""
    return path.read_bytes() if path.is_file() and not path.is_symlink() else b""


def _num_planned(root: Path, studies: set[str]) -> int | None:
    """Of the plans in folders of these studies; of all, if the study's folder has another name."""
    plans = [path for path in sorted(root.rglob(PLAN)) if not path.is_symlink()]
    plans = [path for path in plans if path.parent.name in studies] or plans
    try:
        return sum(len(read_table(path)[1]) for path in plans) if plans else None
    except AnalysisError:
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def inside(values: Mapping[str, Any], *keys: str) -> Any:
    """A value of a record's settings by its path; None where it is not."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
