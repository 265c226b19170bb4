"""A pool of processes on this machine: one process per run, so that what ends one ends one only.

Processes are forked from a server that has imported everything and started nothing, in some 20 ms
each; a run has its own CUDA context, threads and memory. What became of a run is in its folder.
"""

import heapq
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import final

from peer_scaling.board import Board, LineBoard
from peer_scaling.errors import EXIT_FAILED
from peer_scaling.tally import Earlier, Tally
from peer_scaling.worker import run_piece

PRELOADED = ("peer_scaling.train", "torch._dynamo", "torch._inductor.config")
"""The last two are PyTorch's compiler, which nobody uses and every optimiser imports when it is
made: 1.3 s of each run, once for all."""
LOOK_SECONDS = 0.5
"""Between looks for runs without a sign of life."""


class Work(ABC):
    """What a pool is to do; `number` counts its pieces from 0."""

    def __init__(self, calls: Sequence[Callable[[], int]]) -> None:
        """`calls` are picklable; each returns its exit code."""
        self.calls = calls
        self.exit_codes = [EXIT_FAILED] * len(calls)
        """As far as the pieces have ended for good."""

    @property
    def stopped(self) -> bool:
        """Whether no further piece is to be started; those that run end as they would."""
        return False

    @abstractmethod
    def ended(self, number: int, exit_code: int, error: str, hung: bool) -> float | None:
        """Told when a piece ended; the seconds after which it is to be started again, or None."""

    def name(self, number: int) -> str:
        """For people."""
        return f"job {number}"

    def flops(self, number: int) -> float:
        """That it takes; 0 if nothing is known of it."""
        del number
        return 0.0

    def earlier(self) -> Earlier:
        """What there is of the same study beside the pieces."""
        return Earlier()

    def ready(self, number: int) -> bool:
        """Whether a piece can be started now: asked again a little later if not."""
        del number
        return True

    def memory(self, number: int) -> int:
        """Bytes of its device's memory that it needs at least."""
        del number
        return 0

    def alone(self, number: int) -> bool:
        """Whether it is to run while no other does: one that the system killed for its memory. Such
        pieces wait until nothing else can be started, so that no slot is idle for them before.
        """
        del number
        return False

    def hangs(self, number: int, pid: int) -> bool:
        """Whether it has given no sign of life for too long."""
        del number, pid
        return False


@dataclass(frozen=True)
class Slot:
    """What one run at a time may use."""

    environment: dict[str, str] = field(default_factory=dict)
    """As CUDA_VISIBLE_DEVICES, set before anything of the run is there."""
    device: str = "cpu"
    """Slots of one device share its memory."""
    memory: int | None = None
    """Bytes that runs on the device may need together, if that is known."""


@dataclass
class _Running:
    number: int
    slot: Slot
    process: BaseProcess
    error: Connection
    output: Connection | None
    """What it prints, if that comes through a pipe."""
    printed: bytes = b""
    """Of its last line, which has no end yet."""
    hung: bool = False


