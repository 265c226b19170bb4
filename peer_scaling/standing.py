"""Where the runs of a study stand, from its folders alone; right while they run, too."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peer_scaling.claims import Holder, find_holder
from peer_scaling.plan_file import read_plan
from peer_scaling.record import DECISIONS, HISTORY, TERMINAL, RunRecord, find_record

TAIL_BYTES = 4096
"""Of a history: more than its last line."""


@dataclass(frozen=True)
class Standing:
    """A cell of a study's plan, and what its run's folder says of it."""

    run_id: str
    state: str
    """A record's status; `running`: a process has it; `silent`: a process has it that gave no sign
    of life for a lease, and the next one to ask gets it; `interrupted`: begun, and nobody has it;
    `missing`: not begun. A failed run that somebody has by now is `running`."""
    flops: float
    """Training FLOPs that the plan gives it; 0 if it is refused."""
    record: RunRecord | None = None
    holder: Holder | None = None
    """Of a run that somebody has."""

    @property
    def is_final(self) -> bool:
        """Whether no launch would change it."""
        return self.state in TERMINAL


def standings(folder: Path) -> tuple[list[Standing], list[str]]:
    """Every cell of the plan in a study's folder, and a line for each line of it that is none."""
    rows, problems = read_plan(folder)
    return [_standing(folder, row) for row in rows], problems


def is_choosing(folder: Path) -> bool:
    """Whether the study chooses its sizes and has not said that it is done with that."""
    for line in reversed(list(_last_lines(folder / DECISIONS))):
        with suppress(ValueError, TypeError, KeyError):
            return json.loads(line)["seed"] is not None
    return False


def steps_of(standing: Standing, folder: Path) -> tuple[int, int] | None:
    """Steps that a run has made, and that it is to make, from the last line of its history."""
    for line in reversed(list(_last_lines(folder / standing.run_id / HISTORY))):
        with suppress(ValueError, TypeError, KeyError, OverflowError):
            values = json.loads(line)
            step, flops = int(values["step"]), float(values["flops"])
            if step > 0 and flops > 0:
                return step, round(step * standing.flops / flops)
    return None


def _standing(folder: Path, row: Mapping[str, str]) -> Standing:
    run_id, flops, own = row["run_id"], float(row["flops"] or 0), folder / row["run_id"]
    record = find_record(own)
    if record and record.is_final:
        return Standing(run_id, record.status, flops, record)
    # In the opposite order of a run's: it claims, begins, publishes its record, and leaves.
    begun = _has_any(own, (HISTORY, "checkpoints"))
    holder = find_holder(own)
    if holder and holder.is_held:
        state = "silent" if holder.is_silent else "running"
        return Standing(run_id, state, flops, record, holder)
    record = find_record(own)  # again: it may have ended since
    if record:
        return Standing(run_id, record.status, flops, record)
    return Standing(run_id, "interrupted" if begun or holder else "missing", flops)


def _has_any(folder: Path, names: Collection[str]) -> bool:
    return any((folder / name).exists() for name in names)


def _last_lines(path: Path) -> Iterator[bytes]:
    """Complete lines at the end of a file; none if it is no regular one."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_file():
            return
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            yield from file.read(TAIL_BYTES).split(b"\n")[:-1]
