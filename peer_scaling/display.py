"""What a user sees: plans, progress and results, on a terminal and elsewhere."""

import sys
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from peer_scaling.plan import Plan
from peer_scaling.planned import PlannedRun
from peer_scaling.record import RunRecord, budget_label
from peer_scaling.run import Run

MIN_WIDTH = 200
"""Characters that a table may take at least."""
PROGRESS_LINES = 10
"""Lines that a run prints where there is no terminal for a bar."""

PLAN_COLUMNS = (
    "variant", "size", "budget", "seed", "params", "active", "tokens", "tokens/param", "epochs",
    "steps", "FLOPs", "error", "est. time", "state",
)  # fmt: skip


class Progress:
    """The course of one run on the screen: a bar, some lines, or nothing."""

    def __init__(self, name: str, plan: Plan, kind: str) -> None:
        self._plan = plan
        self._kind = kind
        if kind == "auto":
            self._kind = "bar" if sys.stderr.isatty() else "lines"
        self._bar = tqdm(total=plan.steps, desc=name, unit="step", disable=self._kind != "bar")
        self._next_line = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.close()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show the step, the loss, the speed and the time left."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s")
        self._bar.update(step - self._bar.n)
        if self._kind == "lines" and step >= self._next_line:
            self._next_line += max(1, self._plan.steps // PROGRESS_LINES)
            left = (self._plan.steps - step) * self._plan.batch_tokens / tokens_per_second
            speed = f"{tokens_per_second:,.0f} tokens/s, {seconds_text(left)} left"
            print(f"step {step}/{self._plan.steps}: loss {loss:.4f}, {speed}", flush=True)


def plan_row(planned: PlannedRun, state: str, seconds: float | None = None) -> list[str]:
    """The values of `PLAN_COLUMNS` for a run."""
    plan, cost, run = planned.plan, planned.cost, planned.run
    return [
        run.variant,
        run.size,
        budget_label(plan.budget),
        str(run.settings.seed),
        f"{cost.num_params_total:,}",
        f"{cost.num_params_active:,}",
        f"{plan.tokens:,}",
        f"{plan.tokens / cost.num_params_total:.3g}",
        "?" if planned.epochs is None else f"{planned.epochs:.2f}",
        f"{plan.steps:,}",
        f"{plan.flops:.4g}",
        f"{plan.error:+.2%}",
        "?" if seconds is None else seconds_text(seconds),
        state,
    ]


def run_name(run: Run) -> str:
    """Variant, size, budget and seed of a run."""
    return _name(run.variant, run.size, run.settings.budget, run.settings.seed)


def _name(variant: str, size: str, budget: float, seed: int) -> str:
    return f"{variant} {size} {budget_label(budget)} s{seed}"


def result_line(record: RunRecord) -> str:
    """One line on how a run ended."""
    name = _name(record.variant, record.size, record.budget, record.seed)
    if record.status != "done" or record.loss is None or record.perplexity is None:
        return f"{name}: {record.status}, {record.reason}"
    share = "" if record.utilisation is None else f" ({100 * record.utilisation:.0f} % of peak)"
    speed = (record.flops_per_second or 0.0) / 1e9
    return (
        f"{name}: loss {record.loss:.4f} nats, perplexity {record.perplexity:.2f}, "
        f"{seconds_text(record.wall_seconds or 0.0)}, {speed:.1f} GFLOP/s{share}"
    )


def table_text(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as text; a terminal too narrow for it wraps lines, but no number is cut."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=max(Console().width, MIN_WIDTH))
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def gigabytes_text(size: float) -> str:
    """Bytes as 4.2 GB, of 10^9."""
    return f"{size / 1e9:.3g} GB"


def seconds_text(seconds: float) -> str:
    """4.2 s, 3 min 05 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"
