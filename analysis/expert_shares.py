"""Which experts of a trained layer fire: the file that `peer-eval RUN --experts FILE.csv` writes.

Shape legend: N experts, S sub-keys per half of a key, R the most used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, log
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.csv_runs import read_table
from analysis.schema import AnalysisError

COLUMNS = ("expert", "score", "choices")


@dataclass(frozen=True, eq=False)
class ExpertShares:
    """What each expert of one layer got over a set of tokens."""

    label: str
    score_N: np.ndarray
    """Router score, summed over tokens and heads."""
    choices_N: np.ndarray
    """How often it was chosen."""

    @property
    def share_N(self) -> np.ndarray:
        """Of the whole router score; sums to 1."""
        return self.score_N / self.score_N.sum()

    @property
    def usage(self) -> float:
        """Share of the experts with a score above 0 (He 2024, 2407.04153, section 3.3)."""
        return float(np.mean(self.score_N > 0))

    @property
    def unevenness(self) -> float:
        """KL divergence of the shares from uniform, nats (ibid.)."""
        used = self.share_N[self.share_N > 0]
        return float(log(len(self.score_N)) + np.sum(used * np.log(used)))

    @property
    def effective(self) -> float:
        """As many experts with equal shares would be as uneven: exp of the shares' entropy."""
        return len(self.score_N) * float(np.exp(-self.unevenness))

    @property
    def sub_keys(self) -> int:
        """Per half of a product key, sqrt(N).

        Raises:
            AnalysisError: N is no square, so that the experts have no product keys.
        """
        root = isqrt(len(self.score_N))
        if root**2 != len(self.score_N):
            number = len(self.score_N)
            raise AnalysisError(f"{self.label}: {number} experts are no square: no product keys")
        return root

    @property
    def unread(self) -> tuple[int, int]:
        """Sub-keys of the first and of the second half none of whose experts got any score.

        Raises:
            AnalysisError: see `sub_keys`.
        """
        read_SS = self.score_N.reshape(self.sub_keys, self.sub_keys) > 0
        return int((~read_SS.any(1)).sum()), int((~read_SS.any(0)).sum())


def read_expert_shares(path: Path, label: str) -> ExpertShares:
    """Read a file with the columns `expert`, `score` and `choices`, one row per expert.

    Raises:
        AnalysisError: no such file, another one, or experts that are not 0 to N - 1 once each.
    """
    header, lines = read_table(path)
    missing = [name for name in COLUMNS if name not in header]
    if missing or not lines:
        what = f"no column {', '.join(missing)}" if missing else "no row"
        raise AnalysisError(
            f"{path}: {what}; `peer-eval RUN --experts FILE.csv` writes such a file"
        )
    try:
        frame = pd.DataFrame([row for _, row in lines], columns=pd.Index(header))
        values = frame[list(COLUMNS)].astype(float).to_numpy()
    except ValueError as error:
        raise AnalysisError(f"{path}: {error}") from error
    expert_N, score_N, choices_N = values[np.argsort(values[:, 0])].T
    if not np.array_equal(expert_N, np.arange(len(expert_N))):
        raise AnalysisError(f"{path}: experts must be 0 to {len(expert_N) - 1}, once each")
    if not (np.isfinite(values).all() and values.min() >= 0 and score_N.sum() > 0):
        raise AnalysisError(f"{path}: scores and choices must be numbers from 0 on, not all 0")
    return ExpertShares(label, score_N, choices_N.astype(np.int64))


def shares_table(layers: Sequence[ExpertShares]) -> pd.DataFrame:
    """One row per layer: use and unevenness, as Table 2 of He 2024, and what they mean."""
    rows = [
        {
            "layer": layer.label,
            "experts": len(layer.score_N),
            "usage (%)": f"{100 * layer.usage:.1f}",
            "unevenness": f"{layer.unevenness:.2f}",
            "as even as": f"{layer.effective:.0f}",
            "unread sub-keys": _unread_text(layer),
            "score of the top 1 % (%)": f"{100 * top_share(layer, 0.01):.1f}",
            "score of the top 10 % (%)": f"{100 * top_share(layer, 0.1):.1f}",
        }
        for layer in layers
    ]
    return pd.DataFrame(rows).set_index("layer")


def _unread_text(layer: ExpertShares) -> str:
    try:
        first, second = layer.unread
    except AnalysisError:
        return ""
    return f"{first} + {second} of 2 x {layer.sub_keys}"


def top_share(layer: ExpertShares, part: float) -> float:
    """Share of the router score that goes to the most used `part` of the experts, at least one."""
    number = max(1, round(part * len(layer.share_N)))
    return float(np.sort(layer.share_N)[-number:].sum())


def top_experts(layer: ExpertShares, number: int = 10) -> pd.DataFrame:
    """The most used experts with their sub-keys and shares, a uniform share being 1."""
    expert_R = np.argsort(-layer.share_N, kind="stable")[:number]
    first_R, second_R = np.divmod(expert_R, layer.sub_keys)
    return pd.DataFrame(
        {
            "expert": expert_R,
            "first sub-key": first_R,
            "second sub-key": second_R,
            "share x N": np.round(layer.share_N[expert_R] * len(layer.share_N), 1),
            "choices": layer.choices_N[expert_R],
        }
    ).set_index("expert")
