"""The comparison of a study as rows and as text."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.claims import Claim, condition_rows
from analysis.conditions import Condition
from analysis.difference import Difference
from analysis.equal_cost import View
from analysis.leak import EXPLAINED, TITLE, leak_table
from analysis.load import excluded, routed_name, usable
from analysis.tables import to_markdown
from analysis.verdicts import Comparison
from peer_scaling.record import budget_label

NOTHING = ""
SHOWN = 4
"""Reasons per condition; `claims.csv` has all."""
CAVEATS = (
    "Positive: the first variant has the lower loss, in nats per token. Intervals are 95 %, not "
    "corrected; `Holm` is the p-value corrected over all ranked pairs and budgets. `MDE` is the "
    "gap that would be found with 80 % chance. `+-` is missing where fewer than 3 shared seeds say "
    "nothing of the noise. Contamination of the validation text is not in the records and not "
    "checked. How: docs/compare.md."
)


def comparison_table(comparison: Comparison) -> pd.DataFrame:
    """One row per pair and budget, at full precision."""
    rows = []
    for i, found in enumerate(comparison.recounts):
        claims = {view: comparison.claims[view][i] for view in View}
        row = _row(comparison, claims[View.FLOPS])
        row |= {f"nats_{e.column}": _nats(e.difference) for e in found.others}
        row["convention_dependent"] = bool(found.changed)
        for view, name in ((View.SECONDS, "seconds"), (View.MEMORY, "memory")):
            cost = comparison.costs[view][i]
            row |= {f"{name}_at": cost.at, f"{name}_reason": cost.reason}
            row |= {f"{name}_{k}": v for k, v in _numbers(claims[view]).items()}
        row |= {f"verdict_{view.name.lower()}": claims[view].verdict for view in View}
        rows.append(row)
    return pd.DataFrame(rows)


def _row(comparison: Comparison, claim: Claim) -> dict[str, object]:
    pair, difference = claim.pair, claim.difference
    times = comparison.multiplier(pair)
    return {
        "variant": pair.variant,
        "reference": pair.reference,
        "budget": budget_label(pair.budget),
        **_numbers(claim),
        "interval_from": str(difference.source) if difference else "",
        "shared_seeds": difference.num_seeds if difference else 0,
        "note": difference.note if difference else "",
        "multiplier": times.multiplier if times else np.nan,
        "multiplier_low": times.low if times else np.nan,
        "multiplier_high": times.high if times else np.nan,
        "extrapolated": times.extrapolated if times else "",
        "numbers_alone": _numbers_alone(claim),
    }


def _numbers(claim: Claim) -> dict[str, float]:
    d, nan = claim.difference, float("nan")
    if d is None:
        return dict.fromkeys(("nats", "low", "high", "p", "p_holm", "mde"), nan)
    return {
        "nats": d.nats,
        "low": d.low,
        "high": d.high,
        "p": d.p_value,
        "p_holm": claim.p_holm,
        "mde": d.minimum_detectable,
    }


def _nats(difference: Difference | None) -> float:
    return difference.nats if difference else float("nan")


def claims_table(comparison: Comparison) -> pd.DataFrame:
    """One row per condition of every claim."""
    claims = [claim for view in View for claim in comparison.claims[view]]
    table = pd.DataFrame(condition_rows(claims))
    return table.assign(budget=table["budget"].map(budget_label))


def report(comparison: Comparison) -> str:
    """The comparison in Markdown: verdicts, numbers, conventions, what is missing."""
    flops = comparison.claims[View.FLOPS]
    shown = [claim.verdict for view in View for claim in comparison.claims[view] if claim.beats]
    names = [routed_name(variant, comparison.frame) for variant in comparison.fit.variants]
    parts = [
        f"# Comparison of {', '.join(names)} in {comparison.study}",
        f"{len(usable(comparison.frame))} of {len(comparison.frame)} runs used; "
        f"{len(flops)} pairs and budgets, {comparison.num_tests(View.FLOPS)} of them ranked and "
        f"tested at equal FLOPs; {len(shown)} claims shown at equal FLOPs, wall-clock and memory.",
        "## Verdicts",
        to_markdown(_verdicts(comparison)),
        "## At equal FLOPs, the numbers alone",
        to_markdown(gaps_table(comparison)),
        "## Under other FLOP conventions",
        to_markdown(conventions_table(comparison)),
        "## Why not",
        *([_reasons(m) for m in missing_conditions(comparison)] or ["Nothing is missing."]),
        *_leak(comparison),
        "## Excluded runs",
        "\n".join(_excluded(comparison)) or "None.",
        CAVEATS,
    ]
    return "\n\n".join(parts)


def _leak(comparison: Comparison) -> list[str]:
    table = leak_table(comparison.frame)
    return [] if table.empty else [f"## {TITLE}", to_markdown(table), EXPLAINED]


def _excluded(comparison: Comparison) -> list[str]:
    left = excluded(comparison.frame)
    lines = [f"- {run}: {why}" for run, why in zip(left["run_id"], left["excluded"], strict=True)]
    left_out = [run for profile in comparison.fit.profiles for run in profile.left_out]
    return lines + [f"- {run.run}: {run.reason}" for run in left_out]


def _label(claim: Claim) -> str:
    pair = claim.pair
    return f"{pair.variant} - {pair.reference} at {budget_label(pair.budget)}"


def _indexed(claims: Iterable[Claim], rows: list[dict[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, index=pd.Index([_label(c) for c in claims], name="gap"))


def _verdicts(comparison: Comparison) -> pd.DataFrame:
    """Three equalities side by side."""
    rows = []
    for i in range(len(comparison.recounts)):
        claims = {view: comparison.claims[view][i] for view in View}
        rows.append({str(view): _cell(claim) for view, claim in claims.items()})
    return _indexed(comparison.claims[View.FLOPS], rows)


def _cell(claim: Claim) -> str:
    """The gap, and what may be said of it."""
    said = claim.verdict if claim.beats else "not shown" if claim.ranked else "not ranked"
    if claim.difference is None:
        return said
    return f"{with_margin(claim.difference)}: {said}"


def with_margin(difference: Difference) -> str:
    """A gap with the half width of its 95 % interval."""
    margin = "" if np.isnan(difference.margin) else f" +- {difference.margin:.3f}"
    return f"{difference.nats:+.3f}{margin}"


def gaps_table(comparison: Comparison) -> pd.DataFrame:
    """What the numbers alone say at equal FLOPs, as text, in the order of the claims."""
    claims = comparison.claims[View.FLOPS]
    return _indexed(claims, [_gap_row(comparison, claim) for claim in claims])


def _gap_row(comparison: Comparison, claim: Claim) -> dict[str, str]:
    d, times = claim.difference, comparison.multiplier(claim.pair)
    columns = ("nats", "95 %", "p", "Holm", "MDE", "seeds", "from", "compute", "numbers alone")
    if d is None:
        return dict.fromkeys(columns, NOTHING) | {"numbers alone": _numbers_alone(claim)}
    multiplier = NOTHING
    if times and np.isfinite(times.multiplier):
        beyond = " extrapolated" if times.extrapolated else ""
        multiplier = f"{times.multiplier:.2f}x [{times.low:.2f}, {times.high:.2f}]{beyond}"
    return {
        "nats": f"{d.nats:+.4f}",
        "95 %": f"[{d.low:+.4f}, {d.high:+.4f}]",
        "p": f"{d.p_value:.2g}",
        "Holm": NOTHING if np.isnan(claim.p_holm) else f"{claim.p_holm:.2g}",
        "MDE": f"{d.minimum_detectable:.4f}",
        "seeds": str(d.num_seeds),
        "from": str(d.source),
        "compute": multiplier,
        "numbers alone": _numbers_alone(claim),
    }


def _numbers_alone(claim: Claim) -> str:
    """What the statistical conditions say, the protocol aside."""
    if claim.difference is None:
        return "no gap"
    if not claim.ranked:
        return "not ranked"
    if claim.numbers_show:
        return f"{claim.winner} lower"
    return f"no: {', '.join(claim.statistics.missing())}"


def conventions_table(comparison: Comparison) -> pd.DataFrame:
    """The gap by every way to count FLOPs, as text, in the order of the claims."""
    rows = []
    for found in comparison.recounts:
        own = found.gap.difference
        row = {"flops": f"{own.nats:+.3f}" if own else NOTHING}
        for cost in found.others:
            row[cost.column] = f"{cost.difference.nats:+.3f}" if cost.difference else NOTHING
        row["winner"] = "convention-dependent" if found.changed else found.winner or NOTHING
        rows.append(row)
    return _indexed(comparison.claims[View.FLOPS], rows)


@dataclass(frozen=True)
class Missing:
    """A condition that keeps claims from being made."""

    name: str
    num_claims: int
    lines: tuple[str, ...]
    """The evidence, and what would settle it."""


def missing_conditions(comparison: Comparison) -> list[Missing]:
    """Per condition: how many claims lack it, by what evidence, and what would settle it; of pairs
    that are not ranked, that alone.
    """
    lines: dict[str, dict[str, None]] = {}
    counts: dict[str, int] = {}
    for view in View:
        for claim in comparison.claims[view]:
            missing = claim.missing if claim.ranked else {"causal": claim.protocol.causal}
            for name, found in missing.items():
                counts[name] = counts.get(name, 0) + 1
                own = lines.setdefault(name, {})
                own.update(dict.fromkeys(_line(part) for part in found.lacking))
    return [Missing(name, counts[name], tuple(lines[name])) for name in lines]


def _line(condition: Condition) -> str:
    steps = "; ".join(step.text for step in condition.settle)
    return f"{condition.evidence}{steps and '. Next: '}{steps}"


def _reasons(missing: Missing) -> str:
    head = f"### {missing.name}: missing from {missing.num_claims} claims\n"
    num_more = len(missing.lines) - SHOWN
    more = [f"- and {num_more} more: claims.csv"] if num_more > 0 else []
    return "\n".join([head, *(f"- {line}" for line in missing.lines[:SHOWN]), *more])
