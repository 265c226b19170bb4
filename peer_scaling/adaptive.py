"""A study that chooses its own sizes: which runs come next, from what is known. Pure.

1. Coarse ladders, smallest budget first, around the predicted minima: later ones are looked for
   where those of smaller budgets were found.
2. Ladders with the minimum at an end are extended there.
3. Then the budgets whose intervals are too wide get more runs, each where it narrows them most.

Runs are asked for in steps of one for each variant, at the same budget. So no variant is tuned more
than another: at every moment their numbers of runs at any budget differ by at most one.

Decisions depend on the records alone, and not on the order in which they came: rounds are decided
anew from the first on, each from the runs that the rounds before it asked for. Other runs of the
same study are not looked at until they are asked for; they are then there already.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import final

from peer_scaling.candidates import Action, Adaptive, Candidate, Decision, Key, Observation
from peer_scaling.chooser import Curve
from peer_scaling.errors import UserError, shown
from peer_scaling.record import budget_label
from peer_scaling.tiers import Step, Tier, make_tiers, step_flops

Lookup = Callable[[Key], Observation | None]


def decide(
    config: Adaptive, candidates: Sequence[Candidate], observations: Sequence[Observation]
) -> tuple[Decision, ...]:
    """The decisions of the present round, without those whose runs have ended.

    Raises:
        UserError: candidates that cannot be those of one study.
    """
    known = {observation.key: observation for observation in observations}
    *_, last = replay(config, candidates, known.get)
    return tuple(decision for decision in last if decision.key not in known)


def history(
    config: Adaptive, candidates: Sequence[Candidate], observations: Sequence[Observation]
) -> tuple[Decision, ...]:
    """All decisions up to now, with those of the present round: the lines of `decisions.jsonl`.

    Raises:
        UserError: candidates that cannot be those of one study.
    """
    known = {observation.key: observation for observation in observations}
    return tuple(d for decided in replay(config, candidates, known.get) for d in decided)


def replay(
    config: Adaptive, candidates: Sequence[Candidate], lookup: Lookup
) -> Iterator[tuple[Decision, ...]]:
    """The rounds of a study, up to one with a run that `lookup` does not know, or with none.

    Raises:
        UserError: candidates that cannot be those of one study.
    """
    _check(config, candidates)
    known: dict[Key, Observation] = {}
    number, spent, said = 1, 0.0, set[tuple[str, float]]()
    while True:
        chooser = _Round(config, number, make_tiers(config, candidates, known), spent)
        decided = chooser.refusals(candidates) if number == 1 else []
        decided += chooser.left_out(said)
        decided += chooser.place() or chooser.refine() or chooser.stops()
        yield tuple(decided)
        keys = [decision.key for decision in decided if decision.key]
        found = [observation for key in keys if (observation := lookup(key))]
        if not keys or len(found) < len(keys):
            return
        number, spent = number + 1, chooser.spent
        known |= {observation.key: observation for observation in found}


@final
class _Round:
    """The decisions of one round."""

    def __init__(self, config: Adaptive, number: int, tiers: list[Tier], spent: float) -> None:
        self._config = config
        self._number = number
        self._tiers = [tier for tier in tiers if not tier.refusal]
        self._refused = [tier for tier in tiers if tier.refusal]
        coarse = sum(tier.coarse_flops for tier in self._tiers)
        self._allowance = config.allowance or config.ladders * coarse
        self.spent = spent
        """Training FLOPs, with those of the runs that this round has asked for."""

    def refusals(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """Sizes that cannot be trained, and budgets that have too few others."""
        decided = [
            self._decision(Action.DROP, c.variant, c.budget, c.problem, c.size)
            for c in candidates
            if c.problem
        ]
        return decided + [
            self._decision(Action.DROP, curve.variant, tier.budget, tier.refusal)
            for tier in self._refused
            for curve in tier.curves
            if tier.refusal
        ]

    def left_out(self, said: set[tuple[str, float]]) -> list[Decision]:
        """Sizes far from a minimum, once for each curve; `said` keeps for which."""
        decided = []
        for curve in (curve for tier in self._tiers for curve in tier.curves):
            if not curve.bracketed or not curve.minimum or (curve.variant, curve.budget) in said:
                continue
            said.add((curve.variant, curve.budget))
            minimum, reach = curve.minimum, self._config.log_reach
            far = [
                c.size
                for c in curve.candidates
                if not curve.num_runs(c) and abs(c.log_N - minimum.log_N) > reach
            ]
            reason = (
                f"{', '.join(far)}: more than a factor of {self._config.reach:g} from N* "
                f"{math.exp(minimum.log_N):.3g}, so about {minimum.curvature * reach**2:.2g} nats "
                f"or more above the minimum"
            )
            if far:
                decided.append(self._decision(Action.DROP, curve.variant, curve.budget, reason))
        return decided

    def place(self) -> list[Decision]:
        """Runs at the smallest budget whose minima are not all bracketed yet."""
        for index, tier in enumerate(self._tiers):
            if tier.placed:
                continue
            steps = [tier.step()] if tier.started else tier.start(self._tiers[:index])
            asked = [step for step in steps if step]
            if asked and self._affords(sum(map(step_flops, asked))):
                return [decision for step in asked for decision in self._runs(step)]
        return []

    def refine(self) -> list[Decision]:
        """Runs at all budgets whose intervals are wider than the targets, the worst first."""
        decided = []
        for tier in sorted(self._tiers, key=lambda tier: -tier.excess if tier.started else 0):
            for _ in range(self._config.runs_per_round):
                step = tier.step() if tier.started and tier.excess > 1 else None
                if step is None or not self._affords(step_flops(step)):
                    break
                decided += self._runs(step)
                tier = tier.after(step)
        return decided

    def stops(self) -> list[Decision]:
        """Why nothing more is run, for every curve."""
        return [
            self._decision(Action.STOP, curve.variant, tier.budget, self._why_stopped(tier, curve))
            for tier in self._tiers
            for curve in tier.curves
        ]

    def _why_stopped(self, tier: Tier, curve: Curve) -> str:
        if not tier.started:
            return f"not started: {self._spent_text(sum(map(step_flops, tier.start([]))))}"
        if curve.ended:
            where = f"{curve.side or 'other'} sizes"
            return f"{curve.summary()}, and no other can be trained: add {where} to `sizes`"
        if curve.excess <= 1:
            return f"{'targets met: ' if curve.open else ''}{curve.summary()}"
        step = tier.step()
        if step:
            return f"{self._spent_text(step_flops(step))}: {curve.summary()}"
        out = [c.variant for c in tier.curves if not c.choose()]
        return (
            f"no run is left for {', '.join(out)}: raise max_seeds or add sizes; {curve.summary()}"
        )

    def _spent_text(self, needed: float) -> str:
        return (
            f"{self.spent:.3g} of the allowance of {self._allowance:.3g} FLOPs are spent, and one "
            f"more step needs {needed:.3g}"
        )

    def _affords(self, flops: float) -> bool:
        return self.spent + flops <= self._allowance

    def _runs(self, step: Step) -> list[Decision]:
        self.spent += step_flops(step)
        return [
            self._decision(
                choice.action, curve.variant, curve.budget, choice.reason,
                choice.candidate.size, curve.num_runs(choice.candidate),
            )
            for curve, choice in step
        ]  # fmt: skip

    def _decision(
        self,
        action: Action,
        variant: str,
        budget: float,
        reason: str | None,
        size: str | None = None,
        seed: int | None = None,
    ) -> Decision:
        return Decision(self._number, action, variant, budget, size, seed, reason or "")


def _check(config: Adaptive, candidates: Sequence[Candidate]) -> None:
    counts = Counter((c.variant, c.budget, c.size) for c in candidates)
    problems = [
        f"{variant} {size} at {budget_label(budget)}: two candidates; give one"
        for (variant, budget, size), count in counts.items()
        if count > 1
    ]
    ladder = {c.variant for c in candidates}, {c.budget for c in candidates}, config.sizes
    if not candidates:
        problems.append("no candidates: give a budget and a variant")
    for variant in sorted(ladder[0]):
        for budget in sorted(ladder[1]):
            missing = [size for size in ladder[2] if not counts[variant, budget, size]]
            if missing:
                names = shown(", ".join(missing))
                problems.append(f"{variant} at {budget_label(budget)}: no candidate for {names}")
    if problems:
        raise UserError(*problems)
