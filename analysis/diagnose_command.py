"""`peer-analyze diagnose`: every law of a study with what can be said against it.

One table, a row per number: variant, law, quantity, value, at full precision.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.diagnostics import (
    agreement,
    certify,
    delta_sweep,
    held_out,
    held_out_power_law,
    influence,
)
from analysis.fitting import refit, resampling_weights
from analysis.isoflop import AXES, fit_isoflop, power_fits
from analysis.load import AnalysisError, load_runs, usable
from analysis.parametric import LossSurface, SurfaceBootstrap, as_surface, fit_loss_surface
from analysis.powerlaw import PowerFit
from analysis.routes import columns, configurations

NUM_REPLICATES = 400
WORST = 5
STARTS = {
    "A": (0.0, 10.0, 20.0),
    "B": (0.0, 10.0, 20.0),
    "E": (-1.0, 0.0, 1.0),
    "alpha": (0.0, 1.0, 2.0),
    "beta": (0.0, 1.0, 2.0),
}
"""Every other of `diagnostics.CHINCHILLA_STARTS`: 243 in half a second, not 4,500 in eight."""
COLUMNS = ["variant", "law", "quantity", "value"]
Row = tuple[str, str, float | str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb, but what all verbs have."""
    parser.add_argument("--axis", choices=AXES, default=AXES[0], help="what N counts")
    parser.add_argument("--out", type=Path, help="folder for diagnose.csv and diagnose.md")


def run(arguments: argparse.Namespace) -> None:
    """Diagnose, print, write.

    Raises:
        AnalysisError: what the user can correct.
    """
    table = diagnose_study(load_runs(arguments.runs, arguments.study), arguments.axis)
    text = as_text(table)
    print(text)
    if arguments.out:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
            table.to_csv(arguments.out / "diagnose.csv", index=False)
            (arguments.out / "diagnose.md").write_text(text + "\n")
        except OSError as error:
            raise AnalysisError(f"--out {arguments.out}: {error.strerror or error}") from error


