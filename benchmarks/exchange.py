"""Rows of tables against the dense all-reduce that they stand in for: bytes and time of a step.

    python -m benchmarks.exchange [--quick]

Two processes connected by gloo on this machine's CPU. A table of N rows of width 256 in float32;
each rank picked R rows of it, at random, as a step of training does. `rows` is what training does
once per step for every table (peer_scaling/parallel.py): all-gather, merge, mean. `dense` is an
all-reduce of the (N, 256) gradient that the rows stand for. Bytes are those that a rank wrote to
its sockets (Linux counts them); `said` is what the docstring of parallel.py says. The two take
turns; times are medians over rounds of the slower rank. Quote ratios, not milliseconds.
"""

import argparse
import json
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing, nn
from torch.multiprocessing.spawn import spawn

from peer_scaling.display import table_text
from peer_scaling.distributed import World, joined
from peer_scaling.kernels.segments import RowGradient
from peer_scaling.parallel import exchange_rows, sent_bytes

WIDTH = 256
RANKS = 2
IO = Path("/proc/self/io")
CASES = ((2**16, 2**12), (2**18, 2**12), (2**18, 2**14), (2**18, 2**16), (2**18, 2**18))
"""Rows of the table, and rows that each rank picked: PEER picks at most tokens x heads x kept."""
QUICK = ((2**14, 2**8), (2**14, 2**12))


def main() -> None:
    """Print the table and the JSON line."""
    arguments = _arguments()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cases = QUICK if arguments.quick else CASES
    results = multiprocessing.get_context("spawn").SimpleQueue()
    processes = spawn(_rank, (port, cases, arguments.rounds, results), nprocs=RANKS, join=False)
    measured = [results.get() for _ in cases]
    assert processes is not None
    while not processes.join():
        pass
    _print(measured)


def _rank(rank: int, port: int, cases: Any, rounds: int, results: Any) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), 120.0) as world:
        for rows, picked in cases:
            found = _measure(world, rows, picked, rounds)
            if world.is_first:
                results.put(found)
        world.meet()


def _measure(world: World, rows: int, picked: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(world.rank)
    table = nn.Parameter(torch.zeros(rows, WIDTH))
    row_R = torch.randperm(rows, generator=generator)[:picked].sort().values
    gradient = RowGradient(row_R, torch.randn(picked, WIDTH, generator=generator))
    seconds: dict[str, list[float]] = {"rows": [], "dense": []}
    sent: dict[str, int] = {}
    for number in range(1 + rounds):
        for kind in seconds:
            sparse = kind == "rows"
            table.grad = gradient.sparse(rows) if sparse else gradient.dense(rows)
            world.counts(0)  # both begin together
            before, began = _written(), time.perf_counter()
            exchange_rows(table, world)
            taken = time.perf_counter() - began
            sent[kind] = _written() - before
            slower = max(world.counts(round(taken * 1e9))) / 1e9
            if number:
                seconds[kind].append(slower)
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    said = 8 + sent_bytes(picked, table)
    return {"rows": rows, "picked": picked, "seconds": medians, "sent": sent, "said": said}


def _written() -> int:
    """Bytes that this process has written, to sockets too; 0 where the system does not count."""
    if not IO.exists():
        return 0
    return int(dict(line.split(": ") for line in IO.read_text().splitlines())["wchar"])


def _print(measured: list[dict[str, Any]]) -> None:
    lines, ratios = [], {}
    for found in measured:
        seconds, sent, said = found["seconds"], found["sent"], found["said"]
        dense_bytes = sent["dense"] or found["rows"] * WIDTH * 4
        name = f"{found['picked']}_of_{found['rows']}"
        ratios[f"bytes_{name}"] = (sent["rows"] or said) / dense_bytes
        ratios[f"time_{name}"] = seconds["rows"] / seconds["dense"]
        lines.append(
            [
                f"{found['picked']:,} of {found['rows']:,}",
                f"{said:,}",
                f"{sent['rows']:,}",
                f"{sent['dense']:,}",
                f"{ratios[f'bytes_{name}']:.3f}",
                f"{seconds['rows'] * 1e3:.1f}",
                f"{seconds['dense'] * 1e3:.1f}",
                f"{ratios[f'time_{name}']:.3f}",
            ]
        )
    print(f"{RANKS} ranks, gloo, CPU; width {WIDTH}, float32; per rank and step")
    columns = (
        "picked", "bytes said", "rows", "dense", "ratio", "ms rows", "ms dense", "ratio",
    )  # fmt: skip
    print(table_text(columns, lines))
    print(json.dumps({name: round(ratio, 4) for name, ratio in ratios.items()}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="some seconds")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
