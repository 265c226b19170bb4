"""The reproducibility card of a study: what one must know to train and fit it again.

After the check-list of (Mis)Fitting (Li et al. 2025, 2502.18969), as section 3e of the reliability
notes that the project follows has it. What no record says is said to be not recorded.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures import AXIS_LABELS, count_label
from analysis.load import usable
from analysis.record_set import inside
from analysis.report_card_fit import fit_items
from analysis.study_report import StudyReport
from peer_scaling.record import STATUSES, RunRecord, budget_label

NOT_RECORDED = "not recorded"
PATHS = ("path", "name")
"""Settings that may be paths."""
MOST_VALUES = 6
"""Different values of one setting that are spelled out."""
Item = tuple[str, str]
"""What, and what is known of it; `...` is code."""


def card(report: StudyReport) -> list[Item]:
    """All items, in the order of the check-list."""
    return [
        *_runs(report),
        *_model(report),
        *_training(report),
        *_data(report),
        *fit_items(report),
        *_provenance(report),
    ]


def _runs(report: StudyReport) -> Iterator[Item]:
    frame, planned = report.frame, report.records.num_planned
    counts = Counter(str(status) for status in frame["status"] if isinstance(status, str))
    unread = len(frame) - counts.total()
    parts = [f"planned: {NOT_RECORDED}" if planned is None else f"planned {planned}"]
    parts += [f"{status} {counts.pop(status, 0)}" for status in STATUSES]
    parts += [f"{status} {num}" for status, num in sorted(counts.items())]
    parts += [f"not readable {unread}"] if unread else []
    num, used = len(frame), len(usable(frame))
    yield "Runs", f"{', '.join(parts)}; excluded {num - used}, used {used} of {num}"
    budgets = ", ".join(map(budget_label, report.fit.budgets))
    yield "Budgets", f"{budgets} training FLOPs; {_off_budget(usable(frame))}"


def _off_budget(rows: pd.DataFrame) -> str:
    off = float(np.abs(rows["flops"].to_numpy() / rows["budget"].to_numpy() - 1).max())
    return f"met to {100 * off:.2f} %" if np.isfinite(off) else f"FLOPs spent: {NOT_RECORDED}"


def _model(report: StudyReport) -> Iterator[Item]:
    rows = usable(report.frame)
    sizes = {variant: own["size"].nunique() for variant, own in rows.groupby("variant")}
    told = ", ".join(f"{variant} {num}" for variant, num in sizes.items())
    spans = [f"{_span(rows[name])} {name}" for name in ("num_params_total", "num_params_active")]
    yield "Sizes", f"{told}; {', '.join(spans)}"
    yield "D/N", "; ".join(_tokens_per_parameter(rows))
    share = _span(100 * rows["num_params_embedding"] / rows["num_params_total"], "{:.3g} %")
    yield (
        "Parameter count convention",
        f"N is the {AXIS_LABELS[report.fit.axis].removesuffix(' N')} (`{report.fit.axis}`), "
        f"embeddings included; their share of the total: {share}",
    )
    yield "FLOP convention", _flop_convention(report.records.used)


def _tokens_per_parameter(rows: pd.DataFrame) -> Iterator[str]:
    for name in ("num_params_total", "num_params_active"):
        yield f"{_span(rows['tokens'] / rows[name], '{:.3g}')} tokens per parameter ({name})"


def _span(values: Any, form: str = "") -> str:
    values = np.asarray(values, dtype=float)
    known = values[np.isfinite(values)]
    if not known.size:
        return NOT_RECORDED
    ends = [form.format(v) if form else count_label(v) for v in (known.min(), known.max())]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _flop_convention(records: Iterable[RunRecord]) -> str:
    def primary(record: RunRecord) -> str | None:
        same = [k for k, v in record.flops_by_convention.items() if v == record.flops]
        return same[0] if same else None

    names = {name for record in records for name in record.flops_by_convention}
    others = ", ".join(sorted(names - {primary(record) for record in records}))
    beside = f"; counted beside it: {others}" if others else ""
    by = distinct(records, primary)
    return by if by == NOT_RECORDED else f"budgets are met by {by} (docs/flops.md){beside}"


def _training(report: StudyReport) -> Iterator[Item]:
    records = report.records.used
    optim = [
        "beta1", "beta2", "eps", "weight_decay", "clip", "table_update",
    ]  # fmt: skip
    yield "Optimiser", distinct(records, lambda r: _settings(r, "optim", optim))
    schedule = ["schedule", "warmup", "decay", "final"]
    yield "Schedule", distinct(records, lambda r: _settings(r, "optim", schedule))
    yield "Learning-rate rule", _rate_rule(report)
    yield "Learning-rate evidence", "the section on learning rates and seeds"
    yield "Batch rule", distinct(records, _batch)
    yield "Precision", distinct(records, lambda r: inside(r.config, "precision"))
    seeds = sorted({int(seed) for seed in usable(report.frame)["seed"] if pd.notna(seed)})
    yield "Seeds", ", ".join(map(str, seeds)) or NOT_RECORDED


def _settings(record: RunRecord, group: str, names: Iterable[str]) -> str | None:
    found = {name: inside(record.config, group, name) for name in names}
    return _told(found) or None


def _rate_rule(report: StudyReport) -> str:
    rates = f"rates used: {_span(usable(report.frame)['lr'], '{:.3g}')}"
    rule = distinct(report.records.used, _rule)
    return f"{rule}; {rates}"


def _rule(record: RunRecord) -> str | None:
    """The rule that the optimiser's settings state, if the run's rate is the rule's."""
    most, scale = (inside(record.config, "optim", name) for name in ("lr_max", "lr_scale"))
    width = inside(record.config, "decoder", "d_model")
    if not all(isinstance(value, int | float) for value in (most, scale, width, record.lr)):
        return None
    followed = np.isclose(float(record.lr or 0), min(most, scale / width))
    return f"min({most:g}, {scale:g} / width)" if followed else "a rate of its own"


