"""The trained or extrapolated size that is closest to an N*, and the command that trains it.

Legend: N parameters, W width (d_model), l layers. Shape legend: S sizes.
"""

import re
import shlex
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from analysis.load import usable
from analysis.schema import UNNAMED
from peer_scaling.record import budget_label

SHAPE = re.compile(r"d(\d+)_l(\d+)")
MAX_WIDTHS = 64
"""Steps of the width that are tried beyond the widest trained size."""


@dataclass(frozen=True)
class Runnable:
    """A size to train, and how it was found."""

    size: str
    num_params: float
    """On the axis of the prediction: counted if the size was trained, else extrapolated."""
    trained: bool
    how: str
    """A sentence: what was done, and what it leaves out."""
    command: str


@dataclass(frozen=True)
class _Shapes:
    width_S: np.ndarray
    layers_S: np.ndarray
    num_params_S: np.ndarray

    def num_params(self, width: int, layers: int) -> float:
        """1, W, l W and l W^2 with coefficients of no negative sign: embeddings, tables, layers."""
        relative_SK = _terms(self.width_S, self.layers_S) / self.num_params_S[:, None]
        share_K = nnls(relative_SK, np.ones(len(self.width_S)))[0]
        return float((_terms(np.array([width]), np.array([layers])) @ share_K)[0])

    def layers(self, width: int) -> tuple[int, str]:
        """The depth at a width beyond the widest, and the rule behind it."""
        widest = int(self.width_S.argmax())
        deepest = int(self.layers_S[widest])
        if len(set(self.layers_S.tolist())) == 1:
            return deepest, f"{deepest} layers, as all trained sizes have"
        ratio = self.width_S[widest] / deepest
        return max(deepest, round(width / ratio)), f"{ratio:.4g} of width per layer, as the widest"


def runnable(frame: pd.DataFrame, variant: str, axis: str, N: float, budget: float) -> Runnable:
    """The closest trained size in ln N; beyond the largest by more than half its last step, a wider
    one by the depth rule of the trained sizes.
    """
    rows = usable(frame)
    runs = rows.loc[rows["variant"] == variant]
    sizes = runs.groupby("size")[axis].mean().sort_values()
    counts_S, names = sizes.to_numpy(), [str(name) for name in sizes.index]
    step = counts_S[-1] / counts_S[-2] if len(counts_S) > 1 else 1.0
    study = str(runs["study"].iloc[0])
    beyond = bool(counts_S[-1] * np.sqrt(step) < N)
    if beyond:
        wider = _wider(names, counts_S, N)
        if wider:
            shape, count, how = wider
            name = f"d{shape[0]}_l{shape[1]}"
            given = [f"size={names[-1]}", f"size.d_model={shape[0]}", f"size.num_layers={shape[1]}"]
            return Runnable(name, count, False, how, _command(study, variant, given, budget))
    place = int(np.abs(np.log(counts_S / N)).argmin())
    how = f"closest of {len(names)} trained sizes"
    if not counts_S[0] <= N <= counts_S[-1]:
        how += f"; N* is {'above' if place else 'below'} all of them"
    if beyond:
        how += ", and their names give no shape like d256_l8 to extrapolate from"
    given = [f"size={names[place]}"]
    return Runnable(
        names[place], float(counts_S[place]), True, how, _command(study, variant, given, budget)
    )


def _wider(
    names: list[str], counts_S: np.ndarray, N: float
) -> tuple[tuple[int, int], float, str] | None:
    found = [SHAPE.fullmatch(name) for name in names]
    if len(names) < 2 or not all(found):
        return None
    shape_SK = np.array([[int(match[1]), int(match[2])] for match in found if match])
    shapes = _Shapes(shape_SK[:, 0], shape_SK[:, 1], counts_S)
    largest = int(shape_SK[-1, 0])
    step = _step(largest)
    choices = []
    for width in range(largest + step, largest + MAX_WIDTHS * step + 1, step):
        layers, rule = shapes.layers(width)
        choices.append((width, layers, shapes.num_params(width, layers), rule))
    width, layers, count, rule = min(choices, key=lambda c: abs(np.log(c[2] / N)))
    how = (
        f"wider than every trained size ({names[-1]} is the largest): {rule}; width in steps of "
        f"{step}, N extrapolated; heads as {names[-1]} has them"
    )
    return (width, layers), count, how


def _step(width: int) -> int:
    """A quarter or half of a width, such that the widest size's heads divide its multiples."""
    return width // 4 if width % 16 == 0 else max(1, width // 2)


def _terms(width_S: np.ndarray, layers_S: np.ndarray) -> np.ndarray:
    W, depth = width_S.astype(float), layers_S.astype(float)
    return np.stack([np.ones_like(W), W, depth * W, depth * W**2], axis=1)


def _command(study: str, variant: str, size: list[str], budget: float) -> str:
    """The study's own file holds whatever its variants and its text differ in from the defaults."""
    parts = ["peer-train"] if study == UNNAMED else ["peer-train", "--config-name", study]
    label = "ffw" if study == UNNAMED else "variant"
    return shlex.join([*parts, f"{label}={variant}", *size, f"budget={budget_label(budget)}"])
