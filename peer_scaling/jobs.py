"""What a sweeper hands to a launcher, and what it gets back: one cell of a study, to be run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher


@dataclass(frozen=True)
class CellJob:
    """A cell that is to be run."""

    overrides: tuple[str, ...]
    """What makes Hydra compose its configuration from the study's."""
    name: str
    """Variant, size, budget and seed, for people."""
    run_id: str
    folder: Path
    """Of the run: success means that it holds a record."""
    flops: float
    """Training FLOPs."""
    state_bytes: int
    """Memory for parameters, moments and gradients: what the run needs at least."""
    fields: Mapping[str, Any]
    """The fields of its record that are known before it runs."""
    command: str
    """Runs it again, alone."""


@dataclass(frozen=True)
class CellResult:
    """How the process of a cell ended; what became of the run is in its folder."""

    job: CellJob
    exit_code: int
    """Of `errors`; negative: the signal that ended the process."""


class CellLauncher(Launcher, ABC):
    """A launcher that knows cells, and not only their overrides."""

    @abstractmethod
    def launch_cells(self, jobs: Sequence[CellJob]) -> list[CellResult]:
        """Run all jobs; one result per job, in their order."""


class CellSubmitter(Launcher, ABC):
    """A launcher that hands cells to somebody else's queue and does not wait for them."""

    @abstractmethod
    def submit_cells(self, jobs: Sequence[CellJob]) -> None:
        """Hand over all jobs that are not there already."""
