"""Labelled places where a process can be made to die or to fail: tests show what is left.

`FAULT_AT=<label>` in the environment kills the process (SIGKILL) when it first passes that place;
`FAULT_AT=<label>:<n>` when it does for the n-th time; `FAULT_AT=<label>:<n>:<errno name>`, as
`checkpoint.write:2:ENOSPC`, raises that OSError there, then and ever after. Without the variable a
place costs a look into the environment.
"""

import errno
import os
import signal
from collections.abc import Iterator
from functools import cache
from itertools import count

VARIABLE = "FAULT_AT"


def fault_point(label: str) -> None:
    """Die or fail here if `FAULT_AT` says so.

    Raises:
        OSError: the variable names an error for this label.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    name, _, rest = wanted.partition(":")
    if name != label:
        return
    number, _, kind = rest.partition(":")
    visit = next(_visits(label))
    if visit < int(number or 1):
        return
    if kind:
        code = getattr(errno, kind)
        raise OSError(code, os.strerror(code), label)
    os.kill(os.getpid(), signal.SIGKILL)


@cache
def _visits(label: str) -> Iterator[int]:
    """Counts the visits of one label in this process."""
    del label
    return count(1)
