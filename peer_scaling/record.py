"""The record of a run: one immutable JSON file, the truth about it.

This module imports nothing of ours and nothing outside the standard library: it is the bridge
between training and `analysis`. Loss is nats per token; FLOPs are training FLOPs
(peer_scaling/cost.py says how they are counted); times are seconds; memory is bytes.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import cache
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

SCHEMA = 1
RECORD = "record.json"
"""In a run's folder: its final record, never written twice."""
FAILED = re.compile(r"failed-(\d+)\.json")
"""In a run's folder: the records of attempts that failed."""
HISTORY = "history.jsonl"
REWOUND = "history-rewound.jsonl"
"""Lines of a history that a resumed run wrote again."""
EVALUATION = "evaluation.json"
"""In a run's folder: perplexities on the evaluation sets, by `peer-eval`; docs/evaluation.md."""
SUMMARY_KEY = "peer_scaling_record"
"""In the summary of a run's W&B mirror: `record_text`, as text. W&B keeps a text as it is, and
writes the number 700000000.0 as 700000000."""
PLAN = "plan.csv"
"""In a study's folder: its cells, as the last launch planned them."""
DECISIONS = "decisions.jsonl"
"""In the folder of a study that chooses its own sizes: what it chose, and why."""
STATUSES = ("done", "diverged", "failed", "infeasible", "invalid")
"""`done`: trained and evaluated. `diverged`: stopped by a bad loss or gradient. `failed`:
stopped by anything else, tried again by the next launch. `infeasible`: the plan refused the cell.
`invalid`: trained, but a check says that its numbers must not be used."""
FAILURES = ("out_of_memory", "no_durable_checkpoint", "transient", "crashed", "hung", "error")
"""Kinds of `failed`, which are retried differently. `transient`: the network, a disk or a peer.
`crashed`: the process ended without saying why. `hung`: it gave no sign of life and was ended."""
TERMINAL = ("done", "diverged", "infeasible", "invalid")
"""Statuses that a later launch leaves as they are."""


@dataclass(frozen=True)
class RunRecord:
    """Everything that an analysis may want to know of a run; None where it never got there."""

    run_id: str
    study: str
    status: str
    reason: str | None
    ffw: str
    """Name of the feed-forward variant: dense, moe, pkm, peer."""
    variant: str
    """Label of the variant within the study; the variant's name unless the study says otherwise."""
    size: str
    """Name of the backbone, by shape."""
    seed: int
    budget: float
    """Training FLOPs asked for."""
    protocol: str | None = None
    """Hash of what all comparable runs have in common: data, optimiser, backbone but its shape."""
    flops: float | None = None
    """Training FLOPs realised, `matmul` convention."""
    flops_by_component: Mapping[str, float] = field(default_factory=dict)
    flops_by_convention: Mapping[str, float] = field(default_factory=dict)
    bytes_per_token: float | None = None
    """Bytes gathered from lookup tables per token in a forward pass."""
    num_params_total: int | None = None
    num_params_active: int | None = None
    num_params_embedding: int | None = None
    num_params_lookup: int | None = None
    tokens: int | None = None
    steps: int | None = None
    epochs: float | None = None
    loss: float | None = None
    """Final validation loss: cross-entropy, nats per token."""
    perplexity: float | None = None
    bits_per_byte: float | None = None
    val_tokens: int | None = None
    causal: bool | None = None
    """Whether the layer is causal in evaluation; a loss that saw the future is not comparable."""
    causal_losses: Mapping[str, float] = field(default_factory=dict)
    """Of a layer that is not causal: the loss with each of its causal routes, on the same tokens.
    The first ranks it."""
    expert_usage: float | None = None
    expert_unevenness: float | None = None
    expert_usage_growth: Mapping[str, float] = field(default_factory=dict)
    """`expert_usage` after the first so many validation tokens."""
    train_loss: float | None = None
    """Mean training loss over the last tenth of the steps."""
    lr: float | None = None
    wall_seconds: float | None = None
    """The whole run: building, training, evaluating."""
    train_seconds: float | None = None
    """Training steps alone."""
    tokens_per_second: float | None = None
    """Over `train_seconds`, as is the next one."""
    flops_per_second: float | None = None
    matmul_peak_flops_per_second: float | None = None
    """Of a large matrix product in the run's precision on its device and threads, measured just
    before training (`peer_scaling.machine.matmul_peak`)."""
    utilisation: float | None = None
    """`flops_per_second` over that peak: a share, 1 at best."""
    peak_memory_bytes: int | None = None
    """Device memory on a GPU, resident memory of the process otherwise."""
    state_digest: str | None = None
    """sha256 of the final parameters, buffers and optimiser state."""
    failure: str | None = None
    """Kind of a `failed` run, one of `FAILURES`."""
    attempts: int = 1
    last_step: int | None = None
    """Steps done when a run stopped early."""
    finished_at: str | None = None
    """UTC, ISO 8601."""
    data_fingerprint: str | None = None
    git_commit: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def is_final(self) -> bool:
        """Whether a later launch leaves the run as it is."""
        return self.status in TERMINAL

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status={self.status!r}; choose one of {', '.join(STATUSES)}")
        if self.failure is not None and self.failure not in FAILURES:
            raise ValueError(f"failure={self.failure!r}; choose one of {', '.join(FAILURES)}")


