"""Starts runs in processes of their own within milliseconds: imports once, then forks for each.

Reads a job a line (JSON) from standard input: arguments of `peer-train`, a log file, injectors with
their arguments, and when to send which signal. Answers with the exit code, negative for a signal.
The parent starts no thread, so that a fork of it is as good as a new process.
"""

import json
import os
import signal
import sys
import time
import traceback

import pytest
import torch
import torch._dynamo
import torch._inductor  # optimisers and determinism import both at first use, for two seconds

import injectors
from peer_scaling.train import main as peer_train


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        began = time.perf_counter()
        child = os.fork()
        if not child:
            become(job)
        status = supervise(child, job["signals"])
        answer = {"code": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - began}
        print(json.dumps(answer), flush=True)


def supervise(child, signals):
    """Send each [seconds after the start, number]; the child's status when it has ended."""
    began = time.perf_counter()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        while signals and time.perf_counter() - began >= signals[0][0]:
            os.kill(child, signals.pop(0)[1])
        time.sleep(0.001)


def become(job):
    """The command, with its output in the log; never returns."""
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
