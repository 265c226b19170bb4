"""How much of a fault is injected: a sample in `make test`, all of it in `make faults`."""

import os

FULL = "full"


def count(quick: int, full: int) -> int:
    """`full` if PEER_SCALING_FAULTS=full, else `quick`."""
    return full if os.environ.get("PEER_SCALING_FAULTS") == FULL else quick