def _batch(record: RunRecord) -> str | None:
    batch, context = inside(record.config, "batch_size"), inside(record.config, "data", "context")
    if not (isinstance(batch, int) and isinstance(context, int)):
        return None
    return f"{batch} sequences of {context} tokens a step, {batch * context} tokens"


def _data(report: StudyReport) -> Iterator[Item]:
    records, rows = report.records.used, usable(report.frame)
    yield (
        "Tokeniser",
        distinct(records, lambda r: _tokenizer(inside(r.config, "data", "tokenizer"))),
    )
    data = ["source", "path", "order", "context", "validation_fraction", "num_tokens"]
    yield "Data", distinct(records, lambda r: _settings(r, "data", data))
    yield "Data hash", distinct(records, lambda r: r.data_fingerprint)
    yield (
        "Validation hash",
        f"{NOT_RECORDED} by itself; a data hash is the sha256 over tokeniser, order, training and "
        "validation shards",
    )
    yield "Validation tokens", _span(rows["val_tokens"])
    yield "Unique training tokens", _span(rows["tokens"] / rows["epochs"].clip(lower=1))
    yield "Corpus", f"{_span(rows['tokens'] / rows['epochs'])} training tokens (tokens over epochs)"
    yield "Epochs", _span(rows["epochs"], "{:.3g}")
    yield "Contamination", "not checked"


def _tokenizer(found: Any) -> str | None:
    if not isinstance(found, dict):
        return None
    return _told(found)


def _told(found: Mapping[str, Any]) -> str:
    """Settings in words, paths without the folders of the machine."""
    known = {name: value for name, value in found.items() if value is not None}
    short = {n: Path(str(v)).name if n in PATHS else v for n, v in known.items()}
    return ", ".join(f"{name}={value}" for name, value in short.items())


def _provenance(report: StudyReport) -> Iterator[Item]:
    records = report.records
    used = records.used
    yield "Protocol hash", distinct(used, lambda r: r.protocol)
    for name in ("python", "platform", "device", "kernels", "threads", "world_size"):
        yield f"Environment: {name}", distinct(used, lambda r, n=name: inside(r.environment, n))
    yield "Environment: packages", distinct(used, _packages)
    yield "Environment lock", f"hash of a lock file: {NOT_RECORDED}"
    yield "Code (git commit)", distinct(used, lambda r: r.git_commit)
    yield "Command that writes this page", f"`{report.command}`"
    yield "sha256 of the record set", f"`{records.sha256}`: of {records.hashed}"


def _packages(record: RunRecord) -> str | None:
    packages = inside(record.environment, "packages")
    if not isinstance(packages, dict):
        return None
    return ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))


def distinct(records: Iterable[RunRecord], what: Callable[[RunRecord], Any]) -> str:
    """The values of a setting among the runs that are used, most frequent first."""
    found = Counter(NOT_RECORDED if v is None else str(v) for v in map(what, records))
    if not found:
        return NOT_RECORDED
    if len(found) == 1:
        return next(iter(found))
    named = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
    told = [f"{value} ({num} runs)" for value, num in named[:MOST_VALUES]]
    rest = len(named) - MOST_VALUES
    return "; ".join(told + ([f"and {rest} other values"] if rest > 0 else []))
