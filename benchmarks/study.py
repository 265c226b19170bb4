"""Cells per minute of a study of tiny runs: two at a time against one at a time.

    python -m benchmarks.study [--quick] [--pairs 3] [--workers 2]

The smoke study with four seeds, 32 runs of 2e9 FLOPs on one thread each, as a user starts it: a new
folder, the corpus prepared before, its smallest cell first and alone. The two sides take turns, and
the order within a pair alternates. `command` is the whole command, imports included; `cells` is the
time from the first start of a run to the last end of one. Medians over pairs of the ratio within a
pair. On a machine that others use, two processes get more of it than one does, so that the ratio
says too much: the load before each pair is printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from peer_scaling.display import table_text
from peer_scaling.record import find_record, find_records

TRAIN = (sys.executable, "-m", "peer_scaling.train", "--config-name", "smoke", "tracker=off")
QUICK = ("ffw=dense", "size=d8_l2", "seed=0,1,2")


def main() -> None:
    """Print the table and the JSON line."""
    arguments = _arguments()
    axes = QUICK if arguments.quick else ("seed=0,1,2,3",)
    rows: list[list[str]] = []
    ratios: dict[str, list[float]] = {"command": [], "cells": []}
    with TemporaryDirectory(prefix="study-") as name:
        folder = Path(name)
        run_study(folder, "warm", 1, ("ffw=dense", "size=d8_l2"))
        for pair in range(arguments.pairs):
            load = os.getloadavg()[0]
            rates: dict[int, tuple[float, float]] = {}
            for workers in sorted({1, arguments.workers}, reverse=pair % 2 == 1):
                rates[workers] = run_study(folder, f"{pair}-{workers}", workers, axes)
            measured = (*rates[1], *rates[arguments.workers])
            own = [measured[2] / measured[0], measured[3] / measured[1]]
            for kind, ratio in zip(ratios, own, strict=True):
                ratios[kind].append(ratio)
            rows.append([f"{load:.1f}", *(f"{value:.1f}" for value in measured)])
            rows[-1] += [f"{ratio:.2f}" for ratio in own]
    sides = [f"{kind}, {n}" for n in (1, arguments.workers) for kind in ratios]
    print(table_text(("load before", *sides, *(f"ratio, {kind}" for kind in ratios)), rows))
    print(json.dumps({kind: round(statistics.median(all_), 3) for kind, all_ in ratios.items()}))


def run_study(folder: Path, study: str, workers: int, axes: Sequence[str]) -> tuple[float, float]:
    """Cells per minute of a study: of the whole command, and from first start to last end."""
    own = (f"study={study}", f"hydra.launcher.workers={workers}", *axes)
    cache = {"PEER_SCALING_CACHE": str(folder / "cache")}
    began = time.perf_counter()
    subprocess.run(
        [*TRAIN, *own], cwd=folder, env={**os.environ, **cache}, check=True, capture_output=True
    )
    seconds = time.perf_counter() - began
    starts, ends = [], []
    for path in find_records(folder / "runs" / study):
        record = find_record(path.parent)
        assert record
        assert record.wall_seconds
        ends.append(path.stat().st_mtime)
        starts.append(ends[-1] - record.wall_seconds)
    return 60 * len(ends) / seconds, 60 * len(ends) / (max(ends) - min(starts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three runs, once: half a minute")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.pairs = arguments.pairs or (1 if arguments.quick else 3)
    return arguments


if __name__ == "__main__":
    main()
