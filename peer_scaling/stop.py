"""Signals that ask a run to stop: they set a flag, and the run stops where it can be continued."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, final

from peer_scaling.errors import EXIT_INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm's time limit and preemption, a terminal, and what clusters are set up to send first."""


class StoppedError(KeyboardInterrupt):
    """The run was asked to stop and can be continued: nothing is wrong with it, and whoever would
    go on with another one must stop too.
    """


LOST = 1 << 16
"""Stands for a lost claim among the numbers of signals."""


class LostRunError(Exception):
    """The run is another process's by now: nothing of it may be saved or published from here."""


@final
class StopFlag:
    """Inside this context the signals set a flag; a second SIGINT leaves at once.

    What handled a signal before is called by `chain`, after the run has saved what it has: Slurm
    plug-ins (submitit) requeue a job from their handler and end the process there.
    """

    def __init__(
        self, largest: Callable[[int], int] = int, lost: Callable[[], bool] = bool
    ) -> None:
        """`largest` makes one number of those of all processes that train the run; `lost` says
        whether this one may no longer train it.
        """
        self.signal: signal.Signals | None = None
        """The first one that came to this process."""
        self._largest, self._lost, self._agreed = largest, lost, 0
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._previous = {s: signal.signal(s, self._set) for s in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: set by something that is not Python, and cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def poll(self) -> bool:
        """Whether the run is to stop: a signal came to any of its processes, or it is lost."""
        own = LOST if self._lost() else self.signal or 0
        self._agreed = self._agreed or self._largest(own)
        return bool(self._agreed)

    def check(self) -> None:
        """Raise if the run is to stop.

        Raises:
            StoppedError: a signal asked for it.
            LostRunError: it is another process's.
        """
        if self.poll():
            if self._agreed == LOST:
                raise LostRunError("the run's claim was lost")
            raise StoppedError(f"stopped by {signal.Signals(self._agreed).name}")

    def chain(self) -> None:
        """Call what would have handled the signal that came, unless it is Python's own default."""
        handler = self._previous.get(self.signal) if self.signal else None
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.signal, None)

    def _set(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(EXIT_INTERRUPTED)
        self.signal = self.signal or signal.Signals(number)
