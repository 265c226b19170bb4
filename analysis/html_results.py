"""Tables of results: minima, perplexities, compute multipliers, power laws."""

import numpy as np

from analysis import tables
from analysis.captions import refusal_lines
from analysis.claims import Claim
from analysis.equal_cost import View
from analysis.figures import count_label, interval
from analysis.html_table import Cell, frame_table, number, table
from analysis.isoflop import PowerLaw
from analysis.leak import EXPLAINED, TITLE, leak_table
from analysis.load import display_name
from analysis.markup import Content, Html, bullets, element, paragraph, section
from analysis.profile import Profile
from analysis.study_report import StudyReport
from analysis.verdicts import Comparison
from peer_scaling.record import budget_label

OPTIMA = (
    "variant", "budget", "status", "N*", "95 % of N*", "D*", "L*", "95 % of L*", "perplexity",
    "best trained size", "its loss", "sizes", "runs", "curve", "interval from",
)  # fmt: skip
LAWS = ("variant", "of", "exponent", "+- (95 %)", "budgets", "without one", "at the largest")
MULTIPLIERS = ("variant", "reference", "budget", "times", "low", "high", "reference's budgets")
NOTHING = ""
"""Where there is no minimum: the status says why."""


def results_section(report: StudyReport) -> Html:
    """All of them."""
    fit, frame = report.fit, report.frame
    parts: list[Content] = [
        table(OPTIMA, [_optimum(report, p) for p in report.profiles], "Minima of the curves"),
        frame_table(
            tables.perplexity_table(fit, frame), "Perplexity at the minimum, by training FLOPs"
        ),
        _multipliers(report),
        table(LAWS, [_law(report, law) for law in fit.laws], "Power laws over budgets"),
        paragraph(
            "N* (parameters), D* (tokens) and L* (nats per token) as powers of training FLOPs. "
            "Held-out errors: mean over the budgets, each from the law through the others; and of "
            "the largest from the others, with its sign. They need three budgets.",
            "quiet",
        ),
    ]
    use = tables.expert_use_table(fit, frame)
    if not use.empty:
        parts.append(frame_table(use, "Use of the experts at the best trained size"))
    leaks = leak_table(frame)
    if not leaks.empty:
        parts += [frame_table(leaks, TITLE), paragraph(EXPLAINED, "quiet")]
    return section("results", "Tables", *parts)


def refusals(report: StudyReport) -> Html:
    """The curves without a minimum, for the section of the curves."""
    lines = [line.removeprefix("- ") for line in refusal_lines(report.fit)]
    title = element("h3", "Curves without a minimum")
    return element("div", title, bullets(lines) if lines else paragraph("None."))


def _optimum(report: StudyReport, p: Profile) -> list[Cell | str]:
    name = display_name(p.variant, report.frame)
    cells = [name, budget_cell(p.budget), str(p.status), *_minimum(p)]
    return [
        *cells,
        p.best_size,
        number(p.best_loss, "{:.4f}"),
        Cell(str(p.num_sizes), p.num_sizes),
        Cell(str(p.num_runs), p.num_runs),
        str(p.shape or NOTHING),
        str(p.noise or NOTHING),
    ]


def _minimum(p: Profile) -> list[Cell | str]:
    if not p.ok:
        return [NOTHING] * 6
    low, high = interval(p, "N")
    ends = interval(p, "L")
    return [
        Cell(count_label(p.num_params), p.num_params),
        f"{count_label(low)} to {count_label(high)}" if np.isfinite(low) else NOTHING,
        Cell(count_label(p.tokens), p.tokens),
        number(p.loss, "{:.4f}"),
        f"{ends[0]:.4f} to {ends[1]:.4f}" if np.isfinite(ends[0]) else NOTHING,
        number(float(np.exp(p.loss)), "{:.2f}"),
    ]


def budget_cell(budget: float) -> Cell:
    """A budget by its label, sorted by its FLOPs."""
    return Cell(budget_label(budget), budget)


def _multipliers(report: StudyReport) -> Html:
    caption = "Compute multipliers"
    comparison = report.comparison
    rows = [_multiplier(comparison, c) for c in comparison.claims[View.FLOPS]] if comparison else []
    explained = (
        "FLOPs that the reference needs for the variant's loss, over the budget, with a 95 % "
        "interval: above 1, the variant is ahead. Whether that is shown, the verdicts say."
    )
    found = table(MULTIPLIERS, [row for row in rows if row], caption)
    return element("div", found, paragraph(explained, "quiet"))


def _multiplier(comparison: Comparison, claim: Claim) -> list[Cell | str]:
    times = comparison.multiplier(claim.pair)
    if times is None:
        return []
    names = [claim.pair.variant, claim.pair.reference, budget_cell(claim.pair.budget)]
    if np.isnan(times.multiplier):
        return [*names, "unknown: the reference's minima do not fall", NOTHING, NOTHING, NOTHING]
    numbers = [number(x, "{:.2f}", NOTHING) for x in (times.multiplier, times.low, times.high)]
    return [*names, *numbers, "beyond" if times.extrapolated else "within"]


def _law(report: StudyReport, law: PowerLaw) -> list[Cell | str]:
    few = "needs 3 budgets"
    return [
        display_name(law.variant, report.frame),
        f"{law.of}*",
        number(law.exponent, "{:+.4f}"),
        number(law.exponent_margin, "{:.4f}", few),
        Cell(str(law.num_budgets), law.num_budgets),
        number(100 * law.left_out_error, "{:.2f} %", few),
        number(100 * law.largest_error, "{:+.2f} %", few),
    ]
