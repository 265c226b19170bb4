"""Which of two variants wins when FLOPs are counted in another way.

Legend: C training FLOPs, L loss in nats per token. How each convention counts: docs/flops.md.
"""

from dataclasses import dataclass

import pandas as pd

from analysis.equal_cost import EqualCost, compare_at_equal, num_missing, of_pair
from analysis.gaps import Gap
from analysis.isoflop import IsoflopFit

CONVENTIONS = ("flops_chinchilla", "flops_6n_active", "flops_6n_total", "flops_non_embedding")
"""Columns of the frame, beside `flops` itself."""


@dataclass(frozen=True)
class Recount:
    """A gap, and what becomes of it at equal FLOPs in every convention."""

    gap: Gap
    others: tuple[EqualCost, ...]
    """By `CONVENTIONS`."""

    @property
    def winner(self) -> str | None:
        """At equal FLOPs as they were executed; None without a gap."""
        return _winner(self.gap.pair.variant, self.gap.pair.reference, self._nats)

    @property
    def changed(self) -> tuple[str, ...]:
        """The conventions under which the other variant wins."""
        if self.winner is None:
            return ()
        winners = {found.column: self._winner_by(found) for found in self.others}
        return tuple(name for name, who in winners.items() if who not in (None, self.winner))

    @property
    def unknown(self) -> tuple[EqualCost, ...]:
        """The conventions that cannot be read."""
        return tuple(found for found in self.others if found.difference is None)

    @property
    def _nats(self) -> float | None:
        return self.gap.difference.nats if self.gap.difference else None

    def _winner_by(self, found: EqualCost) -> str | None:
        nats = found.difference.nats if found.difference else None
        return _winner(found.pair.variant, found.pair.reference, nats)


def _winner(variant: str, reference: str, nats: float | None) -> str | None:
    if nats is None or nats == 0:
        return None
    return variant if nats > 0 else reference


def recount(fit: IsoflopFit, frame: pd.DataFrame, gap: Gap) -> Recount:
    """Read both variants' losses off their lower envelopes at equal FLOPs, convention by
    convention; `equal_cost.compare_at_equal` says how.

    Args:
        fit: of the frame.
        frame: as `load_runs` returns it.
        gap: at equal FLOPs as they were executed.
    """
    rows = of_pair(frame, gap.pair)
    return Recount(gap, tuple(_at_equal(fit, rows, gap, name) for name in CONVENTIONS))


def _at_equal(fit: IsoflopFit, rows: pd.DataFrame, gap: Gap, column: str) -> EqualCost:
    missing = num_missing(rows, column)
    if missing:
        why = f"{missing} of {len(rows)} runs have no {column}"
        return EqualCost(gap.pair, column, float("nan"), None, why)
    return compare_at_equal(fit, rows, gap.pair, column)
