"""The claim gate: "A beats B at C" only where every condition holds, otherwise what is missing.

After section 3d of the reliability notes that the project follows; docs/compare.md lists the
conditions. Losses are nats per token.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from analysis.conditions import Condition, Settle, Status, command, seeds
from analysis.difference import LEVEL, MIN_SEEDS, MOST_SEEDS, Difference, Source
from analysis.equal_cost import View
from analysis.gaps import Pair
from peer_scaling.record import budget_label


@dataclass(frozen=True)
class Conditions:
    """Conditions by name."""

    def missing(self) -> dict[str, Condition]:
        """Those that do not hold, by name."""
        return {name: found for name, found in self.all().items() if not found.met}

    def all(self) -> dict[str, Condition]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Statistics(Conditions):
    """What the numbers alone must show."""

    paired_seeds: Condition
    """Three seeds or more that both variants were trained on, and differences by seed."""
    gap_exceeds_mde: Condition
    """The gap is above the minimum detectable one, at the level that Holm's correction leaves it:
    barely significant gaps are not claims, and are mostly too large."""
    interval_excludes_zero: Condition
    """After Holm's correction over all ranked pairs and budgets of the study."""


@dataclass(frozen=True)
class Protocol(Conditions):
    """What must be so for the numbers to mean what the claim says."""

    optima_interior: Condition
    """Both minima are bracketed; at equal seconds or memory: both were measured at that cost."""
    learning_rates_interior: Condition
    equal_tuning: Condition
    flops_realised: Condition
    no_divergence: Condition
    causal: Condition
    dropless: Condition
    same_winner: Condition
    """Under every FLOP convention; at equal seconds or memory no FLOPs are counted."""
    one_epoch: Condition
    held_out_error: Condition


@dataclass(frozen=True)
class Claim:
    """One comparison and its conditions."""

    pair: Pair
    view: View
    difference: Difference | None
    p_holm: float
    statistics: Statistics
    protocol: Protocol

    @property
    def winner(self) -> str | None:
        """The variant with the lower loss, by whatever margin."""
        if self.difference is None or self.difference.nats == 0:
            return None
        return self.pair.variant if self.difference.nats > 0 else self.pair.reference

    @property
    def loser(self) -> str | None:
        """The other one."""
        names = {self.pair.variant, self.pair.reference} - {self.winner}
        return names.pop() if self.winner else None

    @property
    def ranked(self) -> bool:
        """Whether the losses of both are those of language models, as far as is known."""
        return self.protocol.causal.status is not Status.NOT_MET

    @property
    def missing(self) -> dict[str, Condition]:
        """The conditions that do not hold."""
        return self.statistics.missing() | self.protocol.missing()

    @property
    def beats(self) -> bool:
        """Whether the claim may be made."""
        return self.winner is not None and not self.missing

    @property
    def numbers_show(self) -> bool:
        """Whether the statistical conditions hold, the protocol aside."""
        return self.winner is not None and not self.statistics.missing()

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.ranked:
            why = "; ".join(part.evidence for part in self.protocol.causal.lacking)
            return f"not ranked: {why}"
        if self.beats:
            return f"{self.winner} beats {self.loser} at {budget_label(self.pair.budget)}"
        return f"not shown: {', '.join(self.missing)}"


@dataclass(frozen=True)
class MoreSeeds:
    """What a further seed of both variants costs."""

    study: str
    pair: Pair
    budgets: tuple[float, ...]
    num_cells: int
    """Of both variants, per seed."""
    flops: float
    """Of these."""
    first: int
    """The lowest seed that was not used."""

    def settle(self, num: int, what: str) -> tuple[Settle, ...]:
        """So many more."""
        variants = f"{self.pair.reference},{self.pair.variant}"
        budgets = ",".join(map(budget_label, self.budgets))
        line = command(self.study, variant=variants, budget=budgets, seed=seeds(self.first, num))
        return (Settle(what, num * self.num_cells, num * self.flops, line),)


