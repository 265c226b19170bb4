"""IsoFLOP profiles: a curve per (variant, budget), its minimum, and power laws over budgets.

Approach 2 of Hoffmann et al. 2022 (2203.15556). What cannot be answered is refused by name; every
answer has an interval. How: docs/profiles.md.

Legend, as in the papers: N parameters, D training tokens, C training FLOPs, L loss in nats per
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.diagnostics import held_out_power_law
from analysis.fitting import CONFIDENCE, student_quantile
from analysis.load import AnalysisError, as_frame, usable
from analysis.powerlaw import PowerFit, fit_power_law
from analysis.profile import Profile
from analysis.profiles import fit_profile

ORDER = ("dense", "moe", "pkm", "peer")
AXES = ("num_params_total", "num_params_active")
ROUNDING = 1e-9
"""Smallest standard error of a logarithm that weights a minimum: below it, losses without noise."""


@dataclass(frozen=True)
class PowerLaw:
    """of = exp(log_coefficient) C^exponent through the ok minima of a variant."""

    variant: str
    of: str
    """`N`, `D` or `L`."""
    log_coefficient: float
    exponent: float
    exponent_stderr: float
    """From the standard errors of the minima, and from their scatter around the law where it is
    wider; NaN with two budgets, through which any power law passes."""
    num_budgets: int
    left_out_error: float
    """Mean |y' / y - 1| over the minima, each by the law through the others; NaN below three
    budgets."""
    largest_error: float
    """y' / y - 1 of the largest budget by the law through the others; NaN likewise."""

    @property
    def exponent_margin(self) -> float:
        """Half width of the exponent's 95 % interval: 12.7 standard errors with three budgets."""
        return student_quantile(self.num_budgets - 2) * self.exponent_stderr


@dataclass(frozen=True)
class IsoflopFit:
    """All profiles of a study and the power laws over them."""

    axis: str
    """What N counts: a column of the frame."""
    profiles: tuple[Profile, ...]
    laws: tuple[PowerLaw, ...]

    def profile(self, variant: str, budget: float) -> Profile | None:
        """The profile of a variant at a budget."""
        found = (p for p in self.profiles if (p.variant, p.budget) == (variant, budget))
        return next(found, None)

    @property
    def variants(self) -> list[str]:
        """Labels of the variants: the paper's four in its order, then others by name."""
        found = {p.variant for p in self.profiles}
        return [v for v in ORDER if v in found] + sorted(found - set(ORDER))

    @property
    def budgets(self) -> list[float]:
        """Budgets, ascending."""
        return sorted({p.budget for p in self.profiles})

    def optima(self, variant: str) -> list[Profile]:
        """The variant's profiles with a minimum, by budget."""
        own = [p for p in self.profiles if p.variant == variant and p.ok]
        return sorted(own, key=lambda p: p.budget)


def fit_isoflop(
    frame: pd.DataFrame, axis: str = "num_params_total", level: float = CONFIDENCE
) -> IsoflopFit:
    """Fit every profile of a frame and the power laws over their minima.

    Args:
        frame: as `load_runs` returns it, or anything that `load.as_frame` takes; excluded rows
            are left out.
        axis: what N counts, one of `AXES`.
        level: of the intervals of N*.

    Raises:
        AnalysisError: no usable row, or runs of several studies, which need not be comparable.
    """
    if axis not in AXES:
        raise AnalysisError(f"axis={axis!r}: choose one of {', '.join(AXES)}")
    rows = usable(as_frame(frame))
    if rows.empty:
        raise AnalysisError(f"none of {len(frame)} runs is usable; their reasons are in `excluded`")
    if not (np.isfinite(rows[axis]) & (rows[axis] > 0)).all():
        raise AnalysisError(f"axis={axis}: not every usable run has a positive {axis}")
    studies = sorted(set(rows["study"]))
    if len(studies) > 1:
        names = ", ".join(studies)
        raise AnalysisError(
            f"runs of several studies ({names}): analyse one study's folder at a time"
        )
    cells = sorted(set(zip(rows["variant"], rows["budget"], strict=True)))
    profiles = [
        fit_profile(v, C, rows.loc[(rows["variant"] == v) & (rows["budget"] == C)], axis, level)
        for v, C in cells
    ]
    profiles.sort(key=lambda p: p.budget)
    fit = IsoflopFit(axis, tuple(profiles), ())
    laws = [law for variant in fit.variants for law in _power_laws(variant, fit.optima(variant))]
    return IsoflopFit(axis, tuple(profiles), tuple(laws))


def _power_laws(variant: str, optima: Sequence[Profile]) -> list[PowerLaw]:
    C = np.array([p.budget for p in optima])
    return [_power_law(variant, of, C, fit) for of, fit in power_fits(optima).items()]


def power_fits(optima: Sequence[Profile]) -> dict[str, PowerFit]:
    """Ln N*, ln D* and ln L* against ln C, every minimum weighted by its standard error; none from
    fewer than two budgets.
    """
    if len(optima) < 2:
        return {}
    values = {
        "N": [(p.num_params, p.num_params_log_stderr) for p in optima],
        "D": [(p.tokens, p.tokens_log_stderr) for p in optima],
        "L": [(p.loss, p.loss_stderr / p.loss) for p in optima],
    }
    C = np.array([p.budget for p in optima])
    return {of: _power_fit(C, np.array(points)) for of, points in values.items()}


def _power_fit(C: np.ndarray, points: np.ndarray) -> PowerFit:
    return fit_power_law(C, points[:, 0], np.maximum(points[:, 1], ROUNDING))


def _power_law(variant: str, of: str, C: np.ndarray, fit: PowerFit) -> PowerLaw:
    errors = held_out_power_law(fit, C) if len(C) > 2 else None
    return PowerLaw(
        variant=variant,
        of=of,
        log_coefficient=fit.log_coefficient,
        exponent=fit.exponent,
        exponent_stderr=fit.exponent_stderr,
        num_budgets=len(C),
        left_out_error=errors.mean_abs_error if errors else float("nan"),
        largest_error=errors.largest.mean_error if errors else float("nan"),
    )
