"""Whether learning rates were tuned, what seeds say of the noise, which runs do not count."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from analysis.claims import Claim
from analysis.conditions import Condition
from analysis.equal_cost import View
from analysis.html_results import budget_cell
from analysis.html_table import NOT_RECORDED, Cell, number, table
from analysis.load import display_name, usable
from analysis.markup import Html, bullets, folded, paragraph, section
from analysis.profile import Profile
from analysis.study_report import StudyReport
from analysis.tuning import MIN_LEARNING_RATES, best_at_an_end, losses_by_learning_rate
from peer_scaling.record import budget_label

RATES = ("variant", "budget", "sizes", "rates used", "sizes with several rates", "best is inside")
TRIED = ("variant", "budget", "size", "rates", "best rate", "mean loss by rate", "best is")
SEEDS = (
    "variant", "budget", "seeds", "seeds per size", "noise of a run (nats)", "from",
    "largest spread at a size",
)  # fmt: skip
MOST_RATES = 4
"""That are listed one by one."""
EXCLUDED = ("run", "variant", "size", "budget", "seed", "status", "loss", "reason")


def evidence_section(report: StudyReport) -> Html:
    """Learning rates and seeds."""
    profiles = report.profiles
    cells = {p: losses_by_learning_rate(report.study, p.variant, p.budget) for p in profiles}
    tried = [row for p in profiles for row in _tried(report, p, cells[p])]
    return section(
        "evidence",
        "Evidence on learning rates and seeds",
        table(RATES, [_rates(report, p, cells[p]) for p in profiles], "Learning rates"),
        table(TRIED, tried, "Sizes trained at several learning rates"),
        *_said_of_rates(report),
        table(SEEDS, [_seeds(report, p) for p in profiles], "Seeds"),
        paragraph(
            "The noise of a run is the standard deviation that the intervals of a minimum are made "
            "from; the spread is between the best and the worst seed of one size.",
            "quiet",
        ),
    )


def _rates(
    report: StudyReport, p: Profile, cells: dict[str, dict[float, float]]
) -> list[Cell | str]:
    rates = sorted({lr for found in cells.values() for lr in found})
    several = [found for found in cells.values() if len(found) > 1]
    inside = [
        found for found in several if len(found) >= MIN_LEARNING_RATES and not best_at_an_end(found)
    ]
    return [
        display_name(p.variant, report.frame),
        budget_cell(p.budget),
        Cell(str(len(cells)), len(cells)),
        _listed(rates),
        Cell(str(len(several)), len(several)),
        Cell(f"{len(inside)} of {len(several)}", len(inside)),
    ]


def _listed(rates: Sequence[float]) -> str:
    if not rates:
        return NOT_RECORDED
    if len(rates) > MOST_RATES:
        return f"{len(rates)} from {rates[0]:.3g} to {rates[-1]:.3g}"
    return ", ".join(f"{lr:.3g}" for lr in rates)


def _tried(
    report: StudyReport, p: Profile, cells: dict[str, dict[float, float]]
) -> Iterator[list[Cell | str]]:
    for size, found in cells.items():
        if len(found) > 1:
            best = min(found, key=found.__getitem__)
            losses = [
                f"{lr:g}: {found[lr]:.4f}" if np.isfinite(found[lr]) else f"{lr:g}: diverged"
                for lr in sorted(found)
            ]
            yield [
                display_name(p.variant, report.frame),
                budget_cell(p.budget),
                size,
                Cell(str(len(found)), len(found)),
                number(best),
                ", ".join(losses),
                "at an end" if best_at_an_end(found) else "inside",
            ]


def _said_of_rates(report: StudyReport) -> list[Html]:
    """What the gate makes of it."""
    claims = report.comparison.claims[View.FLOPS] if report.comparison else ()
    lines = dict.fromkeys(line for claim in claims for line in _conditions(claim))
    if not lines:
        return []
    return [folded("What the gate says of tuning", bullets(list(lines)))]


def _conditions(claim: Claim) -> Iterator[str]:
    own: tuple[Condition, ...] = claim.protocol.learning_rates_interior.parts
    for part in own:
        yield f"{part.status} at {budget_label(claim.pair.budget)}: {part.evidence}"
    yield f"{claim.protocol.equal_tuning.status}: {claim.protocol.equal_tuning.evidence}"


def _seeds(report: StudyReport, p: Profile) -> list[Cell | str]:
    rows = report.study.rows(p.variant, p.budget)
    seeds = sorted({int(seed) for seed in rows["seed"] if pd.notna(seed)})
    losses = [own["loss"].to_numpy() for _, own in rows.groupby("size")]
    least, most = min(map(len, losses)), max(map(len, losses))
    return [
        display_name(p.variant, report.frame),
        budget_cell(p.budget),
        ", ".join(map(str, seeds)) or NOT_RECORDED,
        Cell(str(least) if least == most else f"{least} to {most}", least),
        number(p.noise_stderr, "{:.4f}", "no minimum"),
        str(p.noise or ""),
        number(float(max(map(np.ptp, losses))), "{:.4f}") if most > 1 else Cell("one seed"),
    ]


def excluded_section(report: StudyReport) -> Html:
    """Every run that does not count, and why; those that are in no fit of a curve, too."""
    frame = report.frame
    left = frame.loc[frame["excluded"].notna()]
    rows = [_excluded(row, row["excluded"]) for row in left.to_dict("records")]
    of_run = {row["run_id"]: row for row in usable(frame).to_dict("records")}
    for p in report.profiles:
        for far in p.left_out:
            known = {"run_id": far.run, "variant": p.variant, "budget": p.budget, "loss": far.loss}
            rows.append(_excluded(of_run.get(far.run, {}) | known, f"in no fit: {far.reason}"))
    return section(
        "excluded",
        "Excluded runs",
        paragraph(
            f"Excluded: {len(left)} of {len(frame)} runs. Counted, but in no fit of a curve: "
            f"{len(rows) - len(left)}."
        ),
        table(EXCLUDED, rows, "All of them"),
    )


def _excluded(row: dict[str, object], why: str) -> list[Cell | str]:
    budget, loss = (float(str(row.get(name))) for name in ("budget", "loss"))
    seed = row.get("seed")
    return [
        _text(row.get("run_id")),
        _text(row.get("variant")),
        _text(row.get("size")),
        budget_cell(budget) if np.isfinite(budget) else "",
        Cell(_text(seed), seed if isinstance(seed, int) else None),
        _text(row.get("status")),
        number(loss, "{:.4f}", ""),
        why,
    ]


def _text(value: object) -> str:
    return str(value) if value is not None and value == value else ""
