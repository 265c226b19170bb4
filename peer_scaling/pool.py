"""A pool of processes on this machine: one process per run, so that what ends one ends one only.

Processes are forked from a server that has imported everything and started nothing, in some 20 ms
each; a run has its own CUDA context, threads and memory. What became of a run is in its folder.
"""

import heapq
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, final

from peer_scaling.errors import EXIT_FAILED, EXIT_REQUEUE, first_line, traceback_text

PRELOADED = ("peer_scaling.train", "torch._dynamo")
"""The second one is what PyTorch imports when a run begins, for more than a second in each."""
GRACE_SECONDS = 120.0
"""For a process whose launcher is gone: to save its run and close its tracker."""
LOOK_SECONDS = 0.5
"""Between looks for runs without a sign of life."""


class Work(ABC):
    """What a pool is to do; `number` counts its pieces from 0."""

    def __init__(self, calls: Sequence[Callable[[], int]]) -> None:
        """`calls` are picklable; each returns its exit code."""
        self.calls = calls
        self.exit_codes = [EXIT_FAILED] * len(calls)
        """As far as the pieces have ended for good."""

    @abstractmethod
    def ended(self, number: int, exit_code: int, error: str, hung: bool) -> float | None:
        """Told when a piece ended; the seconds after which it is to be started again, or None."""

    def ready(self, number: int) -> bool:
        """Whether a piece can be started now: asked again a little later if not."""
        del number
        return True

    def memory(self, number: int) -> int:
        """Bytes that it needs at least."""
        del number
        return 0

    def hangs(self, number: int, pid: int) -> bool:
        """Whether it has given no sign of life for too long."""
        del number, pid
        return False


@dataclass(frozen=True)
class Slot:
    """What one run at a time may use."""

    environment: dict[str, str] = field(default_factory=dict)
    """As CUDA_VISIBLE_DEVICES, set before anything of the run is there."""


@dataclass
class _Running:
    number: int
    slot: Slot
    process: BaseProcess
    error: Connection
    hung: bool = False


@final
class Pool:
    """Runs pieces of work side by side, the first ones first."""

    def __init__(self, slots: Sequence[Slot], memory: int | None, retry_seconds: float = 2) -> None:
        """`memory`: bytes that the runs may need together, if that is known."""
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        self._slots, self._memory, self._retry_seconds = list(slots), memory, retry_seconds
        self._running: dict[int, _Running] = {}

    def run(self, work: Work, progress: Callable[[], Any] = int) -> None:
        """Do all pieces; in the end none is running, however this ends. `progress` is called when
        one has ended for good.

        Raises:
            KeyboardInterrupt: asked to stop; the runs were told to, and have saved.
        """
        waiting = [(0.0, number) for number in range(len(work.calls))]
        alive, held = self._context.Pipe(duplex=False)
        try:
            while waiting or self._running:
                self._start(work, waiting, alive)
                self._collect(work, waiting, progress)
        finally:
            held.close()  # tells those that still run to stop
            for running in self._running.values():
                running.process.join()

    def _start(self, work: Work, waiting: list[tuple[float, int]], alive: Connection) -> None:
        later = []
        while waiting and self._slots and waiting[0][0] <= time.monotonic():
            at, number = heapq.heappop(waiting)
            if not self._fits(work, number):
                later.append((at, number))
            elif not work.ready(number):
                later.append((time.monotonic() + self._retry_seconds, number))
            else:
                self._spawn(work, number, alive)
        for entry in later:
            heapq.heappush(waiting, entry)

    def _fits(self, work: Work, number: int) -> bool:
        """Whether there is memory; for one alone there always is, it was checked before."""
        if self._memory is None or not self._running:
            return True
        used = sum(work.memory(running.number) for running in self._running.values())
        return used + work.memory(number) <= self._memory

    def _spawn(self, work: Work, number: int, alive: Connection) -> None:
        slot = self._slots.pop()
        receiver, sender = self._context.Pipe(duplex=False)
        arguments = (work.calls[number], alive, sender, slot.environment)
        process = self._context.Process(target=_run, args=arguments)
        process.start()
        sender.close()
        self._running[process.sentinel] = _Running(number, slot, process, receiver)

    def _collect(
        self, work: Work, waiting: list[tuple[float, int]], progress: Callable[[], Any]
    ) -> None:
        if not self._running:
            if waiting:
                time.sleep(max(0.0, min(waiting[0][0] - time.monotonic(), LOOK_SECONDS)))
            return
        ended = wait(list(self._running), timeout=LOOK_SECONDS)
        for running in self._running.values():
            pid = running.process.pid
            if not running.hung and pid and work.hangs(running.number, pid):
                running.hung = True
                running.process.kill()
        for sentinel in ended:
            running = self._running.pop(sentinel)  # pyright: ignore[reportArgumentType]
            self._slots.append(running.slot)
            running.process.join()
            code = running.process.exitcode or 0
            delay = work.ended(running.number, code, _text(running.error), running.hung)
            if delay is None:
                progress()
            else:
                heapq.heappush(waiting, (time.monotonic() + delay, running.number))


def _text(connection: Connection) -> str:
    with connection:
        try:
            return str(connection.recv_bytes().decode()) if connection.poll() else ""
        except EOFError:
            return ""


def _run(
    call: Callable[[], int], alive: Connection, error: Connection, environment: dict[str, str]
) -> None:
    """In the new process: the piece, then the end."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_REQUEUE))  # quietly
    threading.Thread(target=_follow, args=(alive,), daemon=True).start()
    try:
        code = call()
    except KeyboardInterrupt:
        code = EXIT_REQUEUE
    except Exception as problem:
        print(traceback_text(problem), end="", flush=True)
        error.send_bytes(f"{type(problem).__name__}: {first_line(problem)}".encode())
        code = EXIT_FAILED
    raise SystemExit(code)


def _follow(alive: Connection) -> None:
    """End this process when the other end of the pipe is closed: a run saves first."""
    with suppress(EOFError):
        alive.recv_bytes()
    # Not SIGINT, which a terminal has sent already: the second one leaves a run at once.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(EXIT_REQUEUE)
