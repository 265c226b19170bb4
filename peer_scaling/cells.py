"""The cells of a study with what became of them: as a table, and as `plan.csv`."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peer_scaling.display import PLAN_COLUMNS, plan_row, seconds_text, table_text
from peer_scaling.durable import replace_text
from peer_scaling.errors import UserError
from peer_scaling.estimate import Estimator
from peer_scaling.plan import Cell
from peer_scaling.plan_file import PLAN_HEADER, read_plan
from peer_scaling.planned import PlannedRun
from peer_scaling.record import PLAN, RECORD, RunRecord, budget_label, find_record
from peer_scaling.run import Run


@dataclass(frozen=True)
class StudyCell:
    """A cell of the study with what became of planning it."""

    cell: Cell
    run: Run
    planned: PlannedRun | None
    """None if the plan refused the cell."""
    record: RunRecord | None
    """Of an earlier attempt, or of the refusal."""
    refusal_id: str
    """Name of the folder that holds the record of its refusal, if it is refused."""

    @property
    def state(self) -> str:
        """The record's status; `missing` without one."""
        return self.record.status if self.record else "missing"

    @property
    def to_run(self) -> bool:
        """Whether a launch trains this cell."""
        return self.planned is not None and not (self.record and self.record.is_final)

    def as_it_is_now(self) -> "StudyCell":
        """The cell with the record that its run has by now."""
        return replace(self, record=find_record(self.planned.folder)) if self.planned else self


def summary_line(cells: Sequence[StudyCell]) -> str:
    """How many cells are in which state, the FLOPs that are still to spend, and repeated data."""
    states = [cell.state for cell in cells]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    flops = sum(cell.run.settings.budget for cell in cells if cell.to_run)
    left = f"; {budget_label(float(f'{flops:.3g}'))} FLOPs to go" if flops else ""
    epochs = max((c.planned.epochs or 0.0 for c in cells if c.planned), default=0.0)
    repeats = f"; up to {epochs:.2f} epochs of the data" if epochs > 1 else ""
    study = cells[0].run.settings.study
    return f"{study}: {len(cells)} cells, {', '.join(counts)}{left}{repeats}"


def plan_text(cells: Sequence[StudyCell]) -> str:
    """The study's plan as a table, refused cells with their reasons, and the totals."""
    estimator = Estimator()
    rows, refused, total = [], [], 0.0
    for cell in cells:
        if cell.planned is None:
            refused.append(
                f"{' '.join(cell.cell.overrides())}: {cell.record and cell.record.reason}"
            )
            continue
        seconds = estimator.seconds(cell.planned)
        total += seconds if cell.to_run else 0.0
        rows.append(plan_row(cell.planned, cell.state, seconds))
    lines = [table_text(PLAN_COLUMNS, rows), *refused, summary_line(cells)]
    return "\n".join([*lines, f"about {seconds_text(total)} of computing for what is missing"])


def write_plan(cells: Sequence[StudyCell], folder: Path, *, keep_missing: bool) -> Path:
    """Write the plan beside the runs: what `peer-status` compares the records with.

    Cells of earlier launches stay in it if they have a record, and with `keep_missing` in any case:
    a launch of some seeds or variants does not make the others disappear.

    Raises:
        UserError: there is a folder of the plan's name.
    """
    path = folder / PLAN
    if path.is_dir():
        raise UserError(f"{path}: a folder, where the plan is to be written; remove it")
    known, _ = read_plan(folder)
    kept = (list(row.values()) for row in known if keep_missing or _has_record(folder, row))
    rows = {tuple(row[1:5]): row for row in kept}
    rows |= {tuple(row[1:5]): row for row in map(_plan_row, cells)}
    text = io.StringIO()
    csv.writer(text).writerows([PLAN_HEADER, *rows.values()])
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())
    return path


def _has_record(folder: Path, row: Mapping[str, str]) -> bool:
    return (folder / row["run_id"] / RECORD).exists()


def _plan_row(cell: StudyCell) -> list[str]:
    planned, record = cell.planned, cell.record
    name = planned.run_id if planned else record.run_id if record else ""
    flops = repr(planned.plan.flops) if planned else ""
    reason = (record.reason if record else None) or ""
    axes = [cell.cell.variant, cell.cell.size, budget_label(cell.cell.budget), str(cell.cell.seed)]
    epochs = f"{planned.epochs:.4g}" if planned and planned.epochs is not None else ""
    return [name, *axes, flops, epochs, cell.state, reason]
