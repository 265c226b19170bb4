"""The verdicts of the claim gate: one sentence, a table, and what is missing."""

from collections import Counter
from collections.abc import Iterable

import pandas as pd

from analysis.claims import Claim
from analysis.compare_text import (
    CAVEATS,
    conventions_table,
    gaps_table,
    missing_conditions,
    with_margin,
)
from analysis.equal_cost import View
from analysis.html_table import Cell, table, written
from analysis.markup import Html, bullets, element, folded, joined, paragraph, section
from analysis.study_report import StudyReport
from analysis.verdicts import Comparison
from peer_scaling.record import budget_label

MISSING = "missing at equal FLOPs"


def answer(report: StudyReport) -> Html:
    """What may be claimed, in one sentence; of what may not, what is missing."""
    if report.comparison is None:
        return element("p", f"Not shown: {report.why_not}.", class_="answer")
    comparison = report.comparison
    shown = [_shown(comparison, view) for view in View]
    claims = [claim for view in View for claim in comparison.claims[view]]
    open_ = [claim for claim in claims if claim.ranked and not claim.beats]
    said = "; ".join(filter(None, shown))
    if not said:
        return element("p", _nothing(claims, open_), class_="answer")
    rest = f"; not shown: {len(open_)} other claims, which lack {_lacking(open_)}" if open_ else ""
    return element("p", f"Shown: {said}{rest}.", class_="answer shown")


def _nothing(claims: list[Claim], open_: list[Claim]) -> str:
    if not open_:
        return f"Not shown: none of {len(claims)} claims may be ranked, for reasons given below."
    return (
        f"Not shown: which variant is better; none of {len(open_)} claims passes the gate. What is "
        f"missing, and from how many: {_lacking(open_)}."
    )


def _shown(comparison: Comparison, view: View) -> str:
    budgets: dict[tuple[str | None, str | None], list[str]] = {}
    for claim in comparison.claims[view]:
        if claim.beats:
            key = (claim.winner, claim.loser)
            budgets.setdefault(key, []).append(budget_label(claim.pair.budget))
    said = [f"{winner} beats {loser} at {', '.join(C)}" for (winner, loser), C in budgets.items()]
    return f"at {view} {' and '.join(said)}" if said else ""


def _lacking(claims: Iterable[Claim]) -> str:
    counts = Counter(name for claim in claims for name in claim.missing)
    return ", ".join(f"{words(name)} ({num})" for name, num in counts.most_common())


def words(name: str) -> str:
    """A condition's name as it is read."""
    return name.replace("_", " ").replace("mde", "MDE")


def verdicts_section(report: StudyReport) -> Html:
    """The table of three equalities and, folded, its reasons and numbers."""
    comparison = report.comparison
    if comparison is None:
        return section("verdicts", "Verdicts", paragraph(f"None: {report.why_not}."))
    header = ["pair", "budget", *(str(view) for view in View), MISSING]
    rows = [_row(comparison, i) for i in range(len(comparison.recounts))]
    tested = comparison.num_tests(View.FLOPS)
    numbers = _by_pair(comparison, gaps_table(comparison))
    conventions = _by_pair(comparison, conventions_table(comparison))
    return section(
        "verdicts",
        "Verdicts",
        paragraph(
            f"Every two variants at every budget, {len(rows)} gaps, {tested} of them ranked and "
            "tested at equal FLOPs. A gap is the second variant's loss less the first's, in nats "
            "per token, with its 95 % interval."
        ),
        table(header, rows, "Verdicts of the claim gate"),
        element("h3", "What is missing, and the runs that would settle it"),
        *(_missing(comparison) or [paragraph("Nothing.")]),
        folded("At equal FLOPs, the numbers alone", numbers),
        folded("Under other FLOP conventions", conventions),
        paragraph(CAVEATS, "quiet"),
    )


def _row(comparison: Comparison, i: int) -> list[Cell | str]:
    claims = [comparison.claims[view][i] for view in View]
    pair = claims[0].pair
    why = ", ".join(map(words, claims[0].missing)) if claims[0].ranked else claims[0].verdict
    budget = Cell(budget_label(pair.budget), pair.budget)
    return [f"{pair.variant} - {pair.reference}", budget, *map(_verdict, claims), why]


def _verdict(claim: Claim) -> Cell:
    """The gap, and what may be said of it."""
    if claim.beats:
        said = element("span", f"{claim.winner} beats {claim.loser}", class_="said shown")
    elif claim.ranked:
        said = element("span", "not shown", class_="said open")
    else:
        said = element("span", "not ranked", class_="said")
    if claim.difference is None:
        return Cell(said)
    gap = with_margin(claim.difference)
    return Cell(joined([gap, " ", said]), claim.difference.nats)


def _missing(comparison: Comparison) -> list[Html]:
    return [
        folded(f"{words(found.name)}: missing from {found.num_claims} claims", bullets(found.lines))
        for found in missing_conditions(comparison)
    ]


def _by_pair(comparison: Comparison, frame: pd.DataFrame) -> Html:
    """A table of the gaps, its label taken apart so that it can be sorted by budget."""
    pairs = [claim.pair for claim in comparison.claims[View.FLOPS]]
    rows = [
        [pair.variant, pair.reference, Cell(budget_label(pair.budget), pair.budget)]
        + [written(str(text)) for text in values]
        for pair, values in zip(pairs, frame.to_numpy(), strict=True)
    ]
    return table(["variant", "reference", "budget", *map(str, frame.columns)], rows)
