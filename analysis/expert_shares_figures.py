"""Figures of which experts fire; nothing is fitted here.

Shape legend: N experts, S sub-keys per half.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter

from analysis.expert_shares import ExpertShares
from analysis.figures import LOOKS, SPARE_LOOKS, STYLE

LINES = (*LOOKS.values(), *SPARE_LOOKS)
MAP_INCHES = 3.4
PLAIN = FuncFormatter(lambda number, _: f"{number:g}")


def plot_shares(layers: Sequence[ExpertShares]) -> Figure:
    """Shares by rank, and what part of the score the most used experts get. Dashed: uniform."""
    with style.context(STYLE):
        figure = Figure((8.4, 3.4))
        left, right = figure.subplots(1, 2)
        for layer, look in zip(layers, LINES, strict=False):
            share_N = np.sort(layer.share_N)[::-1]
            N = len(share_N)
            used_N = np.where(share_N > 0, share_N * N, np.nan)
            left.plot(np.arange(1, N + 1), used_N, color=look.colour, label=layer.label)
            part_N = np.arange(N + 1) / N
            right.plot(part_N, np.concatenate(([0], share_N.cumsum())), color=look.colour)
        left.axhline(1, color="grey", lw=1, ls="--", label="uniform")
        right.plot((0, 1), (0, 1), color="grey", lw=1, ls="--")
        left.set(xscale="log", yscale="log", xlabel="rank of the expert", ylabel="share x N")
        right.set(xlabel="most used part of the experts", ylabel="part of the router score")
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_formatter(PLAIN)
        left.legend(fontsize=8)
    return figure


def plot_key_map(layers: Sequence[ExpertShares]) -> Figure:
    """The experts of each layer by their two sub-keys; white got no score at all.

    Raises:
        AnalysisError: a layer without product keys.
    """
    with style.context(STYLE):
        figure = Figure((0.8 + MAP_INCHES * len(layers), MAP_INCHES))
        axes = figure.subplots(1, len(layers), squeeze=False)[0]
        largest = max(float(layer.share_N.max()) * len(layer.share_N) for layer in layers)
        norm = LogNorm(min(0.01, 0.1 / largest), largest, clip=True)
        images = [_map(ax, layer, norm) for ax, layer in zip(axes, layers, strict=True)]
        figure.colorbar(images[0], ax=list(axes), label="share x N", format=PLAIN)
    return figure


def _map(ax: Axes, layer: ExpertShares, norm: LogNorm) -> AxesImage:
    share_SS = (layer.share_N * len(layer.share_N)).reshape(layer.sub_keys, layer.sub_keys)
    shown_SS = np.ma.masked_where(share_SS == 0, share_SS)
    ax.set(title=layer.label, xlabel="second sub-key", ylabel="first sub-key")
    ax.grid(False)
    return ax.imshow(shown_SS, norm=norm, cmap="viridis", interpolation="nearest")
