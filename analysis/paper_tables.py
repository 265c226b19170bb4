"""Tables 1 and 2 of He 2024 (2407.04153) in its layout, from frozen results; the published numbers
beside ours.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.conditions import command
from analysis.evaluations import AS_TRAINED, Evaluations
from analysis.experts import ExpertsPoint, ExpertsStudy
from analysis.isoflop import IsoflopFit
from analysis.load import display_name, routings, usable
from analysis.paper_sets import HEADINGS, SetCell, below_text, heading, perplexity_text, set_cell
from analysis.profile import Profile
from analysis.records import TOP_1
from analysis.tables import BASELINE, published
from peer_scaling.record import budget_label

NORMS = ("none", "layer", "batch")
BITS = "bits per byte"
NO_EVALUATIONS = Evaluations()
OF_ROUTING = {AS_TRAINED: "loss_as_trained", TOP_1: "loss_top1"}
"""Columns with the losses that are not ranked."""


def table1(
    fit: IsoflopFit, frame: pd.DataFrame, evaluations: Evaluations = NO_EVALUATIONS
) -> pd.DataFrame:
    """Perplexity of the compute-optimal models: on the validation text of the study, the best
    trained size and the minimum of the curve apart; on the evaluation sets, that of the best
    trained size. Nats below dense of all; columns `bits per byte` last.

    One row per variant and budget, as table 1 has them, and one for each routing that is not
    ranked; a cell that cannot be filled says why.
    """
    sets = [*HEADINGS, *(name for name in evaluations.sets() if name not in HEADINGS)]
    rows = [
        row
        for budget in fit.budgets
        for row in _rows1(_Cells(fit, frame, evaluations, tuple(sets)), budget)
    ]
    table = pd.DataFrame(rows).set_index("method").fillna("")
    bits = [name for name in table.columns if name.startswith(BITS)]
    gaps = [name for name in table.columns if name.startswith("nats below dense, ")]
    first = [name for name in table.columns if name not in (*bits, *gaps)]
    return table.filter(items=[*first, *gaps, *bits])


@dataclass(frozen=True)
class _Cells:
    """What the cells of table 1 are made from."""

    fit: IsoflopFit
    frame: pd.DataFrame
    evaluations: Evaluations
    sets: tuple[str, ...]

    def runs(self, profile: Profile) -> pd.DataFrame:
        """Of the best trained size."""
        rows = usable(self.frame)
        own = (rows["variant"] == profile.variant) & (rows["budget"] == profile.budget)
        return rows.loc[own & (rows["size"] == profile.best_size)]

    def ranked(self, variant: str) -> str:
        """The routing of the losses in the frame."""
        return routings(self.frame).get(variant, AS_TRAINED)

    def of_sets(self, profile: Profile, routing: str) -> dict[str, SetCell]:
        """By set."""
        rows = self.runs(profile)
        runs = [(str(study), str(run)) for study, run in rows[["study", "run_id"]].to_numpy()]
        return {name: set_cell(self.evaluations, runs, name, routing) for name in self.sets}

    def others(self, profile: Profile) -> list[str]:
        """The routings that are not ranked and that a run of the best size has a number for."""
        rows = self.runs(profile)
        found = dict.fromkeys(r for r, name in OF_ROUTING.items() if len(rows[name].dropna()))
        for key in zip(rows["study"], rows["run_id"], strict=True):
            own = self.evaluations.by_run.get(key)
            for results in own.results.values() if own else ():
                found |= dict.fromkeys(results)
        return [routing for routing in found if routing != self.ranked(profile.variant)]


def _rows1(cells: _Cells, budget: float) -> Iterator[dict[str, str]]:
    base = cells.fit.profile(BASELINE, budget)
    base_sets = cells.of_sets(base, cells.ranked(BASELINE)) if base else {}
    for variant in cells.fit.variants:
        profile = cells.fit.profile(variant, budget)
        name = display_name(variant, cells.frame)
        label = budget_label(budget)
        if profile is None:
            study = str(usable(cells.frame)["study"].iloc[0])
            missing = f"no run: {command(study, variant=variant, budget=label)}"
            yield {"method": f"{name} ({label})", "best trained size": missing}
            continue
        own = cells.of_sets(profile, cells.ranked(variant))
        yield {
            "method": f"{name} ({label})",
            **_row1(profile, base),
            **_sets1(cells, own, base_sets),
        }
        for routing in cells.others(profile):
            own = cells.of_sets(profile, routing)
            row = {"method": f"{variant} ({_unranked(routing)}) ({label})"}
            yield row | _unranked_row(cells.runs(profile), routing) | _sets1(cells, own, base_sets)


def _row1(profile: Profile, base: Profile | None) -> dict[str, str]:
    gap = f"{base.loss - profile.loss:+.3f}" if base and base.ok and profile.ok else ""
    row = {
        "best trained size": profile.best_size,
        "its perplexity": f"{np.exp(profile.best_loss):.2f}",
        "perplexity at the minimum": str(profile.status),
        "95 %": "",
        "nats below dense": gap,
    }
    if profile.ok:
        low, high = profile.loss - profile.loss_margin, profile.loss + profile.loss_margin
        row["perplexity at the minimum"] = f"{np.exp(profile.loss):.2f}"
        row["95 %"] = f"{np.exp(low):.2f} to {np.exp(high):.2f}"
    return row


def _unranked(routing: str) -> str:
    if routing == AS_TRAINED:
        return f"{routing}, not causal"
    return f"{routing} routing, not ranked"


def _unranked_row(runs: pd.DataFrame, routing: str) -> dict[str, str]:
    """The perplexity on the validation text with another routing than the ranked one."""
    losses = runs[OF_ROUTING[routing]].dropna() if routing in OF_ROUTING else []
    known = perplexity_text(float(np.mean(losses))) if len(losses) else "not recorded"
    minimum = "no curve: not ranked"
    size = str(runs["size"].iloc[0])
    return {
        "best trained size": size, "its perplexity": known, "perplexity at the minimum": minimum
    }  # fmt: skip


def _sets1(
    cells: _Cells, own: Mapping[str, SetCell], base: Mapping[str, SetCell]
) -> dict[str, str]:
    row: dict[str, str] = {}
    for name, cell in own.items():
        title = heading(cells.evaluations, name)
        row[title] = cell.text
        if name == "lambada":
            row[f"{title} accuracy"] = "" if np.isnan(cell.accuracy) else f"{cell.accuracy:.3f}"
        row[f"nats below dense, {title}"] = below_text(base.get(name), cell)
        row[f"{BITS}, {title}"] = "" if np.isnan(cell.bits_per_byte) else repr(cell.bits_per_byte)
    return row


def beside_published(ours: pd.DataFrame, evaluations: Evaluations) -> pd.DataFrame:
    """Table 1 with the paper's rows below ours, in the same columns; other scale, tokenizer and
    training text, so that nats below dense are what can be compared.
    """
    table = published("table1")
    base = table.loc[table["method"] == BASELINE].set_index("budget")
    rows = {}
    for own in table.to_dict("records"):
        cells = {}
        for name in HEADINGS:
            title = heading(evaluations, name)
            gap = np.log(base.loc[own["budget"], name] / own[name])
            cells |= {title: f"{own[name]:.2f}", f"nats below dense, {title}": f"{gap:+.3f}"}
        rows[f"{own['method']} ({own['budget']}), He 2024"] = cells
    theirs = pd.DataFrame.from_dict(rows, orient="index", columns=ours.columns)
    return pd.concat([ours, theirs]).fillna("").rename_axis("method")


def published_table1() -> pd.DataFrame:
    """All of table 1, and nats below dense on C4."""
    table = published("table1")
    base = dict(table.loc[table["method"] == BASELINE, ["budget", "c4"]].itertuples(index=False))
    rows = zip(table["budget"], table["c4"], strict=True)
    gaps = [f"{np.log(base[budget] / own):+.3f}" for budget, own in rows]
    names = [f"{m} ({b})" for m, b in zip(table["method"], table["budget"], strict=True)]
    cells = {name: [f"{own:.2f}" for own in table[name]] for name in HEADINGS}
    cells["nats below dense, C4"] = gaps
    return pd.DataFrame(cells, index=pd.Index(names, name="method"))


def table2(study: ExpertsStudy, budget: float) -> pd.DataFrame:
    """Query norm against the number of experts: a column for each of both, as table 2 has them, of
    the points of figure 3a; the published perplexity stands below where the paper has the column.
    """
    points = [point for norm in NORMS for point in study.with_experts(budget, norm)]
    points.sort(key=lambda point: (point.num_experts, NORMS.index(point.query_norm)))
    columns = {f"{p.num_experts:,} {p.query_norm}": _column2(p) for p in points}
    rows = [
        "perplexity",
        "95 %",
        "expert usage (%)",
        "unevenness",
        "effective experts",
        "validation tokens",
        "best size",
        "of sizes",
        "seeds",
    ]
    table = pd.DataFrame(columns, index=pd.Index([*rows, "perplexity, He 2024"], name=""))
    return table.fillna("")


def _column2(point: ExpertsPoint) -> dict[str, str]:
    low, high = np.exp(point.loss - point.margin), np.exp(point.loss + point.margin)
    theirs = published("table2")
    same = (theirs["num_experts"] == point.num_experts) & (theirs["query_norm"] == point.query_norm)
    return {
        "perplexity": f"{np.exp(point.loss):.2f}",
        "95 %": f"{low:.2f} to {high:.2f}" if np.isfinite(point.margin) else "one seed",
        "expert usage (%)": f"{100 * point.usage:.1f}",
        "unevenness": f"{point.unevenness:.2f}",
        "effective experts": _count(point.effective_experts),
        "validation tokens": " to ".join(dict.fromkeys(map(_count, point.val_tokens))),
        "best size": point.size,
        "of sizes": str(len(point.sizes)),
        "seeds": str(point.num_seeds),
        "perplexity, He 2024": ", ".join(f"{x:.2f}" for x in theirs.loc[same, "perplexity"]),
    }


def _count(number: float) -> str:
    return f"{number:,.0f}" if np.isfinite(number) else "not recorded"


def points_table(study: ExpertsStudy) -> pd.DataFrame:
    """Every setting with its numbers at full precision: what figures 3a and 3b are drawn from."""
    rows = [
        {
            "budget": budget_label(p.budget), "num_experts": p.num_experts,
            "num_heads": p.num_heads, "experts_per_head": p.experts_per_head, "active": p.active,
            "query_norm": p.query_norm, "size": p.size, "sizes": " ".join(p.sizes),
            "loss": p.loss, "margin": p.margin, "num_seeds": p.num_seeds,
            "expert_usage": p.usage, "expert_unevenness": p.unevenness,
        }
        for p in study.points
    ]  # fmt: skip
    return pd.DataFrame(rows)
