"""Loss gaps between variants at equal training FLOPs, paired over seeds where there are enough.

Legend: N parameters, C training FLOPs, L loss in nats per token. Shape legend: I sizes, S seeds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd

from analysis.difference import MIN_SEEDS, Difference, Source, by_seed
from analysis.isoflop import IsoflopFit
from analysis.load import usable
from analysis.profile import Profile
from analysis.refusals import MIN_SIZES
from analysis.shapes import CURVES, Shape

Losses = dict[int, dict[str, float]]
"""Loss by seed and size."""


@dataclass(frozen=True)
class Pair:
    """Two variants at a budget."""

    variant: str
    reference: str
    budget: float


@dataclass(frozen=True)
class Gap:
    """L*(reference) less L*(variant) at one budget."""

    pair: Pair
    difference: Difference | None
    """None if either has no minimum."""
    reason: str
    """Why there is none; empty otherwise."""


@dataclass(frozen=True, eq=False)
class SeedLosses:
    """The runs of a profile by seed: those that its curve was fitted to."""

    shape: Shape
    log_params: dict[str, float]
    """ln N by size."""
    losses: Losses

    def minima(self, seeds: Sequence[int], sizes: Iterable[str]) -> np.ndarray:
        """Of the profile's kind of curve through every seed's losses, (S,); NaN where it is not
        bracketed or there are too few of them.
        """
        wanted = set(sizes)
        ladders = [frozenset(wanted & self.losses[seed].keys()) for seed in seeds]
        minimum_S = np.full(len(seeds), np.nan)
        for ladder in set(ladders):
            same = [i for i, own in enumerate(ladders) if own == ladder]
            minimum_S[same] = self._minima([seeds[i] for i in same], ladder)
        return minimum_S

    def _minima(self, seeds: Sequence[int], ladder: frozenset[str]) -> np.ndarray:
        names = sorted(ladder, key=self.log_params.__getitem__)
        curve = CURVES[self.shape]
        if len(names) < max(MIN_SIZES, curve.free):
            return np.full(len(seeds), np.nan)
        x_I = np.array([self.log_params[name] for name in names])
        loss_SI = np.array([[self.losses[seed][name] for name in names] for seed in seeds])
        return curve.minima(x_I - x_I.mean(), loss_SI, np.ones(len(names))).loss_R


def find_pairs(fit: IsoflopFit, baseline: str) -> list[Pair]:
    """Every two variants at every budget that both have; the baseline, then the one that the fit
    names first, is the reference.
    """
    variants = sorted(fit.variants, key=lambda v: v != baseline)
    return [
        Pair(variant, reference, budget)
        for budget in fit.budgets
        for reference, variant in combinations(variants, 2)
        if fit.profile(variant, budget) and fit.profile(reference, budget)
    ]


def find_gaps(fit: IsoflopFit, frame: pd.DataFrame, baseline: str = "dense") -> list[Gap]:
    """The gap of every pair at every budget.

    With `difference.MIN_SEEDS` shared seeds and more, the minimum of every seed is found with the
    profile's kind of curve, over the sizes that all four corners have (both variants, all shared
    seeds) where every seed has a minimum there, over each variant's own sizes otherwise; the gap is
    the mean of the differences by seed. With fewer, it is the difference of the profiles' minima.

    Args:
        fit: of the frame.
        frame: as `load_runs` returns it.
        baseline: reference of all pairs it is in.
    """
    rows = usable(frame)
    runs = {
        (p.variant, p.budget): seed_losses(p, _of(rows, p), fit.axis) for p in fit.profiles if p.ok
    }
    return [_gap(fit, runs, pair) for pair in find_pairs(fit, baseline)]


def _of(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    own = (rows["variant"] == profile.variant) & (rows["budget"] == profile.budget)
    return rows.loc[own]


def seed_losses(profile: Profile, runs: pd.DataFrame, axis: str) -> SeedLosses:
    """The runs of a profile with a minimum, without those that its curve left out."""
    assert profile.shape is not None
    left_out = {(run.num_params, run.loss) for run in profile.left_out}
    log_params: dict[str, list[float]] = {}
    losses: Losses = {}
    columns = [runs[name].tolist() for name in ("size", "seed", axis, "loss")]
    for size, seed, params, loss in zip(*columns, strict=True):
        if (params, loss) not in left_out:
            log_params.setdefault(size, []).append(float(np.log(params)))
            if pd.notna(seed):
                losses.setdefault(int(seed), {})[size] = loss
    means = {size: float(np.mean(values)) for size, values in log_params.items()}
    return SeedLosses(profile.shape, means, losses)


def _gap(fit: IsoflopFit, runs: dict[tuple[str, float], SeedLosses], pair: Pair) -> Gap:
    profiles = [fit.profile(name, pair.budget) for name in (pair.variant, pair.reference)]
    own, base = (profile for profile in profiles if profile is not None)
    missing = [f"{p.variant}: {p.status}" for p in (own, base) if not p.ok]
    if missing:
        return Gap(pair, None, f"no minimum ({', '.join(missing)})")
    pair_runs = (runs[own.variant, pair.budget], runs[base.variant, pair.budget])
    paired, why = paired_difference(*pair_runs)
    return Gap(pair, paired or replace(_from_profiles(own, base, pair_runs), note=why), "")


def paired_difference(own: SeedLosses, base: SeedLosses) -> tuple[Difference | None, str]:
    """The mean difference over shared seeds; without one, None and why."""
    seeds = sorted(own.losses.keys() & base.losses.keys())
    if len(seeds) < MIN_SEEDS:
        return None, f"{len(seeds)} shared seeds, {MIN_SEEDS} are needed for differences by seed"
    ladders = [runs.losses[seed].keys() for runs in (own, base) for seed in seeds]
    shared = set.intersection(*map(set, ladders))
    difference_S = base.minima(seeds, shared) - own.minima(seeds, shared)
    note = ""
    if np.isnan(difference_S).any():
        own_S, base_S = (runs.minima(seeds, runs.log_params) for runs in (own, base))
        difference_S = base_S - own_S
        note = "over each variant's own sizes"
    found = np.isfinite(difference_S)
    lost = ", ".join(str(s) for s, ok in zip(seeds, found, strict=True) if not ok)
    note = "; ".join(filter(None, (note, lost and f"no minimum of its own: seeds {lost}")))
    difference = by_seed(difference_S[found], note)
    return difference, note or "the seeds are copies of one another"


def _from_profiles(own: Profile, base: Profile, runs: tuple[SeedLosses, SeedLosses]) -> Difference:
    """From the errors of two minima; degrees of freedom by Welch and Satterthwaite.

    What the runs of a seed share cancels if both variants have the same seeds, and is part of the
    error if not.
    """
    seeds = [set(side.losses) for side in runs]
    parts = [(p.loss_stderr**2, p.dof) for p in (own, base)]
    if seeds[0] != seeds[1]:
        parts += [(p.level_stderr**2, float(p.level_dof)) for p in (own, base)]
    parts = [(variance, dof) for variance, dof in parts if variance > 0 and dof > 0]
    total = sum(variance for variance, _ in parts)
    dof = total**2 / sum(v**2 / d for v, d in parts) if parts else 0.0
    stderr = float(np.sqrt(total)) if parts else float("nan")
    source = Source.PROFILES if parts else Source.NONE
    return Difference(base.loss - own.loss, stderr, dof, source, len(seeds[0] & seeds[1]), "")
