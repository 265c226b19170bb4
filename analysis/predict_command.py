"""`peer-analyze predict`: a prediction and its size as text, saved, or held against later runs."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from analysis.fitting import CONFIDENCE
from analysis.isoflop import AXES
from analysis.load import AnalysisError, display_name, load_runs
from analysis.predict import Prediction, predict
from analysis.prediction_file import Checked, check, read, save
from analysis.routes import QUANTITIES, Route
from analysis.runnable import Runnable, runnable
from peer_scaling.record import budget_label

UNITS = {"N": "parameters", "D": "tokens", "L": "nats per token"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb, but what all verbs have."""
    parser.add_argument("--budget", type=float, help="training FLOPs to predict")
    parser.add_argument("--variant", help="label of the variant, as peer")
    parser.add_argument("--axis", choices=AXES, default=AXES[0], help="what N counts")
    parser.add_argument("--level", type=float, default=CONFIDENCE, help="of the intervals")
    parser.add_argument("--force", action="store_true", help="predict in spite of objections")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write it there, dated")
    parser.add_argument("--check", type=Path, metavar="FILE", help="a saved one, against RUNS")


def run(arguments: argparse.Namespace) -> None:
    """Predict and print, or check and print.

    Raises:
        AnalysisError: what the user can correct.
    """
    if arguments.check:
        saved = read(arguments.check)
        print(check_text(check(saved, load_runs(arguments.runs, arguments.study))))
        return
    if arguments.budget is None or arguments.variant is None:
        raise AnalysisError("predict needs --budget and --variant, or --check FILE")
    if not 0.5 <= arguments.level < 1:
        raise AnalysisError(f"--level {arguments.level:g}: give one from 0.5 to below 1")
    frame = load_runs(arguments.runs, arguments.study)
    found = predict(frame, arguments.variant, arguments.budget, arguments.axis, arguments.level)
    if found.objections:
        why = "; ".join(found.objections)
        if not arguments.force:
            raise AnalysisError(f"--budget {found.budget:g}: {why}; --force predicts all the same")
        print(f"warning: --budget {found.budget:g}: {why}", file=sys.stderr)
    choice = runnable(frame, found.variant, found.axis, found.best.N.value, found.budget)
    print(prediction_text(found, choice, display_name(found.variant, frame)))
    if arguments.save:
        path = save(found, choice, frame, arguments.save, datetime.now(UTC))
        print(f"\nsaved to {path}")


def prediction_text(found: Prediction, choice: Runnable, name: str) -> str:
    """The prediction, as Markdown, of a variant by the name that it is shown with."""
    lines = [
        f"# {name} at {budget_label(found.budget)} training FLOPs",
        f"study {found.study}; {found.factor:.3g} times its largest budget, "
        f"{budget_label(found.largest_budget)}; N = {found.axis}; intervals of "
        f"{100 * found.level:g} %",
        *(_route_text(route) for route in found.routes),
        _disagreement(found),
        *(f"- {note}" for note in found.notes),
        f"size {choice.size} ({choice.num_params:.4g} parameters): {choice.how}",
        f"    {choice.command}",
    ]
    return "\n\n".join(line for line in lines if line)


def _route_text(route: Route) -> str:
    lines = [f"{route.approach}:"]
    for of in QUANTITIES:
        estimate = getattr(route, of)
        interval = "no interval, two budgets or too few runs"
        if estimate.finite:
            interval = f"[{estimate.low:.6g}, {estimate.high:.6g}]"
        lines.append(f"- {of}* = {estimate.value:.6g} {interval} {UNITS[of]}")
    error = "needs >= 3 budgets"
    if np.isfinite(route.held_out_error):
        error = (
            f"{100 * route.held_out_error:.2f} % by leaving out one budget, "
            f"{100 * route.largest_error:+.2f} % at the largest from the others"
        )
    return "\n".join([*lines, f"- error of L*: {error}"])


def _disagreement(found: Prediction) -> str:
    if len(found.routes) < 2:
        return ""
    parts = []
    for of in QUANTITIES:
        one, two = (getattr(route, of) for route in found.routes)
        apart = one.high < two.low or two.high < one.low
        parts.append(
            f"{of}* {100 * (two.value / one.value - 1):+.2f} %"
            + (" (intervals apart: one of the laws is wrong)" if apart else "")
        )
    one, two = found.routes
    return f"{two.approach} less {one.approach}, which counts: {', '.join(parts)}"


def check_text(checked: Checked) -> str:
    """What became of a prediction."""
    saved = checked.saved
    place = "inside" if checked.inside else "outside"
    if not np.isfinite(saved.low):
        place = "without"
    lines = [
        f"{saved.variant} at {budget_label(saved.budget)} training FLOPs, predicted "
        f"{saved.made_at.isoformat()} from study {saved.study} by {saved.approach}",
        f"predicted L* = {saved.loss:.6g} [{saved.low:.6g}, {saved.high:.6g}] nats per token",
        f"measured L* = {checked.measured:.6g}: {checked.measured_from}",
        f"{place} the {100 * saved.level:g} % interval; error {100 * checked.error:+.3f} %",
        *(f"note: {note}" for note in checked.notes),
    ]
    return "\n".join(lines)
