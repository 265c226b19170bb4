"""Errors that a user can cause, the text of others' errors, and the exit codes of the commands."""

import netrc
import os
import re
import traceback
from collections.abc import Sequence
from contextlib import suppress

EXIT_DONE = 0
EXIT_FAILED = 1
"""Something failed, or a study has cells without a result."""
EXIT_USAGE = 2
"""The configuration cannot be run as given."""
EXIT_DIVERGED = 3
EXIT_OUT_OF_MEMORY = 4
EXIT_REQUEUE = 75
"""Stopped by a signal, saved; the same command continues (EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 130
"""A second interrupt: left at once, nothing saved since the last checkpoint."""


class UserError(Exception):
    """Problems that the user can solve, one line each: the value, the limit, the next step."""

    exit_code = EXIT_USAGE

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class StudyIncompleteError(UserError):
    """A study ended with cells that have no result."""

    exit_code = EXIT_FAILED

    def __init__(self, *problems: str, details: str = "") -> None:
        """`details`: a table, shown as it is."""
        super().__init__(*problems)
        self.details = details

    def __str__(self) -> str:
        return "\n".join([self.details, *self.problems])


SECRET_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASS|PASSWD|PASSWORD|CREDENTIALS?)(_ID)?$", re.I)
"""Ends of the names of environment variables whose values must not be written anywhere."""
MIN_SECRET_LENGTH = 6
"""Shorter values are no secrets, and would be found in texts that have nothing to do with them."""
MAX_SHOWN = 300
"""Characters of somebody else's text that a one-line message has room for."""


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says, as far as a one-line message has room for it."""
    lines = without_secrets(str(error)).strip().splitlines() or [type(error).__name__]
    return shown(lines[0])


def shown(value: object) -> str:
    """A value for a one-line message: on one line, and cut where it is long."""
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text):,} characters)"


def traceback_text(error: BaseException) -> str:
    """The traceback of an exception for the screen or a file, without secrets."""
    return without_secrets("".join(traceback.format_exception(error)))


def without_secrets(text: str) -> str:
    """`text` with `***` for the values of secret environment variables and netrc's passwords.

    For texts that are not ours: an exception may quote a request, or the whole environment.
    """
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets() -> set[str]:
    values = {value for name, value in os.environ.items() if SECRET_NAMES.search(name)}
    with suppress(OSError, netrc.NetrcParseError):
        values |= {password or "" for _, _, password in netrc.netrc().hosts.values()}
    return {value for value in values if len(value) >= MIN_SECRET_LENGTH}


def repeated(what: str, values: Sequence[object]) -> list[str]:
    """A line for each value that occurs more than once."""
    twice = dict.fromkeys(value for value in values if values.count(value) > 1)
    return [f"{what} {value} occurs twice" for value in twice]


def check(problems: list[str]) -> None:
    """Raise one ValueError with a line per problem, if there is any."""
    if problems:
        raise ValueError("\n".join(problems))
