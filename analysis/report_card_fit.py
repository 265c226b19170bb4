"""The part of the reproducibility card that concerns the fits: forms, losses, intervals, errors."""

from collections.abc import Iterator

import numpy as np

from analysis.equal_cost import View
from analysis.evidence import MIN_BUDGETS
from analysis.fitting import DELTA, NUM_STARTS
from analysis.isoflop import PowerLaw
from analysis.laws import power_law
from analysis.load import usable
from analysis.minimum import NUM_REPLICATES
from analysis.parametric import GRID
from analysis.profile import Profile
from analysis.study_report import StudyReport
from peer_scaling.record import budget_label

NOT_COMPUTED = "not computed"
FORMS = (
    (
        "Fit: isoFLOP curves",
        "loss against ln N at the means over seeds: parabola, cubic or Akima interpolant, the one "
        "that predicts left-out sizes best; weighted least squares, solved directly, no starts",
    ),
    (
        "Fit: power laws",
        "ln N*, ln D*, ln L* against ln C; least squares weighted by the standard errors of the "
        "minima, solved directly, no starts",
    ),
    (
        "Fit: L(N, D), for the gate's held-out error",
        f"E + A / N^alpha + B / D^beta; sum of Huber losses of ln L with delta {DELTA:g}; Newton's "
        f"method from the best {NUM_STARTS} of {len(GRID)} x {len(GRID)} starts",
    ),
    (
        "Intervals",
        f"N*, L*: 95 %, percentiles of {NUM_REPLICATES} repetitions of the whole procedure with "
        "noise of the seeds, or of the scatter around the curve; exponents: Student's t of the "
        "errors of the minima and their scatter; gaps: Student's t of the differences by seed, or "
        "of the errors of both minima; p-values corrected by Holm's method (docs/profiles.md, "
        "docs/compare.md)",
    ),
)


def fit_items(report: StudyReport) -> Iterator[tuple[str, str]]:
    """Forms, residuals, and errors of budgets that were left out."""
    yield from FORMS
    yield "Residuals: isoFLOP curves", _curve_residuals(report)
    yield "Residuals: power laws", "; ".join(_law_residuals(report)) or NOT_COMPUTED
    yield "Leaving out one budget: power laws", _law_errors(report)
    yield "Leaving out one budget: L(N, D)", _surface_errors(report)


def _curve_residuals(report: StudyReport) -> str:
    """Of the mean losses over seeds from the frozen curves, by variant."""
    found: dict[str, list[float]] = {}
    for profile in report.fit.profiles:
        if len(profile.curve_loss):
            found.setdefault(profile.variant, []).extend(_off_curve(report, profile))
    parts = [f"{variant} {_rms(off):.4f} nats" for variant, off in found.items() if off]
    return f"root mean square of sizes: {', '.join(parts)}" if parts else NOT_COMPUTED


def _off_curve(report: StudyReport, profile: Profile) -> Iterator[float]:
    """Sizes in the range of the curve, runs that its fit left out apart."""
    left_out = [run.run for run in profile.left_out]
    rows = report.study.rows(profile.variant, profile.budget)
    rows = rows.loc[~rows["run_id"].isin(left_out)]
    means = rows.groupby("size")[[report.fit.axis, "loss"]].mean()
    log_N, loss = np.log(means[report.fit.axis].to_numpy()), means["loss"].to_numpy()
    drawn = np.interp(log_N, np.log(profile.curve_num_params), profile.curve_loss)
    yield from (loss - drawn).tolist()


def _rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _law_residuals(report: StudyReport) -> Iterator[str]:
    for law in (law for law in report.fit.laws if law.num_budgets > 2):
        optima = report.fit.optima(law.variant)
        C = np.array([p.budget for p in optima])
        values = {"N": [p.num_params for p in optima], "D": [p.tokens for p in optima]}
        y = np.array(values.get(law.of) or [p.loss for p in optima])
        off = power_law(law.log_coefficient, law.exponent, C) / y - 1
        yield f"{law.variant} {law.of}* {', '.join(f'{100 * x:+.2f} %' for x in off)}"


def _law_errors(report: StudyReport) -> str:
    parts = [_law_error(law) for law in report.fit.laws if np.isfinite(law.left_out_error)]
    return "; ".join(parts) or f"{NOT_COMPUTED}: needs {MIN_BUDGETS} budgets with a minimum"


def _law_error(law: PowerLaw) -> str:
    return f"{law.variant} {law.of}* {100 * law.left_out_error:.2f} %"


def _surface_errors(report: StudyReport) -> str:
    """As the gate has them: of the variants that are compared."""
    claims = report.comparison.claims[View.FLOPS] if report.comparison else ()
    parts = [part for claim in claims for part in claim.protocol.held_out_error.parts]
    budgets = ", ".join(map(budget_label, sorted(set(usable(report.frame)["budget"]))))
    return "; ".join(dict.fromkeys(part.evidence for part in parts)) or (
        f"{NOT_COMPUTED}: nothing is compared (budgets {budgets})"
    )
