"""Processes that train runs together, for tests: `start` in the test, the rest in each process.

    python ranks.py <folder> <cases as JSON>

A case is {"name", "ffw", "options"} and may have "signal": [rank, step], "without": what is left
out (a positive control), "fail": [rank, step]. Each process writes what it saw to
`<folder>/<name>.<rank>.json` and `.npy`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from peer_scaling import parallel
from peer_scaling.data import TrainingBatches
from peer_scaling.distributed import joined
from peer_scaling.ffw.base import FFW
from peer_scaling.ffw.moe import MoEFFW
from peer_scaling.step import Stepper
from peer_scaling.stop import StoppedError
from peer_scaling.train import run_once
from planned_runs import make_planned

IO = Path("/proc/self/io")


def start(folder, cases, size=2, timeout=120):
    """Run cases in `size` processes; their exit codes and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    workers = []
    for rank in range(size):
        own = where | {"MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        env = os.environ | {name: str(value) for name, value in own.items()}
        command = [sys.executable, __file__, str(folder), json.dumps(cases)]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        workers.append(subprocess.Popen(command, env=env, **pipe))
    try:
        outputs = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], outputs


def seen(folder, name, rank=0):
    """What a rank saw of a case."""
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def tokens(folder, name, rank):
    """What a rank read in training, (steps, sequences, T + 1)."""
    return np.load(folder / f"{name}.{rank}.npy")


def main():
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), 30.0) as world:
        for case in cases:
            with pytest.MonkeyPatch.context() as patch:
                _train(folder, case, world, patch)


def _train(folder, case, world, patch):
    ledger, sent, losses = [], [], []
    _watch(patch, case, world, ledger, sent, losses)
    runs = folder / case.get("runs", case["name"])
    planned = make_planned(runs, *case["options"], ffw=case["ffw"])
    facts = {"folder": str(planned.folder)}
    try:
        record = run_once(planned, world)
        facts |= {name: getattr(record, name) for name in ("status", "reason", "failure")}
        facts |= {"digest": record.state_digest, "loss": record.loss}
        facts |= {"usage": record.expert_usage, "environment": dict(record.environment)}
    except StoppedError as error:
        facts |= {"status": "stopped", "reason": str(error)}
    facts |= {"losses": torch.stack(losses).tolist(), "sent": sent}
    (folder / f"{case['name']}.{world.rank}.json").write_text(json.dumps(facts))
    np.save(folder / f"{case['name']}.{world.rank}.npy", np.stack(ledger))
    if "fail" in case:
        sys.exit(1)


def _watch(patch, case, world, ledger, sent, losses):
    """Put the case's faults in, and record what is read, sent and reported."""
    step, batch, exchange = Stepper.step, TrainingBatches.batch, parallel.exchange_rows

    def watched_step(self, tokens, factor):
        if case.get("signal") == [world.rank, len(losses) + 1]:
            signal.raise_signal(signal.SIGTERM)
        if case.get("fail") == [world.rank, len(losses) + 1]:
            raise MemoryError("no room on this rank")
        result = step(self, tokens, factor)
        losses.append(result.loss)
        return result

    def watched_batch(self, number):
        ledger.append(batch(self, number))
        return ledger[-1]

    def watched_exchange(table, world):
        rows = max(world.counts(table.grad.coalesce().indices().shape[1]))
        distributed.barrier()
        before = _written()
        exchange(table, world)
        sent.append([rows, table.shape[1], _written() - before])

    patch.setattr(Stepper, "step", watched_step)
    patch.setattr(TrainingBatches, "batch", watched_batch)
    if case.get("measure") and IO.exists():
        patch.setattr(parallel, "exchange_rows", watched_exchange)
    if case.get("without") == "exchange":
        patch.setattr(parallel, "exchange_rows", lambda table, world: None)
    if case.get("without") == "spread":
        patch.setattr(MoEFFW, "spread", FFW.spread)


def _written():
    """Bytes that this process has written, to sockets too."""
    lines = dict(line.split(": ") for line in IO.read_text().splitlines())
    return int(lines["wchar"])


if __name__ == "__main__":
    main()
