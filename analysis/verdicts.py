"""Every pair of a study's variants at equal FLOPs, seconds and memory, through the claim gate."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd

from analysis.claims import Claim, MoreSeeds, Protocol, statistics
from analysis.compare import ComputeMultiplier, compute_multiplier
from analysis.conditions import Condition, Settle, Status, both
from analysis.conventions import Recount, recount
from analysis.difference import Difference, holm
from analysis.equal_cost import EqualCost, View, compare_measured, of_pair
from analysis.evidence import (
    Study,
    flag,
    flops_realised,
    held_out_error,
    no_divergence,
    one_epoch,
    optimum_interior,
)
from analysis.gaps import Pair, find_gaps
from analysis.isoflop import IsoflopFit, fit_isoflop
from analysis.load import AnalysisError, as_frame, routed_name
from analysis.profile import Profile
from analysis.tuning import equal_tuning, learning_rates_interior

Check = Callable[[Study, Profile], Condition]
NOT_CAUSAL = "not causal: its loss is for reference"
CAPACITY = "evaluated with experts that can be full"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that `peer-analyze compare` knows of a study."""

    study: str
    frame: pd.DataFrame
    """All runs, excluded ones too."""
    fit: IsoflopFit
    recounts: tuple[Recount, ...]
    """The gap of every pair at every budget, with every FLOP convention."""
    costs: dict[View, tuple[EqualCost, ...]]
    """In the order of `recounts`."""
    multipliers: tuple[ComputeMultiplier, ...]
    claims: dict[View, tuple[Claim, ...]]
    """In the order of `recounts`."""

    def multiplier(self, pair: Pair) -> ComputeMultiplier | None:
        """Of the pair's variant over its reference."""
        key = (pair.variant, pair.reference, pair.budget)
        found = (m for m in self.multipliers if (m.variant, m.baseline, m.budget) == key)
        return next(found, None)

    def num_tests(self, view: View) -> int:
        """Members of the family that Holm's correction is for."""
        return sum(np.isfinite(claim.p_holm) for claim in self.claims[view])


def compare_study(
    frame: pd.DataFrame,
    axis: str = "num_params_total",
    baseline: str | None = None,
    tuning: pd.DataFrame | None = None,
) -> Comparison:
    """Compare every two variants at every budget.

    Args:
        frame: one study's runs, as `load_runs` returns them.
        axis: what N counts.
        baseline: reference of all pairs it is in; None: dense, or the first variant.
        tuning: runs at other learning rates, as from further studies; None: those of the frame.

    Raises:
        AnalysisError: as `fit_isoflop`; fewer than two variants; no such baseline.
    """
    fit = fit_isoflop(frame, axis)
    frame = as_frame(frame).copy()  # in one piece, as selecting rows of many pieces is slow
    if len(fit.variants) < 2:
        raise AnalysisError(f"one variant, {fit.variants[0]}: nothing to compare it with")
    baseline = baseline or ("dense" if "dense" in fit.variants else fit.variants[0])
    if baseline not in fit.variants:
        names = ", ".join(fit.variants)
        raise AnalysisError(f"--baseline {baseline}: no such variant; choose one of {names}")
    study = Study(fit, frame, frame if tuning is None else tuning)
    gaps = find_gaps(fit, frame, baseline)
    recounts = tuple(recount(fit, frame, gap) for gap in gaps)
    costs = {
        view: tuple(compare_measured(fit, frame, gap.pair, view) for gap in gaps)
        for view in (View.SECONDS, View.MEMORY)
    }
    protocols = _protocols(study, recounts)
    cases = {View.FLOPS: [_at_equal_flops(*case) for case in zip(recounts, protocols, strict=True)]}
    for view, found in costs.items():
        cases[view] = [_at_equal_cost(*case) for case in zip(found, protocols, strict=True)]
    claims = {view: _claims(study, view, found) for view, found in cases.items()}
    multipliers = [m for v in fit.variants for m in compute_multiplier(fit, v, gaps)]
    return Comparison(study.name, frame, fit, recounts, costs, tuple(multipliers), claims)


@dataclass(frozen=True)
class _Case:
    """A comparison before Holm's correction."""

    pair: Pair
    difference: Difference | None
    protocol: Protocol

    @property
    def p_value(self) -> float:
        """NaN for pairs that are not ranked: they are not in the family."""
        ranked = self.protocol.causal.status is not Status.NOT_MET
        return self.difference.p_value if self.difference and ranked else float("nan")


