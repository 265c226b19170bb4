"""What the benchmark prints and writes: tables, ratios and facts of the machine."""

import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.contender import Case
from benchmarks.peers.timing import Times, medians
from peer_scaling.display import table_text
from peer_scaling.machine import git_commit

PACKAGES = (
    "torch", "numpy", "PEER-pytorch", "product-key-memory", "st-moe-pytorch", "transformers",
)  # fmt: skip
MIB = 2**20


@dataclass
class Result:
    """The measurements of one comparison."""

    case: Case
    notes: dict[str, str]
    errors: dict[str, float | None]
    """Relative error against float64, by implementation; None if the function differs."""
    baselines: list[str]
    """Ours: the implementations that ratios are over."""
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    times: Times = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """Time and memory of every implementation over those of each of ours."""
        found = {}
        measured = {name: dict(m) for name, m in medians(self.times).items()}
        for name, extra in self.peak_bytes.items():
            if extra:
                measured.setdefault(name, {})["memory"] = float(extra)
        for base in self.baselines:
            for name, values in measured.items():
                for measure in values.keys() & measured.get(base, {}).keys():
                    key = f"{self.case.label}/{measure}/{name} over {base}"
                    if name != base:
                        found[key] = round(values[measure] / measured[base][measure], 4)
        return dict(sorted(found.items()))

    def as_json(self) -> dict[str, Any]:
        """All numbers; seconds and bytes."""
        return {
            **asdict(self.case),
            "label": self.case.label,
            "relative_error": self.errors,
            "notes": {name: note for name, note in self.notes.items() if note},
            "median_seconds": medians(self.times),
            "seconds": self.times,
            "extra_peak_bytes": self.peak_bytes,
            "ratios": self.ratios(),
        }

    def text(self) -> str:
        """One row per implementation: medians, and the ratio to the first of ours in brackets."""
        measures = list(next(iter(self.times.values()), {}))
        columns = ["implementation", "error", *(f"{m} ms" for m in measures), "extra MiB"]
        rows = [self._row(name, measures) for name in self.errors]
        notes = [f"  {name}: {note}" for name, note in self.notes.items() if note]
        return "\n".join([table_text(columns, rows), *notes])

    def _row(self, name: str, measures: list[str]) -> list[str]:
        error, extra = self.errors[name], self.peak_bytes.get(name)
        middle, base = medians(self.times), self.baselines[0]
        cells = [name, "other" if error is None else f"{error:.1e}"]
        for measure in measures:
            if name in middle and base in middle:
                ratio = middle[name][measure] / middle[base][measure]
                cells.append(f"{middle[name][measure] * 1e3:.2f} ({ratio:.2f}x)")
            else:
                cells.append("-")
        return [*cells, "-" if extra is None else f"{extra / MIB:.1f}"]


def machine_facts() -> dict[str, Any]:
    """What one must know to compare numbers of two machines; no host or user names."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": shlex.join(
            ["python", "-m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]
        ),
        "commit": git_commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