def diagnose_study(frame: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The table, for every variant of a study.

    Raises:
        AnalysisError: as `fit_isoflop`.
    """
    fit = fit_isoflop(frame, axis)
    rows = []
    for variant in fit.variants:
        optima = fit.optima(variant)
        C = np.array([p.budget for p in optima])
        powers = power_fits(optima)
        found = [row for of, power in powers.items() for row in _power_rows(of, power, C)]
        if not powers:
            found = [("power laws", "status", f"{len(optima)} minima, two are needed")]
        runs = usable(frame)
        found += _surface_rows(runs.loc[runs["variant"] == variant], axis, powers.get("N"))
        rows += [(variant, *row) for row in found]
    return pd.DataFrame(rows, columns=COLUMNS)


def as_text(table: pd.DataFrame) -> str:
    """The table as Markdown, a heading per variant and law."""
    parts = []
    for names, group in table.groupby(["variant", "law"], sort=False):
        variant, law = names if isinstance(names, tuple) else (names, "")
        lines = [
            f"- {q}: {v!r}" if isinstance(v, float) else f"- {q}: {v}"
            for q, v in group[["quantity", "value"]].itertuples(index=False)
        ]
        parts.append("\n".join([f"## {variant}, {law}", "", *lines]))
    return "\n\n".join(parts)


def _power_rows(of: str, power: PowerFit, C: np.ndarray) -> list[Row]:
    low, high = power.exponent_interval
    values: dict[str, float | str] = {
        "status": str(power.status),
        "log_coefficient": power.log_coefficient,
        "exponent": power.exponent,
        "exponent low (95 %)": low,
        "exponent high (95 %)": high,
        "covariance of log_coefficient and exponent": float(power.covariance[0, 1]),
        "largest |residual| of ln y": float(np.abs(power.residuals).max()),
    }
    values |= {
        f"exponent without {budget:g}": float(exponent)
        for budget, exponent in zip(C, power.exponents_without, strict=True)
    }
    if len(C) < 3:
        values["held-out error"] = "needs >= 3 budgets"
    else:
        errors = held_out_power_law(power, C)
        values["leave-one-budget-out error"] = errors.mean_abs_error
        values["error at the largest budget from the others"] = errors.largest.mean_error
    return [(f"{of}*(C), approach 2", name, value) for name, value in values.items()]


def _surface_rows(runs: pd.DataFrame, axis: str, power: PowerFit | None) -> list[Row]:
    law = "L(N, D), approach 3"
    N, D, L, _ = columns(runs, axis)
    try:
        surface = fit_loss_surface(N, D, L)
    except AnalysisError as error:
        return [(law, "status", str(error))]
    values = _coefficient_values(surface)
    if surface.fit.ok:
        values |= _certificate_values(surface)
        values |= _influence_values(surface)
        if power is not None:
            values |= _agreement_values(surface, power, configurations(runs))
    values |= _residual_values(surface, runs)
    budgets = runs["budget"].to_numpy()
    if len(set(budgets)) < 3:
        values["held-out error"] = "needs >= 3 budgets"
    else:
        errors = held_out(surface.fit, budgets)
        values["leave-one-budget-out error"] = errors.mean_abs_error
        values["error at the largest budget from the others"] = errors.largest.mean_error
    return [(law, name, value) for name, value in values.items()]


def _coefficient_values(surface: LossSurface) -> dict[str, float | str]:
    fit = surface.fit
    values: dict[str, float | str] = {"status": str(surface.status)}
    values |= {name: float(getattr(surface, name)) for name in ("A", "B", "E", "alpha", "beta")}
    values |= {"exponent of N*": surface.exponent_N, "delta": surface.delta}
    values["objective"] = surface.objective
    if fit.ok:
        values |= {f"standard error of {_logged(n)}": fit.stderr(n) for n in fit.names}
        scale_P = np.sqrt(np.diag(fit.covariance_PP))
        correlation_PP = fit.covariance_PP / np.outer(scale_P, scale_P)
        values["condition of the correlations"] = float(np.linalg.cond(correlation_PP))
    return values


def _logged(name: str) -> str:
    return f"ln {name}" if name in ("A", "B", "E") else name


def _certificate_values(surface: LossSurface) -> dict[str, float | str]:
    found = certify(surface.fit, STARTS)
    return {
        "certificate": "holds" if found.holds else "fails",
        "starts": float(found.num_starts),
        "starts that got lower": float(found.num_lower),
        "starts at the minimum": float(found.num_at_minimum),
    }


def _influence_values(surface: LossSurface) -> dict[str, float | str]:
    without = influence(surface.fit)
    alpha, beta = (without.replicates.values(name) for name in ("alpha", "beta"))
    values: dict[str, float | str] = {
        f"exponent of N* without the {k} worst runs": float(exponent)
        for k, exponent in zip(without.num_dropped, beta / (alpha + beta), strict=True)
    }
    for other in delta_sweep(surface.fit):
        values[f"exponent of N* at delta {other.delta:g}"] = as_surface(other).exponent_N
    return values


def _agreement_values(
    surface: LossSurface, power: PowerFit, clusters: np.ndarray
) -> dict[str, float | str]:
    weights = resampling_weights(len(clusters), NUM_REPLICATES, clusters=clusters)
    found = agreement(power, surface, SurfaceBootstrap(refit(surface.fit, weights)))
    verdict = "agree" if found.agree else "differ: the law or the profiles are wrong"
    return {
        "approach 2 less 3, exponent of N*": found.difference,
        "its 95 % margin": found.margin,
        "approaches": verdict if np.isfinite(found.margin) else "no interval: needs >= 3 budgets",
    }


def _residual_values(surface: LossSurface, runs: pd.DataFrame) -> dict[str, float | str]:
    residual_I = surface.fit.residuals_I
    worst = np.argsort(-np.abs(residual_I), kind="stable")[:WORST]
    names = runs["run_id"].fillna("unnamed").to_numpy()
    values: dict[str, float | str] = {
        "rms residual of ln L": float(np.sqrt(np.mean(residual_I**2)))
    }
    for place, i in enumerate(worst, 1):
        values[f"residual {place} by size, {names[i]}"] = float(residual_I[i])
    return values