def statistics(
    difference: Difference | None, p_holm: float, num_tests: int, more: MoreSeeds
) -> Statistics:
    """The statistical conditions.

    Args:
        difference: of both losses; None if there is none.
        p_holm: its p-value after Holm's correction; NaN without an error.
        num_tests: members of the family that was corrected.
        more: what further seeds cost.
    """
    if difference is None:
        nothing = Condition(Status.UNKNOWN, "not compared")
        return Statistics(nothing, nothing, nothing)
    return Statistics(
        paired_seeds=_paired_seeds(difference, num_tests, more),
        gap_exceeds_mde=_exceeds(difference, p_holm, num_tests, more),
        interval_excludes_zero=_excludes_zero(difference, p_holm, num_tests, more),
    )


def _paired_seeds(difference: Difference, num_tests: int, more: MoreSeeds) -> Condition:
    num = difference.num_seeds
    if difference.source is Source.SEEDS:
        return Condition(Status.MET, f"{num} shared seeds, differences by seed")
    why = difference.note or f"{num} shared seeds"
    needed = difference.seeds_needed(_strictest(num_tests)) or MIN_SEEDS
    lacking = max(needed - num, 1)
    return Condition(Status.NOT_MET, why, more.settle(lacking, _more(lacking)))


def _strictest(num_tests: int) -> float:
    """Level of the first step of Holm's correction."""
    return LEVEL / max(num_tests, 1)


def _more(num: int) -> str:
    return f"{num} more shared seed{'s' if num > 1 else ''}"


def _exceeds(difference: Difference, p_holm: float, num_tests: int, more: MoreSeeds) -> Condition:
    gap, least = abs(difference.nats), difference.detectable_at(p_holm)
    text = f"gap {gap:.4f}, minimum detectable {least:.4f} nats among {num_tests} gaps"
    if gap > least:
        return Condition(Status.MET, text)
    if difference.source is Source.NONE:
        return Condition(Status.UNKNOWN, f"gap {gap:.4f} nats without an error", ())
    return Condition(Status.NOT_MET, text, _seeds_that_settle(difference, num_tests, more))


def _excludes_zero(
    difference: Difference, p_holm: float, num_tests: int, more: MoreSeeds
) -> Condition:
    if difference.source is Source.NONE:
        return Condition(Status.UNKNOWN, "no interval", ())
    text = (
        f"95 % [{difference.low:+.4f}, {difference.high:+.4f}] nats, p {difference.p_value:.2g}, "
        + (f"Holm over {num_tests}: {p_holm:.2g}" if p_holm == p_holm else "not in Holm's family")
    )
    if p_holm <= LEVEL:
        return Condition(Status.MET, text)
    return Condition(Status.NOT_MET, text, _seeds_that_settle(difference, num_tests, more))


def _seeds_that_settle(
    difference: Difference, num_tests: int, more: MoreSeeds
) -> tuple[Settle, ...]:
    """As many as the strictest step of Holm's correction needs for a gap of this size."""
    needed = difference.seeds_needed(_strictest(num_tests))
    if needed is None:
        what = f"a gap of this size would need more than {MOST_SEEDS} seeds with this noise"
        return (Settle(what),)
    lacking = max(needed - difference.num_seeds, 1)
    return more.settle(lacking, f"{_more(lacking)}, if gap and noise stay")


def condition_rows(claims: Sequence[Claim]) -> list[dict[str, object]]:
    """A row per condition of every claim, for `claims.csv`."""
    return [
        {
            **asdict(claim.pair),
            "view": str(claim.view),
            "kind": kind,
            "condition": name,
            "status": str(found.status),
            "evidence": found.evidence,
            "settled_by": "; ".join(step.text for step in found.settle),
            "num_runs": sum(step.num_runs for step in found.settle),
            "flops": sum(step.flops for step in found.settle),
        }
        for claim in claims
        for kind, part in (("statistical", claim.statistics), ("protocol", claim.protocol))
        for name, found in part.all().items()
    ]
