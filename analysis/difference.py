"""A difference of two losses with its error: interval, p-value, smallest gap that could be found.

Losses are nats per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

from analysis.fitting import CONFIDENCE, student_quantile

LEVEL = 1 - CONFIDENCE
"""Two-sided."""
POWER = 0.8
MIN_SEEDS = 3
"""With two, one difference is left for the noise: an interval of 12.7 standard errors."""
MOST_SEEDS = 100
"""More are not proposed."""
SEED_COUNTS = np.arange(MIN_SEEDS, MOST_SEEDS + 1)
ROUNDING = 1e-9
"""Nats: seeds that differ by less are copies of one run."""


class Source(StrEnum):
    """Where the error of a difference comes from."""

    SEEDS = "differences by seed"
    """Both variants on the same seeds, three or more: Student's t of one difference per seed."""
    PROFILES = "errors of both profiles"
    """Too few shared seeds: the errors of both minima, taken as independent."""
    NONE = "no error"
    """Nothing says how large it is."""


@dataclass(frozen=True)
class Difference:
    """A mean difference, positive where the variant's loss is below the reference's."""

    nats: float
    stderr: float
    """NaN without an error."""
    dof: float
    source: Source
    num_seeds: int
    """That both variants were trained on, at the sizes compared."""
    note: str
    """What is not in the error, or why seeds could not be paired; empty if there is nothing."""

    @property
    def margin(self) -> float:
        """Half width of the 95 % interval."""
        return student_quantile(self.dof) * self.stderr if self.dof > 0 else float("nan")

    @property
    def low(self) -> float:
        """End of the 95 % interval."""
        return self.nats - self.margin

    @property
    def high(self) -> float:
        """End of the 95 % interval."""
        return self.nats + self.margin

    @property
    def p_value(self) -> float:
        """Two-sided, of no difference, by Student's t; NaN without an error."""
        if not (self.dof > 0 and self.stderr > 0):
            return float("nan")
        return float(2 * stdtr(self.dof, -abs(self.nats) / self.stderr))

    @property
    def minimum_detectable(self) -> float:
        """The gap that would have been found with 80 % chance, see `minimum_detectable`."""
        return minimum_detectable(self.stderr, self.dof)

    def detectable_at(self, p_holm: float) -> float:
        """The same at the level that Holm's correction leaves this gap: 5 % by p over corrected p,
        which is 5 % over the number of gaps at the first step. Without a corrected p-value, at 5 %.
        """
        share = self.p_value / p_holm if p_holm > 0 else 1.0
        return minimum_detectable(self.stderr, self.dof, LEVEL * share)

    def seeds_needed(self, level: float) -> int | None:
        """Shared seeds after which a gap of this size would exceed the minimum detectable one at
        `level`, the noise staying what it is; None beyond `MOST_SEEDS`,
        or without an error.
        """
        if not self.stderr > 0:
            return None
        spread = self.stderr * np.sqrt(max(self.num_seeds, 1))
        num_S = SEED_COUNTS
        t_S = abs(self.nats) / (spread / np.sqrt(num_S))
        enough_S = t_S > _detectable_by_seeds(level)
        return int(num_S[enough_S][0]) if enough_S.any() else None


def minimum_detectable(stderr: float, dof: float, level: float = LEVEL) -> float:
    """The gap that a two-sided test at `level` finds with 80 % chance (MDE).

    stderr times the noncentrality at which noncentral t with `dof` exceeds the 1 - level / 2
    quantile of t with probability 0.8 (Cohen 1988, chapter 2). Bloom 1995 (Evaluation Review
    19(5), 547-556) has the common approximation stderr (t_0.975 + t_0.8): 2.80 stderr for many
    degrees of freedom, where both agree, and 5.36 instead of 5.65 with two. NaN without an error.
    """
    return float(stderr * _detectable(np.array(dof), level)) if dof > 0 else float("nan")


@cache
def _detectable_by_seeds(level: float) -> np.ndarray:
    """For each of `SEED_COUNTS`: 2 ms, of few levels."""
    return _detectable(SEED_COUNTS - 1.0, level)


def _detectable(dof: np.ndarray, level: float) -> np.ndarray:
    """In standard errors."""
    return nctdtrinc(dof, 1 - POWER, stdtrit(dof, 1 - level / 2))


def by_seed(difference_S: np.ndarray, note: str = "") -> Difference | None:
    """One difference per seed; None with fewer than `MIN_SEEDS` or seeds that are copies.

    Args:
        difference_S: nats, one per seed that both variants have.
        note: kept.
    """
    num = len(difference_S)
    if num < MIN_SEEDS or np.ptp(difference_S) < ROUNDING:
        return None
    stderr = float(difference_S.std(ddof=1) / np.sqrt(num))
    return Difference(float(difference_S.mean()), stderr, num - 1.0, Source.SEEDS, num, note)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): p-values that hold for all of a family together.

    The k-th smallest of m is multiplied by m - k + 1, and is no smaller than those before it.

    Args:
        p_values: of the family; NaN is no member and stays NaN.
    """
    p = np.asarray(p_values, dtype=float)
    members = np.flatnonzero(np.isfinite(p))
    order = members[np.argsort(p[members], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return adjusted.tolist()
