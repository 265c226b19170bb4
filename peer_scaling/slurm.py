"""What Slurm says of the tasks of job arrays, and asking it to end some: its own commands, as lists
of arguments, each with a time limit.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from peer_scaling.errors import UserError, shown

LIMIT_SECONDS = 30.0
"""For one command: Slurm's own ask a controller that does not answer for much longer."""
MAX_ARRAY_SIZE = 1001
"""Slurm's own default, where its configuration cannot be read."""
IDS_PER_COMMAND = 500
SBATCH_TEXT = re.compile(r"[\w.,:=@+%&|*()\[\]-]{1,200}", re.ASCII)
"""Names, lists and features as Slurm has them; nothing that ends an option or begins another."""
SBATCH_RULE = "at most 200 letters, digits and `.,:=@+%&|*()[]_-`"
JOB_ID = re.compile(r"[0-9]{1,18}")
TASK = re.compile(r"([0-9]{1,18})(?:_(N/A|\[?([0-9,\-]+)(%[0-9]+)?\]?))?")
"""`12_3`, `12_[0,4-6%2]` for tasks that wait together; `12`, `12_N/A` for a job alone."""
NOT_KNOWN = "Invalid job id"
"""In squeue's error when none of the jobs is in the queue any more."""

TaskId = tuple[str, int]
"""Id of the array and index in it."""


@dataclass(frozen=True)
class TaskState:
    """A task of a job array, as Slurm sees it."""

    job: str
    """Its id for Slurm's commands: `12_3`, or `12` for a job alone."""
    state: str
    """Slurm's word in lower case: pending, running, completed, failed, cancelled, timeout, ..."""
    active: bool = False
    """Whether it is in the queue: waiting, running or ending."""
    exit_code: str = ""
    """As sacct shows it, status:signal."""
    node: str = ""
    reason: str = ""
    """Why it waits."""


class SlurmError(Exception):
    """A command of Slurm's that gave no answer, in one line."""


def command_output(*arguments: str) -> str:
    """What a command of Slurm's prints.

    Raises:
        SlurmError: it is not installed, failed, or did not answer in time.
    """
    name = arguments[0]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except FileNotFoundError:
        raise SlurmError(f"{name}: no such command on this machine") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{name}: no answer within {LIMIT_SECONDS:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SlurmError(f"{name}: {shown(lines[-1])}")
    return done.stdout


def task_states(names: Mapping[str, str]) -> tuple[dict[TaskId, TaskState], list[str]]:
    """The state of every task of some arrays, and a line for each command that gave no answer.

    Args:
        names: array id -> name of the job. An array of that id and another name is another job, of
            a cluster that counts anew: it is left out.
    """
    states: dict[TaskId, TaskState] = {}
    problems: list[str] = []
    ids = sorted(names)
    for start in range(0, len(ids), IDS_PER_COMMAND):
        part = ",".join(ids[start : start + IDS_PER_COMMAND])
        for query in (_accounted, _queued):  # what the queue says is newer
            try:
                states |= query(part, names)
            except SlurmError as error:
                problems.append(str(error))
    return states, list(dict.fromkeys(problems))


def cancel(jobs: Sequence[str]) -> None:
    """End tasks for good, waiting or running.

    Args:
        jobs: ids as in `TaskState.job`.

    Raises:
        SlurmError: the last of Slurm's errors; the other tasks were cancelled all the same.
    """
    problem = None
    for start in range(0, len(jobs), IDS_PER_COMMAND):
        ids = jobs[start : start + IDS_PER_COMMAND]
        for own in ids:
            try:
                # A task that is just asking to be started again is then refused.
                command_output("scontrol", "update", f"JobId={own}", "Requeue=0")
            except SlurmError:  # it has ended
                continue
        try:
            command_output("scancel", *ids)
        except SlurmError as error:
            problem = error
    if problem:
        raise problem


def max_array_size() -> int:
    """Tasks that one array may have."""
    try:
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", command_output("scontrol", "show", "config"))
    except SlurmError:
        found = None
    return int(found[1]) if found else MAX_ARRAY_SIZE


def require_job_id(text: str) -> str:
    """The id of a job, if it is one.

    Raises:
        UserError: it is something else.
    """
    if not JOB_ID.fullmatch(text):
        raise UserError(f"{shown(repr(text))} is not the id of a Slurm job")
    return text


def _queued(ids: str, names: Mapping[str, str]) -> dict[TaskId, TaskState]:
    arguments = ("--noheader", "--array", f"--jobs={ids}", "--format=%F_%K|%T|%N|%r|%j")
    try:
        text = command_output("squeue", *arguments)
    except SlurmError as error:
        if NOT_KNOWN in str(error):
            return {}
        raise
    return {
        task: TaskState(job, state.lower(), True, "", node, "" if reason == "None" else reason)
        for task, job, (state, node, reason) in _rows(text, names)
    }


def _accounted(ids: str, names: Mapping[str, str]) -> dict[TaskId, TaskState]:
    form = "--format=JobID,State,ExitCode,NodeList,JobName"
    text = command_output("sacct", "-X", "--noheader", "--parsable2", f"--jobs={ids}", form)
    return {
        # "CANCELLED by 1000"; a task that never ran has no node.
        task: TaskState(job, state.split()[0].lower(), False, code, "" if "None" in node else node)
        for task, job, (state, code, node) in _rows(text, names)
    }


def _rows(text: str, names: Mapping[str, str]) -> Iterator[tuple[TaskId, str, list[str]]]:
    """The lines of a table, each task of a range on its own: task, its id as text, the columns."""
    for line in text.splitlines():
        task, *values = line.split("|", 4)
        match = TASK.fullmatch(task)
        if not match or len(values) != 4 or names.get(match[1]) != values[3]:
            continue
        if match[3] is None:
            yield (match[1], 0), match[1], values[:3]
            continue
        for index in _indices(match[3]):
            yield (match[1], index), f"{match[1]}_{index}", values[:3]


def _indices(text: str) -> Iterator[int]:
    """`0,2,4-6` as numbers."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first:
            yield from range(int(first), int(last or first) + 1)
