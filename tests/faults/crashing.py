"""`peer-train` that fails where it is told to: python crashing.py WHERE ARGUMENTS."""

import netrc
import os
import sys

from peer_scaling import attempt, errors, memory, track, train

WHERE = sys.argv.pop(1)


def crash(*arguments, **named):
    environment, hosts = dict(os.environ), netrc.netrc().hosts
    raise RuntimeError(f"request failed: {environment} {hosts}")


if WHERE == "training":
    attempt.train = crash
elif WHERE == "planning":
    memory.plan_run = crash
elif WHERE == "tracker":
    track.WandbTracker = crash
elif WHERE == "unprotected":
    attempt.train = crash
    attempt.without_secrets = errors.without_secrets = lambda text: text
track.INIT_TIMEOUT_SECONDS = 1.0
train.main()
