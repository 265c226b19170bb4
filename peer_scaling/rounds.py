"""The rounds of a study that chooses its own sizes: from records to decisions to cells."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from peer_scaling.adaptive import history
from peer_scaling.candidates import Action, Adaptive, Candidate, Decision, Key, Observation
from peer_scaling.cells import StudyCell
from peer_scaling.durable import replace_text
from peer_scaling.plan import Study, enumerate_cells
from peer_scaling.record import DECISIONS, budget_label
from peer_scaling.study_cells import CellPlanner


@dataclass(frozen=True)
class Round:
    """What is decided on all records so far."""

    folder: Path
    """Of the study."""
    decisions: tuple[Decision, ...]
    """From the first round on."""
    cells: tuple[StudyCell, ...]
    """Those that this round asks for; none if the study has ended."""
    earlier: tuple[StudyCell, ...]
    """Those of the rounds before."""
    dry_run: bool

    @property
    def is_open(self) -> bool:
        """Whether one of its cells is still to be run."""
        return any(cell.to_run for cell in self.cells)

    def text(self) -> str:
        """What this round asks for; or, in the end, how every curve ended."""
        own = [d for d in self.decisions if d.round == self.decisions[-1].round]
        if not self.cells:
            return "\n".join(["nothing more is chosen:", *self.endings()])
        actions = Counter(str(d.action) for d in own if d.key)
        counts = ", ".join(f"{count} {action}" for action, count in actions.items())
        return f"round {own[0].round}: {counts}; {DECISIONS} says why"

    def endings(self) -> list[str]:
        """How every curve ended, a line each: as a whole, not of single sizes."""
        return [
            f"{d.variant} at {budget_label(d.budget)}: {d.reason}"
            for d in self.decisions
            if d.action is Action.STOP or (d.action is Action.DROP and d.round == 1 and not d.size)
        ]

    def write_decisions(self) -> None:
        """Write all decisions beside the runs, a line each: what they follow from is the records,
        so another launcher of the study writes the same.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = (decision.line() for decision in self.decisions)
        replace_text(self.folder / DECISIONS, "".join(lines))


def rounds(config: Adaptive, study: Study, planner: CellPlanner) -> Iterator[Round]:
    """Round after round; whoever iterates runs what one asks for before taking the next.

    The last one asks for nothing.

    Raises:
        UserError: a candidate's configuration is wrong.
    """
    cells = {(c.variant, c.budget, c.size): c for c in enumerate_cells(study)}
    possible = planner.plan(list(cells.values()), may_stream=False)
    candidates = [_candidate(cell) for cell in possible]
    run = possible[0].run
    seen: dict[Key, Observation] = {}
    earlier: tuple[StudyCell, ...] = ()
    while True:
        decisions = history(config, candidates, list(seen.values()))
        keys = [d.key for d in decisions if d.key and d.key not in seen]
        asked = [replace(cells[key[:3]], seed=key[3]) for key in keys]
        planned = planner.plan(asked) if asked else []
        yield Round(run.study_folder, decisions, tuple(planned), earlier, run.settings.dry_run)
        if not keys:
            return
        ended = tuple(cell.as_it_is_now() for cell in planned)
        seen |= {key: _observation(key, cell) for key, cell in zip(keys, ended, strict=True)}
        earlier += ended


def _candidate(cell: StudyCell) -> Candidate:
    """N is of active parameters: those of a sparse layer's table hardly change along a ladder."""
    cost, budget = cell.run.cost(), cell.cell.budget
    plan = cell.planned and cell.planned.plan
    tokens = plan.tokens if plan else budget / cost.flops_per_token
    return Candidate(
        variant=cell.cell.variant,
        budget=budget,
        size=cell.cell.size,
        num_params=cost.num_params_active,
        tokens_per_param=tokens / cost.num_params_active,
        flops=plan.flops if plan else budget,
        problem=None if plan or cell.record is None else cell.record.reason,
    )


def _observation(key: Key, cell: StudyCell) -> Observation:
    """A run that failed counts as one without a loss until the next launch tries it again."""
    record = cell.record
    return Observation(*key, record.loss if record and record.status == "done" else None)