class RecordError(ValueError):
    """A file that is not a record, with the reason."""


def record_text(record: RunRecord) -> str:
    """The content of `record.json`."""
    return json.dumps(_plain(asdict(record)), indent=1, allow_nan=False) + "\n"


def read_record(path: Path) -> RunRecord:
    """Read one `record.json`.

    Raises:
        RecordError: the file is not JSON, not a record, or of a newer schema.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise RecordError(f"{path}: a link or no regular file; a record is a file of its own")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not readable as JSON ({error})") from error
    return parse_record(text, path)


def parse_record(text: str, where: object) -> RunRecord:
    """The record that `record_text` wrote, wherever it was kept; `where` is named in errors.

    Raises:
        RecordError: the text is not JSON, not a record, or of a newer schema.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not readable as JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("schema"), int):
        raise RecordError(f"{where}: not a run record (no `schema`)")
    if values["schema"] > SCHEMA:
        raise RecordError(f"{where}: schema {values['schema']} is newer than {SCHEMA}; update")
    kinds = _kinds()
    own = {name: value for name, value in values.items() if name in kinds}
    wrong = [
        f"{name}={value!r:.100}"
        for name, value in own.items()
        if not any(_is_a(value, kind) for kind in kinds[name])
    ]
    if wrong:
        raise RecordError(f"{where}: not what a record holds: {', '.join(wrong)}")
    try:
        return RunRecord(**own)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{where}: {error}") from error


def failed_name(attempt: int) -> str:
    """Name of the record of an attempt that failed."""
    return f"failed-{attempt:03d}.json"


def find_record(folder: Path) -> RunRecord | None:
    """What is known of a run: its final record, else that of the last attempt that failed; None if
    there is none or it cannot be read.
    """
    with suppress(RecordError):
        return read_record(folder / RECORD)  # without a listing of the folder, for most runs
    for path in _failed(folder):
        with suppress(RecordError):
            return read_record(path)
    return None


def _failed(folder: Path) -> list[Path]:
    """Records of failed attempts, the last one first."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    numbered = ((int(match[1]), name) for name in names if (match := FAILED.fullmatch(name)))
    return [folder / name for _, name in sorted(numbered, reverse=True)]


def budget_label(budget: float) -> str:
    """A budget for names and figures: 6e18, 2.15e18; the shortest text that reads back the same."""
    return f"{Decimal(repr(float(budget))).normalize():e}".replace("e+", "e")


def find_records(root: Path) -> Iterator[Path]:
    """The record of every run under `root` that has one, final or of its last failed attempt, in
    the order of their paths.
    """
    found: list[Path] = []
    for folder, folders, files in os.walk(root):  # unlike rglob, it bears that a folder vanishes
        names = {*folders, *files}
        if RECORD in names:
            found.append(Path(folder, RECORD))
        elif any(map(FAILED.fullmatch, names)):
            found.append(_failed(Path(folder))[0])
    yield from sorted(found)


@cache
def _kinds() -> dict[str, tuple[type, ...]]:
    """The types that each field of `RunRecord` is declared to have; worked out once, which takes
    longer than reading a record.
    """
    hints = get_type_hints(RunRecord).items()
    unions = {name: get_args(h) if isinstance(h, UnionType) else (h,) for name, h in hints}
    return {
        name: tuple(get_origin(kind) or kind for kind in union) for name, union in unions.items()
    }


def _is_a(value: object, kind: type) -> bool:
    """Whether a value from JSON is of a declared type."""
    if isinstance(value, int | float) and kind in (int, float):
        # False for NaN; an int may be too large for a float.
        limit = sys.float_info.max
        return not isinstance(value, bool) and -limit <= value <= limit
    return isinstance(value, kind)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, as what was never measured."""
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
