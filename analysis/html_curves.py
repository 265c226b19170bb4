"""The isoFLOP curves of a fit as SVG, one panel per budget; every point says which run it is.

Drawn are the frozen curves and minima, nothing is fitted here.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures import AXIS_LABELS, LOOKS, SPARE_LOOKS, count_label, looks
from analysis.html_points import excluded_why, minimum_text, run_text
from analysis.load import display_name, usable
from analysis.markup import Html, element, section
from analysis.profile import Profile
from analysis.study_report import StudyReport
from analysis.svg_axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, axes_over
from peer_scaling.record import budget_label

ALL_LOOKS = (*LOOKS.values(), *SPARE_LOOKS)
SYMBOLS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.6L4.4 3.4H-4.4z",
    "M0-5L4.6 0L0 5L-4.6 0z",
    "M0 4.6L4.4-3.4H-4.4z",
    "M-1.6-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "M-4-2l2-2l2 2l2-2l2 2l-2 2l2 2l-2 2l-2-2l-2 2l-2-2l2-2z",
    "M0-5L4.8-1.5L2.9 4.1H-2.9L-4.8-1.5z",
)  # fmt: skip
"""Markers in the order of `ALL_LOOKS`, around the origin."""
STAR = "M0-9L2.1-2.9L8.6-2.8L3.4 1.1L5.3 7.3L0 3.6L-5.3 7.3L-3.4 1.1L-8.6-2.8L-2.1-2.9z"
"""A minimum."""
DARK = ("#f0f0f0", "#ff9a55", "#3ddba8", "#6cb8f5", "#f0a9cf", "#f5bd3d", "#8fd0f7", "#d0d04a")
"""Colours on a dark page, in the order of `ALL_LOOKS`."""
HIT_RADIUS = 8


def look_styles() -> str:
    """CSS: the colour of every look, on a light and on a dark page."""
    light = [f".k{i}{{--k:{look.colour}}}" for i, look in enumerate(ALL_LOOKS)]
    dark = [f".k{i}{{--k:{colour}}}" for i, colour in enumerate(DARK)]
    return "".join(light) + "@media screen and (prefers-color-scheme:dark){" + "".join(dark) + "}"


def curves_section(report: StudyReport, refusals: Html) -> Html:
    """The panels, what they show, and the curves without a minimum."""
    styles = {v: ALL_LOOKS.index(look) for v, look in looks(report.variants).items()}
    panels = [_panel(report, budget, styles) for budget in report.fit.budgets]
    return section(
        "curves",
        "isoFLOP curves",
        _symbols(),
        _legend(report, styles),
        element("div", *panels, class_="panels"),
        element("p", _caption(report), class_="quiet"),
        refusals,
    )


def _caption(report: StudyReport) -> str:
    frame, fit = report.frame, report.fit
    drawn = int(drawable(frame, fit.axis, fit.budgets).sum())
    rest = len(frame) - drawn
    beyond = f" Without a loss, a size or a panel, and listed below: {rest}."
    return (
        f"Validation loss in nats per token (perplexity on the right) against "
        f"{AXIS_LABELS[fit.axis]}, which is logarithmic. A point is a run: {drawn} of "
        f"{len(frame)}; hollow ones are excluded, ringed ones not in the fit of their curve; "
        f"where their loss is beyond the panel, they stand at its frame.{beyond if rest else ''} "
        "Lines are the fitted curves, thin where there is no minimum. Stars are minima with the "
        "95 % intervals of N* and L*. Point at a run, tap it, or reach it by tab and arrow keys, "
        "to see which it is."
    )


def drawable(frame: pd.DataFrame, axis: str, budgets: Iterable[float]) -> np.ndarray:
    """Which runs have a place in a panel, (U,)."""
    N_U, loss_U = frame[axis].to_numpy(), frame["loss"].to_numpy()
    named_U = np.array([isinstance(variant, str) for variant in frame["variant"]])
    here_U = np.isin(frame["budget"].to_numpy(), list(budgets))
    return (N_U > 0) & np.isfinite(N_U) & np.isfinite(loss_U) & here_U & named_U


def _symbols() -> Html:
    marks = [element("path", id=f"s{i}", d=path) for i, path in enumerate(SYMBOLS)]
    defs = element("defs", *marks, element("path", id="star", d=STAR))
    return element("svg", defs, class_="defs", aria_hidden="true")


def _legend(report: StudyReport, styles: Mapping[str, int]) -> Html:
    items = []
    for variant, style in styles.items():
        line = element(
            "line", class_="curve", x1=0, y1=7, x2=34, y2=7, stroke_dasharray=_dashes(style)
        )
        mark = element("use", href=f"#s{style}", x=17, y=7)
        key = element(
            "svg", line, element("g", mark, class_="mark"), viewBox="0 0 34 14", aria_hidden="true"
        )
        items.append(element("li", key, display_name(variant, report.frame), class_=f"k{style}"))
    return element("ul", *items, class_="legend")


def _dashes(style: int) -> str | None:
    return " ".join(f"{1.5 * length:g}" for length in ALL_LOOKS[style].dashes) or None


def _panel(report: StudyReport, budget: float, styles: Mapping[str, int]) -> Html:
    frame, axis = report.frame, report.fit.axis
    rows = frame.loc[drawable(frame, axis, [budget])]
    profiles = [p for p in report.profiles if p.budget == budget]
    axes = _axes(rows, profiles, axis)
    title = f"{budget_label(budget)} training FLOPs"
    parts = [*_grid(axes, title, AXIS_LABELS[axis])]
    for p in profiles:
        parts += _curve(axes, p, styles[p.variant])
    points = [*_runs(report, axes, rows, styles)]
    points += [
        _point(
            axes, p.num_params, p.loss, "star", minimum_text(p),
            class_=f"point minimum k{styles[p.variant]}", data_minimum=p.variant,
        )
        for p in profiles if p.ok
    ]  # fmt: skip
    svg = element(
        "svg", *parts, *_one_stop(points), class_="panel", role="group",
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", aria_label=f"isoFLOP curves at {title}",
    )  # fmt: skip
    return element("figure", svg)


def _one_stop(points: list[dict[str, Any]]) -> Iterator[Html]:
    """The tab key stops at the first point; the script's arrow keys lead to the others."""
    for i, point in enumerate(points):
        children = point.pop("children")
        yield element("g", *children, tabindex=-1 if i else 0, role="img", **point)


