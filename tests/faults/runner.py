"""Starts runs in processes of their own within milliseconds: imports once, then forks for each.

Reads a job a line (JSON) from standard input: arguments of `peer-train`, a log file, injectors with
their arguments, and when to send which signal. Answers with the exit code, negative for a signal.
The parent starts no thread, so that a fork of it is as good as a new process.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._inductor  # optimisers and determinism import both at first use, for two seconds

import injectors
from peer_scaling.train import main as peer_train

BEGUN = re.compile(rb": (fresh|resumed from step)")


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        Path(job["log"]).unlink(missing_ok=True)
        child = os.fork()
        if not child:
            become(job)
        print(json.dumps(supervise(child, **job)), flush=True)


def supervise(child, log, signals, when_begun, **_):
    """Send each [seconds, number], counted from the start of the process or, `when_begun`, from
    when the run says how it begins; how the process ended.
    """
    started = time.perf_counter()
    begun = None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        now = time.perf_counter()
        if ended:
            return {"code": os.waitstatus_to_exitcode(status)}
        if begun is None and BEGUN.search(Path(log).read_bytes() if os.path.exists(log) else b""):
            begun = now
        since = begun if when_begun else started
        while signals and since and now - since >= signals[0][0]:
            os.kill(child, signals.pop(0)[1])
        time.sleep(0.001)


def become(job):
    """The command, with its output in the log; never returns."""
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        os.environ |= job["environment"]
        patch = pytest.MonkeyPatch()
        for name, *arguments in job["inject"]:
            getattr(injectors, name)(patch, *arguments)
        sys.argv = ["peer-train", *job["arguments"]]
        peer_train()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
