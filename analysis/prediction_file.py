"""Dated predictions on disk, and later studies held against them.

A prediction is written once, with the runs that it rests on; a run that it rests on, or that was
finished before it, cannot test it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.isoflop import fit_isoflop
from analysis.load import AnalysisError, usable
from analysis.predict import Prediction
from analysis.runnable import Runnable
from peer_scaling.record import budget_label

KIND = "peer-analyze prediction"
FORMAT = 1
SAME_BUDGET = 1e-6
IDENTITY = ("variant", "size", "seed", "budget", "num_params_total", "tokens", "loss")
"""What makes a run the same run, whatever it is called."""


@dataclass(frozen=True)
class Saved:
    """What a check needs of a file."""

    made_at: datetime
    study: str
    variant: str
    axis: str
    budget: float
    level: float
    approach: str
    loss: float
    low: float
    high: float
    run_digests: frozenset[str]


@dataclass(frozen=True)
class Checked:
    """A prediction beside what was measured."""

    saved: Saved
    measured: float
    measured_from: str
    notes: tuple[str, ...]

    @property
    def inside(self) -> bool:
        """Whether the measured loss lies in the interval."""
        return self.saved.low <= self.measured <= self.saved.high

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.saved.loss / self.measured - 1


def run_digests(runs: pd.DataFrame) -> list[str]:
    """SHA-256 of every run's identity, sorted."""
    rows = [[_exact(value) for value in row] for row in runs[list(IDENTITY)].to_numpy()]
    return sorted(hashlib.sha256(json.dumps(row).encode()).hexdigest() for row in rows)


def save(
    prediction: Prediction, choice: Runnable, frame: pd.DataFrame, folder: Path, now: datetime
) -> Path:
    """Write a prediction under a name with its date; never over another file.

    Raises:
        AnalysisError: the file is there, or the folder cannot be written.
    """
    rows = usable(frame)
    digests = run_digests(rows.loc[rows["variant"] == prediction.variant])
    values = {
        "kind": KIND,
        "format": FORMAT,
        "made_at": now.astimezone(UTC).isoformat(timespec="seconds"),
        "package_version": version("peer-scaling"),
        **asdict(prediction),
        "objections": list(prediction.objections),
        "size": asdict(choice),
        "runs_sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "run_digests": digests,
    }
    named = f"{prediction.study}-{prediction.variant}-{budget_label(prediction.budget)}"
    safe = re.sub(r"[^\w.+-]", "_", named)
    path = folder / f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{safe}.json"
    text = json.dumps(_plain(values), indent=1, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(text)
    except FileExistsError as error:
        raise AnalysisError(f"--save {path}: there already; a prediction is not changed") from error
    except OSError as error:
        raise AnalysisError(f"--save {folder}: {error.strerror or error}") from error
    return path


def read(path: Path) -> Saved:
    """A saved prediction.

    Raises:
        AnalysisError: not readable, or not a prediction.
    """
    try:
        values = json.loads(path.read_text())
        if values["kind"] != KIND or values["format"] != FORMAT:
            raise ValueError(f"not a {KIND} of format {FORMAT}")
        return _saved(values)
    except OSError as error:
        raise AnalysisError(f"--check {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise AnalysisError(
            f"--check {path}: not a saved prediction ({type(error).__name__}: {error}); "
            "`peer-analyze predict --save` writes them"
        ) from error


def _saved(values: Mapping[str, Any]) -> Saved:
    best = values["routes"][0]
    numbers = [values["budget"], values["level"], *(best["L"][n] for n in ("value", "low", "high"))]
    budget, level, loss, low, high = (np.nan if n is None else float(n) for n in numbers)
    if not (np.isfinite(budget) and np.isfinite(loss) and isinstance(values["run_digests"], list)):
        raise ValueError("budget, loss or run_digests are missing")
    return Saved(
        made_at=_time(values["made_at"]),
        study=str(values["study"]),
        variant=str(values["variant"]),
        axis=str(values["axis"]),
        budget=budget,
        level=level,
        approach=str(best["approach"]),
        loss=loss,
        low=low,
        high=high,
        run_digests=frozenset(map(str, values["run_digests"])),
    )


def check(saved: Saved, frame: pd.DataFrame) -> Checked:
    """Hold a later study's runs at the predicted budget against the prediction.

    Raises:
        AnalysisError: no such run; one that the prediction rests on; one finished before it.
    """
    rows = usable(frame)
    own = rows.loc[rows["variant"] == saved.variant]
    here = own.loc[np.isclose(own["budget"], saved.budget, rtol=SAME_BUDGET, atol=0)]
    if here.empty:
        known = ", ".join(budget_label(C) for C in sorted(set(own["budget"]))) or "none"
        raise AnalysisError(
            f"no usable run of {saved.variant} at {saved.budget:g} FLOPs; its budgets are {known}"
        )
    used = saved.run_digests.intersection(run_digests(here))
    if used:
        raise AnalysisError(
            f"{len(used)} of {len(here)} runs at {saved.budget:g} FLOPs were already part of the "
            "prediction's runs: they cannot test it; check against runs that are new"
        )
    early = [t for t in here["finished_at"] if isinstance(t, str) and _time(t) < saved.made_at]
    if early:
        raise AnalysisError(
            f"{len(early)} of {len(here)} runs at {saved.budget:g} FLOPs were finished before the "
            f"prediction of {saved.made_at.isoformat()}, the first at {min(early)}: they cannot "
            "test it"
        )
    (profile,) = fit_isoflop(here.assign(budget=saved.budget), saved.axis).profiles
    measured, source = profile.loss, f"minimum of the curve over {profile.num_sizes} sizes"
    if not profile.ok:
        measured = profile.best_loss
        source = f"lowest trained size {profile.best_size}; no minimum ({profile.status})"
    undated = int(here["finished_at"].isna().sum())
    notes = (f"{undated} of {len(here)} runs do not say when they finished",) if undated else ()
    return Checked(saved, float(measured), source, notes)


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _exact(value: object) -> str:
    """Equal for 1 and 1.0, and to the last digit."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value).hex()
    return str(value)


def _plain(value: Any) -> Any:
    """As JSON holds it: numbers that are none become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    return value