def _axes(rows: pd.DataFrame, profiles: Iterable[Profile], axis: str) -> Axes:
    """Over the runs in the fits, the curves and the intervals; losses of others may be beyond."""
    left_out = [run.run for p in profiles for run in p.left_out]
    x, y = rows[axis].tolist(), usable(rows.loc[~rows["run_id"].isin(left_out)])["loss"].tolist()
    for p in profiles:
        x += p.curve_num_params.tolist()
        y += p.curve_loss.tolist()
        if p.ok:
            x += [p.num_params_low, p.num_params_high]
            y += [p.loss - p.loss_margin, p.loss + p.loss_margin]
    return axes_over([v for v in x if np.isfinite(v)], [v for v in y if np.isfinite(v)])


def _grid(axes: Axes, title: str, label: str) -> Iterator[Html]:
    low, right, middle = HEIGHT - BOTTOM, WIDTH - RIGHT, (TOP + HEIGHT - BOTTOM) / 2
    yield element("text", title, class_="title", x=LEFT, y=TOP - 10)
    for N in axes.ticks_x():
        x = axes.x(N)
        yield element("line", class_="grid", x1=x, y1=TOP, x2=x, y2=low)
        yield element("text", count_label(N), x=x, y=low + 16, text_anchor="middle")
    for loss in axes.ticks_y():
        y = axes.y(loss)
        yield element("line", class_="grid", x1=LEFT, y1=y, x2=right, y2=y)
        yield element("text", f"{loss:g}", x=LEFT - 6, y=y + 4, text_anchor="end")
        yield element("text", f"{np.exp(loss):.3g}", x=right + 6, y=y + 4)
    frame = f"M{LEFT:g} {TOP:g}V{low:g}H{right:g}V{TOP:g}"
    yield element("path", class_="frame", d=frame)
    yield element("text", label, x=(LEFT + right) / 2, y=HEIGHT - 10, text_anchor="middle")
    for text, x in (("loss", 12), ("perplexity", WIDTH - 4)):
        turned = f"rotate(-90 {x:g} {middle:g})"
        yield element("text", text, x=x, y=middle, text_anchor="middle", transform=turned)


def _curve(axes: Axes, profile: Profile, style: int) -> Iterator[Html]:
    line = zip(profile.curve_num_params, profile.curve_loss, strict=True)
    places = " ".join(f"{axes.x(N):g},{axes.y(L):g}" for N, L in line)
    if places:
        thin = "" if profile.ok else " thin"
        yield element(
            "polyline", class_=f"curve k{style}{thin}", points=places,
            stroke_dasharray=_dashes(style),
        )  # fmt: skip
    if profile.ok:
        x, y = axes.x(profile.num_params), axes.y(profile.loss)
        ends = (profile.num_params_low, profile.num_params_high)
        if np.isfinite(ends).all():
            across = f"M{axes.x(ends[0]):g} {y:g}H{axes.x(ends[1]):g}"
            yield element("path", class_=f"bar k{style}", d=across)
        margin = profile.loss_margin
        if np.isfinite(margin):
            up = f"M{x:g} {axes.y(profile.loss - margin):g}V{axes.y(profile.loss + margin):g}"
            yield element("path", class_=f"bar k{style}", d=up)


def _runs(
    report: StudyReport, axes: Axes, rows: pd.DataFrame, styles: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    axis = report.fit.axis
    order = [list(styles).index(variant) for variant in rows["variant"]]
    for row in (
        rows.assign(order=order).sort_values(["order", axis], kind="stable").to_dict("records")
    ):
        style = styles[row["variant"]]
        why = excluded_why(report, row)
        hollow = " hollow" if isinstance(row["excluded"], str) else ""
        ringed = bool(why) and not hollow
        yield _point(
            axes, row[axis], row["loss"], f"s{style}", run_text(report, row, why), ringed,
            class_=f"point run k{style}{hollow}", data_run=row["run_id"],
        )  # fmt: skip


def _point(
    axes: Axes, N: float, loss: float, symbol: str, text: str, ringed: bool = False, **rest: Any
) -> dict[str, Any]:
    children = [
        element("title", text),
        element("circle", class_="hit", r=HIT_RADIUS),
        *([element("circle", class_="ring", r=HIT_RADIUS)] if ringed else []),
        element("use", href=f"#{symbol}"),
    ]
    return {"children": children, "transform": f"translate({axes.x(N):g} {axes.y(loss):g})", **rest}
