"""Errors that a user can cause, and the exit codes of the commands."""

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


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says, as far as a one-line message has room for it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check(problems: list[str]) -> None:
    """Raise one ValueError with a line per problem, if there is any."""
    if problems:
        raise ValueError("\n".join(problems))
