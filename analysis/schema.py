"""The columns of a frame of runs, and the door through which every value enters one.

Counts and FLOPs are float64, because 6 N D overflows int64 at 9.2e18 without a warning. A value
that cannot be is missing in the frame, and stands in the reason why its row is excluded.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from math import inf, isfinite, nan
from typing import Any

import pandas as pd

from peer_scaling.record import budget_label

MAX_LOSS = 700.0
"""Nats: above it, the perplexity is no finite number."""
MAX_VALUE = 1e60
"""FLOPs, tokens, parameters: above it, products of them are no finite numbers."""
ABOVE_ZERO = 5e-324
"""The smallest float64 above 0."""
MAX_SHOWN = 60
"""Characters of a value in a reason."""
MAX_TEXT = 500
"""Characters of a text in the frame."""
NAME = re.compile(r"\w[\w .,=+@()/:*-]{0,59}")
"""Of variants, sizes and studies: nothing that a figure, a table or a shell takes for more."""
DIGITS = re.compile(r"-?\d{1,19}(\.0*)?", re.ASCII)
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class AnalysisError(ValueError):
    """No answer is possible; the message says with what value, why, and what to do next."""


class Kind(Enum):
    """What a column holds."""

    NAME = "name"
    """Text like `NAME`, or None."""
    TEXT = "text"
    """One printable line, or None."""
    TIME = "time"
    """ISO 8601, UTC, which sorts as text; or None."""
    SEED = "seed"
    """A Python int, or None: a seed of 63 bits is no float64."""
    FLAG = "flag"
    """True, False or None."""
    NUMBER = "number"
    """float64; NaN where it is missing."""


@dataclass(frozen=True)
class Column:
    """A column of the frame."""

    name: str
    kind: Kind
    unit: str = ""
    least: float = -inf
    """Of numbers, as is `below`, which itself cannot be."""
    below: float = MAX_VALUE

    def read(self, value: object) -> tuple[Any, bool]:
        """The value as the frame holds it, and whether one was given that cannot be."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return self.missing, False
        found = _READERS[self.kind](value)
        if self.kind is Kind.NUMBER and found is not None and not self.least <= found < self.below:
            found = None
        return (self.missing, True) if found is None else (found, False)

    @property
    def missing(self) -> float | None:
        """What stands for no value."""
        return nan if self.kind is Kind.NUMBER else None


def _text(value: object) -> str | None:
    return one_line(value, MAX_TEXT)


def _name(value: object) -> str | None:
    text = one_line(value)
    return text if NAME.fullmatch(text) else None


def _time(value: object) -> str | None:
    text = one_line(value)
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return None
    return text


def _seed(value: object) -> int | None:
    text = repr(value) if isinstance(value, float) else str(value).strip()
    return int(text.partition(".")[0]) if DIGITS.fullmatch(text) else None


def _flag(value: object) -> bool | None:
    return FLAGS.get(str(value).strip().lower())


