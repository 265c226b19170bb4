"""What the runs say of the protocol: one condition per question, of a variant at a budget.

Legend: N parameters, C training FLOPs, L loss in nats per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.conditions import Condition, Settle, Status, command, seeds
from analysis.diagnostics import held_out
from analysis.fitting import FitStatus
from analysis.isoflop import IsoflopFit
from analysis.load import AnalysisError, usable
from analysis.parametric import fit_loss_surface
from analysis.profile import Profile, ProfileStatus
from analysis.refusals import MIN_SIZES
from peer_scaling.record import budget_label

FLOPS_TOLERANCE = 0.005
"""Of the budget."""
NEAR = 2.0
"""A run that diverged within this factor of N* makes the minimum doubtful."""
MIN_BUDGETS = 3
"""With two, the law that is left has one budget."""
MAX_RELATIVE, MAX_NATS = 0.01, 0.02
"""Of the held-out error of L; one of them is enough."""


@dataclass(frozen=True, eq=False)
class Study:
    """What the conditions are checked on."""

    fit: IsoflopFit
    frame: pd.DataFrame
    """All runs, excluded ones too."""
    tuning: pd.DataFrame
    """Runs at other learning rates, of whatever study; the frame itself if there are none."""

    @property
    def name(self) -> str:
        """Of the study."""
        return str(usable(self.frame)["study"].iloc[0])

    def rows(self, variant: str, budget: float | None = None) -> pd.DataFrame:
        """The usable runs of a variant."""
        rows = usable(self.frame)
        rows = rows.loc[rows["variant"] == variant]
        return rows if budget is None else rows.loc[rows["budget"] == budget]


def optimum_interior(study: Study, profile: Profile) -> Condition:
    """The profile has a minimum that is bracketed."""
    if profile.ok:
        return Condition(Status.MET, f"{profile.variant}: N* {profile.num_params:.3g}")
    return Condition(
        Status.NOT_MET, f"{profile.variant}: {profile.status}", (_another_try(study, profile),)
    )


def _another_try(study: Study, profile: Profile) -> Settle:
    """More sizes with the seeds that are there, or two seeds of the sizes that are there."""
    rows, C = study.rows(profile.variant, profile.budget), profile.budget
    line = command(study.name, variant=profile.variant, budget=budget_label(C))
    own = {int(seed) for seed in rows["seed"] if pd.notna(seed)}
    lacking = {
        ProfileStatus.EDGE: 2,
        ProfileStatus.TOO_FEW: MIN_SIZES + (len(own) < 2) - profile.num_sizes,
    }.get(profile.status)
    if lacking:
        num = lacking * max(len(own), 1)
        return Settle(profile.reason, num, num * C, f"{line} size=<their names>")
    num = 2 * len(set(rows["size"]))
    return Settle(profile.reason, num, num * C, f"{line} seed={seeds(max(own, default=-1) + 1, 2)}")


def flops_realised(study: Study, profile: Profile) -> Condition:
    """Every run spent its budget."""
    rows = study.rows(profile.variant, profile.budget)
    off_U = np.abs(rows["flops"].to_numpy() / profile.budget - 1)
    if np.isnan(off_U).any():
        why = f"{profile.variant}: {int(np.isnan(off_U).sum())} runs have no `flops`"
        return Condition(Status.UNKNOWN, why, (Settle("a column `flops` with what was spent"),))
    text = f"{profile.variant}: off by up to {100 * off_U.max():.2f} %"
    if off_U.max() <= FLOPS_TOLERANCE:
        return Condition(Status.MET, text)
    num = int((off_U > FLOPS_TOLERANCE).sum())
    more = Settle(
        "those runs with a smaller batch, so that steps are finer", num, num * profile.budget
    )
    return Condition(Status.NOT_MET, text, (more,))


def no_divergence(study: Study, profile: Profile) -> Condition:
    """No run diverged at a size within a factor of 2 of N*."""
    N = profile.num_params if profile.ok else profile.best_num_params
    frame, axis = study.frame, study.fit.axis
    own = (frame["variant"] == profile.variant) & (frame["budget"] == profile.budget)
    bad = frame.loc[own & (frame["status"] == "diverged")]
    known = frame.loc[own].groupby("size")[axis].mean().to_dict()
    near, unknown = set(), set()
    for size, params in zip(bad["size"], bad[axis], strict=True):
        params = known.get(size, np.nan) if np.isnan(params) else params
        if np.isnan(params):
            unknown.add(str(size))
        elif N / NEAR <= params <= N * NEAR:
            near.add(str(size))
    if not near | unknown:
        return Condition(Status.MET, f"{profile.variant}: none near N*")
    sizes = ",".join(sorted(near | unknown))
    line = command(
        study.name, variant=profile.variant, size=sizes, budget=budget_label(profile.budget)
    )
    num = len(near | unknown)
    more = Settle(
        "these at a lower learning rate, all cells with it", num, num * profile.budget, line
    )
    status = Status.NOT_MET if near else Status.UNKNOWN
    what = "diverged near N*" if near else "diverged, of unknown N"
    return Condition(status, f"{profile.variant}: {sizes} {what}", (more,))


def flag(study: Study, profile: Profile, column: str, no: str) -> Condition:
    """A column that has to be true of every run.

    Args:
        study: with the runs.
        profile: whose.
        column: of the frame.
        no: what to say where it is false.
    """
    values = study.rows(profile.variant, profile.budget)[column].tolist()
    if any(value is False for value in values):
        return Condition(Status.NOT_MET, f"{profile.variant} is {no}")
    if all(value is True for value in values):
        return Condition(Status.MET, f"{profile.variant}: {column}")
    why = f"{profile.variant}: the runs do not say whether they are {column}"
    return Condition(Status.UNKNOWN, why, (Settle(f"a column `{column}` that says so"),))


def one_epoch(study: Study, profile: Profile) -> Condition:
    """No run saw its data twice."""
    epochs_U = study.rows(profile.variant, profile.budget)["epochs"].to_numpy()
    if np.isnan(epochs_U).any():
        why = f"{profile.variant}: {int(np.isnan(epochs_U).sum())} runs have no `epochs`"
        return Condition(Status.UNKNOWN, why, (Settle("a column `epochs`"),))
    text = f"{profile.variant}: up to {epochs_U.max():.2g} epochs"
    if epochs_U.max() <= 1:
        return Condition(Status.MET, text)
    num = int((epochs_U > 1).sum())
    return Condition(Status.NOT_MET, text, (Settle("more data", num, num * profile.budget),))


def held_out_error(study: Study, variant: str) -> Condition:
    """L(N, D) of the variant, fitted without each budget, predicts it."""
    rows = study.rows(variant)
    budgets = sorted(set(rows["budget"]))
    if len(budgets) < MIN_BUDGETS:
        why = f"{variant}: {len(budgets)} of {MIN_BUDGETS} budgets"
        return Condition(Status.UNKNOWN, why, _another_budget(study, variant, budgets))
    N, D, L = (rows[name].to_numpy() for name in (study.fit.axis, "tokens", "loss"))
    try:
        surface = fit_loss_surface(N, D, L)
        error = held_out(surface.fit, rows["budget"].to_numpy()).mean_abs_error
    except AnalysisError as problem:
        return Condition(Status.UNKNOWN, f"{variant}: no law L(N, D): {problem}")
    text = f"{variant}: leave-one-budget-out error {100 * error:.2f} %, {error * L.mean():.4f} nats"
    if surface.status is FitStatus.NOT_CONVERGED or np.isnan(error):
        return Condition(Status.UNKNOWN, f"{variant}: L(N, D) {surface.status}")
    if error < MAX_RELATIVE or error * L.mean() < MAX_NATS:
        return Condition(Status.MET, text)
    return Condition(Status.NOT_MET, text, _another_budget(study, variant, budgets))


def _another_budget(study: Study, variant: str, budgets: Sequence[float]) -> tuple[Settle, ...]:
    """Four times the largest, at its sizes."""
    C = 4 * budgets[-1]
    rows = study.rows(variant, budgets[-1])
    sizes = ",".join(sorted(set(rows["size"])))
    line = command(study.name, variant=variant, budget=budget_label(C), size=sizes)
    return (Settle(f"a further budget of {variant}", len(rows), len(rows) * C, line),)
