"""A process of a pool, from its start to its end."""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection

from peer_scaling.errors import EXIT_FAILED, EXIT_REQUEUE, first_line, traceback_text

GRACE_SECONDS = 120.0
"""For a process whose launcher is gone: to save its run and close its tracker."""


def run_piece(
    call: Callable[[], int],
    alive: Connection,
    error: Connection,
    output: tuple[Connection, Connection] | None,
    environment: Mapping[str, str],
) -> None:
    """Do a piece of work, then end this process with its exit code.

    Args:
        call: the work.
        alive: at its end when the launcher stops or is gone.
        error: takes the text of an exception that `call` raised.
        output: both ends of a pipe for what is printed; None leaves that as it is.
        environment: set before anything else.
    """
    os.environ.update(environment)
    if output:
        _print_to(output[1])
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


def _print_to(pipe: Connection) -> None:
    """The caller keeps the pipe's reading end open, so that printing fails nothing when the
    launcher is gone.
    """
    for stream in (sys.stdout, sys.stderr):
        os.dup2(pipe.fileno(), stream.fileno())
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _follow(alive: Connection) -> None:
    """End this process when the other end of the pipe is closed: a run saves first."""
    with suppress(EOFError):
        alive.recv_bytes()
    # Not SIGINT, which a terminal has sent already: the second one leaves a run at once.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(EXIT_REQUEUE)
