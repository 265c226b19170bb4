"""How a study goes, while a launcher works on it: a view on a terminal, some lines elsewhere."""

import sys
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import final

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from peer_scaling.display import seconds_text
from peer_scaling.tally import Tally

LINE_SECONDS = 60.0
"""Between lines with the counts, where there is no terminal."""
REFRESH_SECONDS = 0.25
MAX_ROWS = 12
"""Running cells that the view shows, of which there may be many more."""


class Board(ABC):
    """Where a launcher shows how it goes."""

    relays = False
    """Whether what the cells' processes print comes through `line`."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.started, self.ended = tally.started, tally.ended

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Show how it ended."""
        self.close()

    def close(self) -> None:
        """The launch is over."""
        self.refresh()

    def line(self, number: int, text: str) -> None:
        """Show what a cell's process printed."""
        del number
        print(text, flush=True)

    @abstractmethod
    def refresh(self) -> None:
        """Show how it goes now; called twice a second or more."""


def make_board(tally: Tally) -> Board:
    """A view if standard output is a terminal."""
    console = Console(file=sys.stdout)
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalBoard(tally, console)
    return LineBoard(tally)


@final
class LineBoard(Board):
    """A line with the counts now and then, if they changed; the processes print lines of theirs."""

    def __init__(self, tally: Tally, seconds: float = LINE_SECONDS) -> None:
        super().__init__(tally)
        self._seconds, self._next = seconds, time.monotonic() + seconds
        self._shown = self._changing()

    def refresh(self) -> None:
        """Print, if it is time."""
        if time.monotonic() >= self._next and self._changing() != self._shown:
            self._next, self._shown = time.monotonic() + self._seconds, self._changing()
            print(self.tally.text(), flush=True)

    def _changing(self) -> tuple[float, int]:
        return self.tally.flops[0], sum(self.tally.counts.values()) - self.tally.counts["left"]


@final
class TerminalBoard(Board):
    """A bar, the counts and the running cells below the lines that everybody prints."""

    relays = True

    def __init__(self, tally: Tally, console: Console) -> None:
        super().__init__(tally)
        # What this process prints goes above the view as well.
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next = 0.0

    def __enter__(self) -> "TerminalBoard":
        """Show it."""
        self._live.start()
        return self

    def close(self) -> None:
        """Take it away."""
        self._live.stop()

    def line(self, number: int, text: str) -> None:
        """Above the view; with the cell's name, where a process says less than that."""
        name = self.tally.names[number]
        shown = Text.from_ansi(text)
        if name not in shown.plain:
            shown = Text(f"{name}: ", style="dim") + shown
        self._live.console.print(shown, soft_wrap=True)

    def refresh(self) -> None:
        """Draw it, a few times a second at most."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + REFRESH_SECONDS
            self._live.update(self._view(), refresh=True)

    def _view(self) -> Group:
        counts, ages = self.tally.counts, self.tally.ages
        total = sum(counts.values())
        bar = Table.grid(expand=True)  # which ends its line
        bar.add_row(ProgressBar(total=total, completed=total - counts["left"] - counts["running"]))
        rows = Table.grid(padding=(0, 2))
        for name, age in ages[:MAX_ROWS]:
            rows.add_row(" running", Text(name), seconds_text(age))
        if len(ages) > MAX_ROWS:
            rows.add_row("", f"and {len(ages) - MAX_ROWS} more", "")
        return Group(bar, Text(self.tally.text()), rows)
