"""What can be checked of runs before anything is written or started."""

from collections.abc import Callable, Iterable

from peer_scaling.documents import check_source
from peer_scaling.errors import UserError
from peer_scaling.planned import PlannedRun, plan_run
from peer_scaling.run import Run
from peer_scaling.step import pick_device


def check_machine(runs: Iterable[Run]) -> list[str]:
    """Problems with the data files and devices that runs name, each once."""
    problems: list[str] = []
    for run in runs:
        problems += problems_of(lambda run=run: check_source(run.data.source, run.data.path))
        problems += problems_of(lambda run=run: pick_device(run.settings.device))
    return list(dict.fromkeys(problems))


def check_run(run: Run) -> PlannedRun:
    """The plan as far as it goes without the corpus.

    Raises:
        UserError: all problems with files, device and plan at once.
    """
    plans: list[PlannedRun] = []
    problems = check_machine([run]) + problems_of(lambda: plans.append(plan_run(run, None)))
    if problems:
        raise UserError(*problems)
    return plans[0]


def problems_of(check: Callable[[], object]) -> list[str]:
    """The problems of the UserError that a call raises; none if it raises none."""
    try:
        check()
    except UserError as error:
        return list(error.problems)
    return []