def _number(value: object) -> float | None:
    if isinstance(value, str) and ("_" in value or not value.isascii()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isfinite(number) else None


_READERS = {
    Kind.NAME: _name,
    Kind.TEXT: _text,
    Kind.TIME: _time,
    Kind.SEED: _seed,
    Kind.FLAG: _flag,
    Kind.NUMBER: _number,
}
_LABELS = (
    Column("run_id", Kind.TEXT),
    Column("study", Kind.NAME),
    Column("variant", Kind.NAME),
    Column("ffw", Kind.NAME),
    Column("size", Kind.NAME),
    Column("seed", Kind.SEED),
    Column("status", Kind.NAME),
    Column("reason", Kind.TEXT),
    Column("causal", Kind.FLAG),
    Column("query_norm", Kind.NAME),
    Column("dropless", Kind.FLAG),
    Column("routing", Kind.NAME),
    Column("device", Kind.TEXT),
    Column("protocol", Kind.TEXT),
    Column("finished_at", Kind.TIME),
)
_POSITIVE = (
    Column("budget", Kind.NUMBER, "training FLOPs", ABOVE_ZERO),
    Column("flops", Kind.NUMBER, "training FLOPs", ABOVE_ZERO),
    Column("num_params_total", Kind.NUMBER, "parameters", ABOVE_ZERO),
    Column("num_params_active", Kind.NUMBER, "parameters", ABOVE_ZERO),
    Column("tokens", Kind.NUMBER, "tokens", ABOVE_ZERO),
    Column("loss", Kind.NUMBER, "nats per token", ABOVE_ZERO, MAX_LOSS),
)
_NOT_NEGATIVE = tuple(
    Column(name, Kind.NUMBER, unit, 0.0)
    for name, unit in (
        ("num_experts", "experts"),
        ("num_heads", "heads"),
        ("experts_per_head", "experts per token and head"),
        ("num_params_embedding", "parameters"),
        ("num_params_lookup", "parameters"),
        ("steps", "steps"),
        ("epochs", "passes over the data"),
        ("perplexity", "1 per token"),
        ("bits_per_byte", "bits per byte"),
        ("val_tokens", "tokens"),
        ("lr", "1"),
        ("wall_seconds", "s"),
        ("train_seconds", "s"),
        ("tokens_per_second", "tokens per s"),
        ("flops_per_second", "FLOPs per s"),
        ("peak_memory_bytes", "bytes"),
        ("bytes_per_token", "bytes per token"),
        ("flops_chinchilla", "training FLOPs"),
        ("flops_6n_active", "training FLOPs"),
        ("flops_6n_total", "training FLOPs"),
        ("flops_non_embedding", "training FLOPs"),
    )
)
_ANY = (
    Column("expert_usage", Kind.NUMBER, "share of the experts"),
    Column("expert_unevenness", Kind.NUMBER, "nats"),
    Column("train_loss", Kind.NUMBER, "nats per token"),
    Column("loss_as_trained", Kind.NUMBER, "nats per token"),
    Column("loss_top1", Kind.NUMBER, "nats per token"),
)
COLUMNS = (*_LABELS, *_POSITIVE, *_NOT_NEGATIVE, *_ANY, Column("excluded", Kind.TEXT))
"""The frame's, in its order; `docs/data-format.md` says what they mean."""
NAMES = tuple(column.name for column in COLUMNS)
NUMERIC = tuple(column.name for column in COLUMNS if column.kind is Kind.NUMBER)
LABELS = tuple(column.name for column in _LABELS)
NEEDED = ("variant", "budget", "num_params_total", "tokens", "loss")
"""Columns without which a run says nothing of a scaling law."""
UNNAMED = "unnamed"
"""The study of runs that name none."""


def tidy(values: Mapping[str, object], where: str = "") -> dict[str, Any]:
    """One run's values as a row of the frame.

    Args:
        values: by column, as texts, numbers or None, from anywhere; other keys are left alone.
        where: what a reason begins with, as the line of a file.

    Returns:
        A value of the declared kind for each of `COLUMNS`; in `excluded` the reason why the row
        must not be used: the one given, else a `status` other than `done`, else what is missing or
        cannot be. A run without a status is done, one without a study is `UNNAMED`'s, and runs
        without a size are of one size if their parameters are as many.
    """
    row, wrong = {}, []
    for column in COLUMNS:
        value = values.get(column.name)
        row[column.name], impossible = column.read(value)
        if impossible:
            wrong.append(f"{column.name}={shown(value)}")
    if row["excluded"] is None:
        row["status"], row["study"] = row["status"] or "done", row["study"] or UNNAMED
        row["size"] = row["size"] or budget_label(row["num_params_total"])
        row["excluded"] = _reason(row, wrong, where)
    return row


def _reason(row: Mapping[str, Any], wrong: list[str], where: str) -> str | None:
    if row["status"] != "done":
        return one_line(": ".join(filter(None, (where, row["status"], row["reason"]))), MAX_TEXT)
    given = {problem.partition("=")[0] for problem in wrong}
    missing = [
        name
        for name in (*NEEDED, "flops")
        if name not in given and (row[name] is None or row[name] != row[name])
    ]
    parts = [f"no {', '.join(missing)}"] if missing else []
    parts += [f"impossible: {', '.join(wrong)}"] if wrong else []
    return one_line(": ".join(filter(None, (where, "; ".join(parts)))), MAX_TEXT) if parts else None


def frame_of(rows: Iterable[Mapping[str, Any]], extra: Iterable[str] = ()) -> pd.DataFrame:
    """Rows of `tidy` as a frame: `COLUMNS`, then `extra`, which are texts or None."""
    rows = list(rows)
    kinds = {column.name: "float64" for column in COLUMNS if column.kind is Kind.NUMBER}
    columns = {
        name: pd.Series([row.get(name) for row in rows], dtype=kinds.get(name, "object"))
        for name in (*NAMES, *extra)
    }
    return pd.DataFrame(columns)


def validate(frame: pd.DataFrame) -> list[str]:
    """Everything that keeps a frame from being one of runs: a line each, none if it is."""
    names = [str(name) for name in frame.columns]
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    problems = [f"column {name} occurs twice" for name in twice]
    missing = [name for name in NEEDED if name not in names]
    if missing:
        problems.append(f"runs without {', '.join(missing)}: every run needs these columns")
    for name in NUMERIC:
        if name in names and name not in twice and frame[name].dtype != "float64":
            bad = [v for v in frame[name] if not pd.isna(v) and _number(v) is None]
            example = f": {shown(bad[0])}" if bad else ""
            problems.append(f"column {name} is {frame[name].dtype}, not float64{example}")
    return problems


def one_line(value: object, limit: int | None = None) -> str:
    """A text on one line without what cannot be printed, cut where it is longer than `limit`."""
    text = " ".join(str(value).split())
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if limit is None or len(text) <= limit else f"{text[: limit - 3]}..."


def shown(value: object) -> str:
    """A value for a reason."""
    return one_line(f"{value:g}" if isinstance(value, float) else repr(value), MAX_SHOWN)