def _at_equal_flops(found: Recount, protocol: Protocol) -> _Case:
    return _Case(found.gap.pair, found.gap.difference, protocol)


def _at_equal_cost(cost: EqualCost, protocol: Protocol) -> _Case:
    """Under a protocol in which no FLOPs are counted."""
    counted = Condition(Status.MET, "no FLOPs are counted")
    own = replace(protocol, optima_interior=_measured(cost), same_winner=counted)
    return _Case(cost.pair, cost.difference, own)


def _claims(study: Study, view: View, cases: list[_Case]) -> tuple[Claim, ...]:
    """Through the gate, with Holm's correction over all."""
    adjusted = holm([case.p_value for case in cases])
    num = int(np.isfinite(adjusted).sum())
    claims = []
    for case, p_holm in zip(cases, adjusted, strict=True):
        more = _more_seeds(study, case.pair, view)
        shown = statistics(case.difference, p_holm, num, more)
        claims.append(Claim(case.pair, view, case.difference, p_holm, shown, case.protocol))
    return tuple(claims)


def _more_seeds(study: Study, pair: Pair, view: View) -> MoreSeeds:
    """At equal seconds the envelopes are over all budgets."""
    rows = of_pair(study.frame, pair)
    seeds = [int(seed) for seed in rows["seed"] if pd.notna(seed)]
    if view is not View.SECONDS:
        rows = rows.loc[rows["budget"] == pair.budget]
    cells = set(zip(rows["variant"], rows["size"], rows["budget"], strict=True))
    return MoreSeeds(
        study=study.name,
        pair=pair,
        budgets=tuple(sorted({budget for _, _, budget in cells})),
        num_cells=len(cells),
        flops=sum(budget for _, _, budget in cells),
        first=max(seeds, default=-1) + 1,
    )


def _protocols(study: Study, recounts: tuple[Recount, ...]) -> list[Protocol]:
    """One per pair and budget; every variant is checked once at every budget."""

    @cache
    def checked(check: Check, variant: str, budget: float) -> Condition:
        profile = study.fit.profile(variant, budget)
        assert profile is not None
        return check(study, profile)

    @cache
    def held_out(variant: str) -> Condition:
        return held_out_error(study, variant)

    def protocol(found: Recount) -> Protocol:
        pair = found.gap.pair
        names = (pair.reference, pair.variant)

        def of_both(check: Check) -> Condition:
            return both(checked(check, name, pair.budget) for name in names)

        return Protocol(
            optima_interior=of_both(optimum_interior),
            learning_rates_interior=of_both(learning_rates_interior),
            equal_tuning=equal_tuning(study, names),
            flops_realised=of_both(flops_realised),
            no_divergence=of_both(no_divergence),
            causal=of_both(_causal),
            dropless=of_both(_dropless),
            same_winner=_same_winner(found),
            one_epoch=of_both(one_epoch),
            held_out_error=both(map(held_out, names)),
        )

    return [protocol(found) for found in recounts]


def _causal(study: Study, profile: Profile) -> Condition:
    found = flag(study, profile, "causal", NOT_CAUSAL)
    name = routed_name(profile.variant, study.frame)
    told = found.met and name != profile.variant
    return replace(found, evidence=f"{name}: causal") if told else found


def _dropless(study: Study, profile: Profile) -> Condition:
    return flag(study, profile, "dropless", CAPACITY)


def _same_winner(found: Recount) -> Condition:
    """Whether the winner is the same under every FLOP convention."""
    if found.winner is None:
        return Condition(Status.UNKNOWN, "no gap at equal FLOPs")
    pair = found.gap.pair
    if found.changed:
        other = pair.reference if found.winner == pair.variant else pair.variant
        names = ", ".join(found.changed)
        return Condition(
            Status.NOT_MET, f"convention-dependent: {found.winner}, but {other} by {names}"
        )
    if found.unknown:
        why = "; ".join(cost.reason for cost in found.unknown)
        budgets = Settle("budgets at which both spend as many FLOPs in that convention")
        return Condition(Status.UNKNOWN, why, (budgets,))
    return Condition(Status.MET, f"{found.winner} under every convention")


def _measured(cost: EqualCost) -> Condition:
    """What stands for a bracketed minimum at equal seconds or memory."""
    if cost.difference is None:
        return Condition(Status.UNKNOWN, cost.reason)
    return Condition(Status.MET, f"both measured at {cost.column} {cost.at:.4g}")