def process_context() -> ForkServerContext:
    """Where processes come from."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


@final
class Pool:
    """Runs pieces of work side by side, the first ones first."""

    def __init__(self, slots: Sequence[Slot], retry_seconds: float = 2) -> None:
        """`retry_seconds`: between questions whether a piece is ready."""
        self._context = process_context()
        self._free, self._retry_seconds = list(slots), retry_seconds
        self._running: dict[int, _Running] = {}

    def run(self, work: Work, make_board: Callable[[Tally], Board] = LineBoard) -> None:
        """Do all pieces; in the end none is running, however this ends.

        Raises:
            KeyboardInterrupt: asked to stop; the runs were told to, and have saved.
        """
        waiting = [(0.0, number) for number in range(len(work.calls))]
        alive, held = self._context.Pipe(duplex=False)
        with make_board(self._tally(work)) as board:
            try:
                while waiting or self._running:
                    if work.stopped:
                        waiting.clear()
                    self._start(work, waiting, board, alive)
                    board.refresh()
                    self._collect(work, waiting, board)
            finally:
                held.close()  # tells those that still run to stop
                while self._running:
                    self._wait(board)
                    board.refresh()

    def _tally(self, work: Work) -> Tally:
        numbers = range(len(work.calls))
        names, flops = list(map(work.name, numbers)), list(map(work.flops, numbers))
        return Tally(names, flops, len(self._free), work.earlier())

    def _start(
        self, work: Work, waiting: list[tuple[float, int]], board: Board, alive: Connection
    ) -> None:
        later = []
        while waiting and self._free and waiting[0][0] <= time.monotonic():
            at, number = heapq.heappop(waiting)
            slot = self._slot(work, number)
            if not slot:
                later.append((at, number))
            elif not work.ready(number):
                later.append((time.monotonic() + self._retry_seconds, number))
            else:
                self._spawn(work.calls[number], number, slot, board.relays, alive)
                board.started(number)
        for entry in later:
            heapq.heappush(waiting, entry)

    def _slot(self, work: Work, number: int) -> Slot | None:
        """A free one on a device with room for the piece; the one with the fewest runs beside."""
        others = self._running.values()
        if others and (work.alone(number) or any(work.alone(other.number) for other in others)):
            return None
        rooms = []
        for slot in self._free:
            beside = [other.number for other in others if other.slot.device == slot.device]
            needed = sum(map(work.memory, beside), work.memory(number))
            # For one by itself there always is room: that was checked before.
            if not beside or slot.memory is None or needed <= slot.memory:
                rooms.append((len(beside), slot))
        return min(rooms, key=lambda room: room[0])[1] if rooms else None

    def _spawn(
        self, call: Callable[[], int], number: int, slot: Slot, relays: bool, alive: Connection
    ) -> None:
        self._free.remove(slot)
        receiver, sender = self._context.Pipe(duplex=False)
        output = self._context.Pipe(duplex=False) if relays else None
        arguments = (call, alive, sender, output, slot.environment)
        process = self._context.Process(target=run_piece, args=arguments)
        process.start()
        sender.close()
        if output:
            output[1].close()
        running = _Running(number, slot, process, receiver, output and output[0])
        self._running[process.sentinel] = running

    def _collect(self, work: Work, waiting: list[tuple[float, int]], board: Board) -> None:
        if not self._running:
            if waiting:
                time.sleep(max(0.0, min(waiting[0][0] - time.monotonic(), LOOK_SECONDS)))
            return
        ended = self._wait(board)
        for running in self._running.values():
            pid = running.process.pid
            if not running.hung and pid and work.hangs(running.number, pid):
                running.hung = True
                running.process.kill()
        for running in ended:
            self._free.append(running.slot)
            code = running.process.exitcode or 0
            delay = work.ended(running.number, code, _text(running.error), running.hung)
            board.ended(running.number, work.exit_codes[running.number] if delay is None else None)
            if delay is not None:
                heapq.heappush(waiting, (time.monotonic() + delay, running.number))

    def _wait(self, board: Board) -> list[_Running]:
        """Those that have ended, of which nothing is left; waits for one, or for something that one
        prints, but not for long.
        """
        outputs = [running.output for running in self._running.values() if running.output]
        came = wait([*self._running, *outputs], timeout=LOOK_SECONDS)
        ended = [running for key, running in self._running.items() if key in came]
        for running in self._running.values():
            _relay(running, board, last=running in ended)
        for running in ended:
            running.process.join()
            del self._running[running.process.sentinel]
        return ended


def _relay(running: _Running, board: Board, last: bool) -> None:
    """Show the lines that a process has printed; its last one even without an end."""
    output = running.output
    while output and output.poll():
        data = os.read(output.fileno(), 1 << 16)
        if not data:
            break
        *lines, running.printed = (running.printed + data).split(b"\n")
        for line in lines:
            board.line(running.number, line.decode(errors="replace"))
    if output and last:
        output.close()
        if running.printed:
            board.line(running.number, running.printed.decode(errors="replace"))


def _text(connection: Connection) -> str:
    with connection:
        try:
            return str(connection.recv_bytes().decode()) if connection.poll() else ""
        except EOFError:
            return ""
