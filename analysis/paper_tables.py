"""Tables 1 and 2 of He 2024 (2407.04153) in its layout, from frozen results; the published numbers
beside ours.
"""

import numpy as np
import pandas as pd

from analysis.experts import ExpertsPoint, ExpertsStudy
from analysis.isoflop import IsoflopFit
from analysis.load import display_name
from analysis.profile import Profile
from analysis.tables import BASELINE, published
from peer_scaling.record import budget_label

SETS = ("curation_corpus", "lambada", "pile", "wikitext", "c4")
NORMS = ("none", "layer", "batch")


def table1(fit: IsoflopFit, frame: pd.DataFrame) -> pd.DataFrame:
    """Perplexity of the compute-optimal models on the validation text of the study: the best
    trained point and the minimum of the curve apart, and nats below dense at the minimum.

    One row per variant and budget, as table 1 has them; a cell that cannot be filled says why.
    """
    rows = [
        _row1(fit, frame, profile)
        for budget in fit.budgets
        for variant in fit.variants
        if (profile := fit.profile(variant, budget))
    ]
    return pd.DataFrame(rows).set_index("method")


def _row1(fit: IsoflopFit, frame: pd.DataFrame, profile: Profile) -> dict[str, str]:
    base = fit.profile(BASELINE, profile.budget)
    gap = f"{base.loss - profile.loss:+.3f}" if base and base.ok and profile.ok else ""
    name = display_name(profile.variant, frame)
    row = {
        "method": f"{name} ({budget_label(profile.budget)})",
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


def published_table1() -> pd.DataFrame:
    """All of table 1, and nats below dense on C4."""
    table = published("table1")
    base = dict(table.loc[table["method"] == BASELINE, ["budget", "c4"]].itertuples(index=False))
    rows = zip(table["budget"], table["c4"], strict=True)
    gaps = [f"{np.log(base[budget] / own):+.3f}" for budget, own in rows]
    names = [f"{m} ({b})" for m, b in zip(table["method"], table["budget"], strict=True)]
    cells = {name: [f"{own:.2f}" for own in table[name]] for name in SETS}
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
        "best size": point.size,
        "of sizes": str(len(point.sizes)),
        "seeds": str(point.num_seeds),
        "perplexity, He 2024": ", ".join(f"{x:.2f}" for x in theirs.loc[same, "perplexity"]),
    }


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
