"""What was handed to a cluster: one immutable JSON file per job array, in the study's folder.

Whoever submits writes a new file, and nobody changes one: many may submit from many machines.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_scaling.errors import UserError, first_line
from peer_scaling.paths import NAME, inside, is_plain_name
from peer_scaling.slurm import JOB_ID

FOLDER = "slurm"
LOGS = ".submitit"
"""Submitit's own folder in the study's, a folder per array: scripts, logs, what jobs are sent."""
SCHEMA = 1


@dataclass(frozen=True)
class Submission:
    """A job array."""

    job_id: str
    job_name: str
    config_name: str
    """Of the study."""
    config_dir: str | None
    """Where it was found, if not among the studies that come with the package."""
    arguments: tuple[str, ...]
    """Overrides of the study, as `peer-sweep submit` was given them."""
    run_ids: tuple[str, ...]
    """By index in the array."""
    logs: str
    """Name of the array's folder in `LOGS`."""
    submitted_at: str


def write_submission(study: Path, submission: Submission) -> Path:
    """Add a file to the study's folder, complete or not at all; none is ever replaced.

    Raises:
        OSError: it could not be written.
    """
    folder = study / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": SCHEMA, **asdict(submission)}, indent=1)
    temporary = folder / f".{submission.logs}"
    temporary.write_text(text + "\n", encoding="utf-8")
    try:
        path = folder / f"{submission.job_id}.json"
        with suppress(FileExistsError):
            os.link(temporary, path)
            return path
        # An array of another cluster, or of one that counts anew.
        path = folder / f"{submission.job_id}-{submission.logs}.json"
        os.link(temporary, path)
        return path
    finally:
        temporary.unlink()


def read_submissions(study: Path) -> tuple[list[Submission], list[str]]:
    """The submissions of a study, oldest first, and a line for each file that is none."""
    found: list[Submission] = []
    problems: list[str] = []
    try:
        folder = inside(study, FOLDER)
        names = sorted(path.name for path in folder.glob("*.json"))
    except (UserError, OSError) as error:
        return [], [first_line(error)]
    for name in names:
        try:
            path = inside(folder, name)
            found.append(_submission(json.loads(path.read_text(encoding="utf-8"))))
        except (UserError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            problems.append(f"{folder / name}: no submission, left out: {first_line(error)}")
    return sorted(found, key=lambda one: (one.submitted_at, int(one.job_id))), problems


def log_path(study: Path, submission: Submission, job: str) -> Path:
    """What the first process of a task printed to its standard output; errors are in `.err`."""
    return study / LOGS / submission.logs / f"{job}_0_log.out"


def _submission(values: Any) -> Submission:
    if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA:
        raise ValueError(f"not of schema {SCHEMA}")
    for name in ("arguments", "run_ids"):
        values[name] = _texts(values[name], name)
    own = Submission(**values)
    texts = (own.job_id, own.job_name, own.config_name, own.submitted_at, own.config_dir or "")
    _texts(texts, "a value")
    if not JOB_ID.fullmatch(own.job_id):
        raise ValueError("job_id is no number")
    if not NAME.fullmatch(own.job_name):
        raise ValueError("job_name is no name")
    if not all(is_plain_name(name) for name in (*own.run_ids, own.logs)):
        raise ValueError("run_ids, logs: no names of folders")
    return own


def _texts(values: Sequence[Any], name: str) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name}: not text")
    return tuple(values)
