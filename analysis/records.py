"""Runs from the folders that training leaves: records, and cells that have none yet."""

from collections.abc import Mapping
from dataclasses import asdict
from math import exp
from pathlib import Path
from typing import Any

from analysis.csv_runs import read_table
from analysis.schema import MAX_LOSS, AnalysisError, tidy
from peer_scaling.record import (
    HISTORY,
    PLAN,
    RecordError,
    RunRecord,
    find_records,
    read_record,
)

SETTINGS = "ffw_settings"
"""Beside the schema's columns: the numbers of the variant, for `comparable`."""

OF_THE_LAYER = ("num_experts", "num_heads", "experts_per_head", "query_norm")
"""Settings of a sparse layer that are columns of the frame."""
TOP_1 = "top1"
"""The causal route that is reported beside the one that ranks."""


def record_rows(root: Path) -> list[dict[str, Any]]:
    """A row for every run below a folder that has a record, in the order of their paths; then one
    for every cell of a plan, and every history, without a record: a study that is still running.
    """
    paths = list(find_records(root))
    return [_row(path) for path in paths] + _unfinished(root, {path.parent for path in paths})


def record_row(record: RunRecord) -> dict[str, Any]:
    """A record as a row of the frame, with `SETTINGS`."""
    flops = {f"flops_{name}": value for name, value in record.flops_by_convention.items()}
    own = record.config.get("ffw")
    settings = repr(sorted(own.items()) if isinstance(own, Mapping) else own)
    told = {"dropless": _dropless(own), "device": _device(record.environment)}
    layer = {name: own.get(name) for name in OF_THE_LAYER} if isinstance(own, Mapping) else {}
    values = {**asdict(record), **flops, **told, **layer, **_ranked(record)}
    return {**tidy(values), SETTINGS: settings}


def _ranked(record: RunRecord) -> dict[str, Any]:
    """What ranks a layer that is not causal, where the record has it: the loss with the first of
    its causal routes, which was fixed before any loss was known, and what follows from that loss.
    """
    if record.causal is not False or not record.causal_losses:
        return {}
    routing, loss = next(iter(record.causal_losses.items()))
    loss = loss if isinstance(loss, int | float) else None
    told = {"routing": routing, "causal": True, "dropless": True, "loss": loss}
    told |= {"loss_as_trained": record.loss, "loss_top1": record.causal_losses.get(TOP_1)}
    return told | {"perplexity": None, "bits_per_byte": None} | _scaled(record, loss)


def _scaled(record: RunRecord, loss: float | None) -> dict[str, float]:
    """Perplexity and bits per byte of another loss on the record's tokens."""
    if loss is None or not 0 < loss < MAX_LOSS:
        return {}  # the row is excluded
    scaled = {"perplexity": exp(loss)}
    if record.bits_per_byte is not None and record.loss:
        scaled["bits_per_byte"] = record.bits_per_byte * (loss / record.loss)
    return scaled


def _dropless(ffw: object) -> bool | None:
    """Whether no expert has a capacity that leaves tokens out, by the layer's settings."""
    if not isinstance(ffw, Mapping):
        return None
    return "capacity_factor" not in ffw or ffw.get("router") == "token_choice"


def _device(environment: Mapping[str, Any]) -> str | None:
    """What the times and the memory of a run were measured on."""
    device = environment.get("device")
    if not device:
        return None
    ranks, threads = (environment.get(name) for name in ("world_size", "threads"))
    several = f"{ranks} x " if isinstance(ranks, int) and ranks > 1 else ""
    return f"{several}{device}" + (f", threads={threads}" if threads else "")


def refused_row(run_id: object, why: object, **labels: object) -> dict[str, Any]:
    """A row for something that is no run that can be used."""
    return tidy({"run_id": run_id, "excluded": str(why), **labels})


def _row(path: Path) -> dict[str, Any]:
    try:
        return record_row(read_record(path))
    except RecordError as error:
        return refused_row(path.parent.name, error)


def _unfinished(root: Path, recorded: set[Path]) -> list[dict[str, Any]]:
    rows: dict[Path, dict[str, Any]] = {}
    for plan in sorted(root.rglob(PLAN)):
        rows |= {folder: row for folder, row in _cells(plan).items() if folder not in recorded}
    known = recorded | rows.keys()
    for history in sorted(root.rglob(HISTORY), key=lambda path: len(path.parts)):
        folder = history.parent
        if known.isdisjoint([folder, *folder.parents]):  # a checkpoint has a history of its own
            known.add(folder)
            rows[folder] = refused_row(folder.name, "no record yet: begun", status="unfinished")
    return list(rows.values())


def _cells(plan: Path) -> dict[Path, dict[str, Any]]:
    """The cells of a plan by the folder of their run."""
    try:
        header, lines = read_table(plan)
    except AnalysisError as error:
        return {plan: refused_row(PLAN, error)}
    if plan.is_symlink() or "run_id" not in header:
        return {plan: refused_row(PLAN, f"{plan}: a link, or not the plan of a study")}
    cells = {}
    for _, line in lines:
        values = dict(zip(header, line, strict=False))
        # A name, never a path: what it leads to is compared with folders, and not read.
        folder = plan.parent / Path(values.get("run_id", "")).name
        begun = "begun" if folder.is_dir() else "not begun"
        labels = {name: values.get(name) for name in ("variant", "size", "budget", "seed", "flops")}
        study = {"study": plan.parent.name, "status": "unfinished"}
        cells[folder] = refused_row(
            values.get("run_id"), f"no record yet: {begun}", **labels, **study
        )
    return cells
