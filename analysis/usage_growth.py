"""How the share of experts that are read grows with the validation tokens: a usage is that of so
many tokens, and more tokens read more experts.

Shape legend: U runs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.experts import ExpertsPoint, ExpertsStudy
from analysis.schema import AnalysisError
from peer_scaling.record import RunRecord, budget_label

MAX_TOKENS_DIGITS = 18


@dataclass(frozen=True)
class Growth:
    """Of one setting of the layer, at its best trained size."""

    point: ExpertsPoint
    num_runs: int
    tokens: tuple[int, ...]
    """Validation tokens, ascending: those at which all runs have a share."""
    share: tuple[float, ...]
    """Mean over the runs, at each; share of the experts that any of the tokens reads."""
    least: tuple[float, ...]
    most: tuple[float, ...]


def usage_growth(study: ExpertsStudy, budget: float, records: Iterable[RunRecord]) -> list[Growth]:
    """By number of experts, of the settings of a budget whose runs have it.

    Raises:
        AnalysisError: none has.
    """
    by_run = {(r.study, r.run_id): _growth_of(r) for r in records}
    points = [point for point in study.points if point.budget == budget]
    points.sort(key=lambda p: (p.num_experts, p.query_norm, p.active, p.num_heads))
    found = [growth for point in points if (growth := _growth(point, by_run))]
    if not found:
        raise AnalysisError(
            f"none of {len(points)} settings has runs with `expert_usage_growth` in their records: "
            "a folder of records has them, of runs since they are written; a CSV file has not"
        )
    return found


def _growth(
    point: ExpertsPoint, by_run: Mapping[tuple[str, str], Mapping[int, float]]
) -> Growth | None:
    own = [by_run[run] for run in point.runs if by_run.get(run)]
    common = sorted(set.intersection(*map(set, own))) if own else []
    if not common:
        return None
    shares_UN = np.array([[growth[n] for n in common] for growth in own])
    ends = (shares_UN.mean(0), shares_UN.min(0), shares_UN.max(0))
    share, least, most = (tuple(values.tolist()) for values in ends)
    return Growth(point, len(own), tuple(common), share, least, most)


def _growth_of(record: RunRecord) -> dict[int, float]:
    """By tokens; without what is no count of tokens or no share."""
    return {
        int(tokens): float(share)
        for tokens, share in record.expert_usage_growth.items()
        if tokens.isascii() and tokens.isdigit() and 0 < len(tokens) <= MAX_TOKENS_DIGITS
        if int(tokens) and type(share) in (int, float) and 0 <= share <= 1
    }


def growth_table(growths: Iterable[Growth]) -> pd.DataFrame:
    """A row per setting and number of tokens, at full precision."""
    rows = [
        {
            "budget": budget_label(g.point.budget), "num_experts": g.point.num_experts,
            "num_heads": g.point.num_heads, "experts_per_head": g.point.experts_per_head,
            "query_norm": g.point.query_norm, "size": g.point.size, "num_runs": g.num_runs,
            "val_tokens": tokens, "expert_usage": share, "least": least, "most": most,
        }
        for g in growths
        for tokens, share, least, most in zip(g.tokens, g.share, g.least, g.most, strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)
