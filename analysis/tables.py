"""Tables from frozen results, as frames and as text: Markdown, LaTeX, CSV."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.compare import ComputeMultiplier
from analysis.isoflop import ORDER, IsoflopFit, PowerLaw
from analysis.load import display_name, not_causal, usable
from peer_scaling.record import budget_label

BASELINE = "dense"
EXPERT_USE = ("expert_usage", "expert_unevenness")


def optima_table(fit: IsoflopFit) -> pd.DataFrame:
    """One row per profile: minimum with intervals, the best trained run, and the status."""
    rows = [
        {
            "variant": p.variant,
            "budget": budget_label(p.budget),
            "status": str(p.status),
            fit.axis: p.num_params,
            f"{fit.axis}_low": p.num_params_low,
            f"{fit.axis}_high": p.num_params_high,
            "tokens": p.tokens,
            "loss": p.loss,
            "loss_margin": p.loss_margin,
            "perplexity": np.exp(p.loss),
            "best_trained_size": p.best_size,
            "best_trained_params": p.best_num_params,
            "best_trained_loss": p.best_loss,
            "best_trained_perplexity": np.exp(p.best_loss),
            "num_sizes": p.num_sizes,
            "num_runs": p.num_runs,
            "curve": str(p.shape or ""),
            "interval_from": str(p.noise or ""),
            "noise": p.noise_stderr,
            "near_best": " ".join(p.near_best),
            "left_out": len(p.left_out),
            "reason": p.reason,
        }
        for p in fit.profiles
    ]
    return pd.DataFrame(rows)


def with_causality(table: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """A table with a column `variant`, and one that says whether the variant is causal."""
    return table.assign(causal=~table["variant"].isin(list(not_causal(frame))))


def laws_table(fit: IsoflopFit) -> pd.DataFrame:
    """One row per power law, coefficients at full precision."""
    rows = [{**vars(law), "exponent_margin": law.exponent_margin} for law in fit.laws]
    columns = [*PowerLaw.__dataclass_fields__, "exponent_margin"]
    return pd.DataFrame(rows, columns=columns)


def perplexity_table(fit: IsoflopFit, frame: pd.DataFrame) -> pd.DataFrame:
    """Perplexity at the minimum, variant x budget; the status where there is no minimum."""
    cells = {}
    for budget in fit.budgets:
        profiles = [fit.profile(variant, budget) for variant in fit.variants]
        cells[budget_label(budget)] = [
            "" if p is None else f"{np.exp(p.loss):.2f}" if p.ok else str(p.status)
            for p in profiles
        ]
    names = [display_name(variant, frame) for variant in fit.variants]
    return pd.DataFrame(cells, index=pd.Index(names, name="variant"))


def nats_below_dense(fit: IsoflopFit, frame: pd.DataFrame) -> pd.DataFrame:
    """L*(dense) - L*(variant) in nats, variant x budget; blank where either has no minimum."""
    cells: dict[str, list[str]] = {}
    for budget in fit.budgets:
        base = fit.profile(BASELINE, budget)
        profiles = [fit.profile(variant, budget) for variant in fit.variants]
        cells[budget_label(budget)] = [
            f"{base.loss - p.loss:+.3f}" if base and p and base.ok and p.ok else ""
            for p in profiles
        ]
    names = [display_name(variant, frame) for variant in fit.variants]
    return pd.DataFrame(cells, index=pd.Index(names, name="variant"))


def multiplier_table(multipliers: Sequence[ComputeMultiplier]) -> pd.DataFrame:
    """One row per comparison with the baseline."""
    return pd.DataFrame(
        [{**vars(m), "budget": budget_label(m.budget)} for m in multipliers],
        columns=list(ComputeMultiplier.__dataclass_fields__),
    )


def expert_use_table(fit: IsoflopFit, frame: pd.DataFrame) -> pd.DataFrame:
    """Use of the experts at the best trained size, means over seeds; as Table 2 of He 2024.

    Usage is the share of experts that any validation token reads, unevenness the KL divergence
    (nats) of the router's weights from uniform.
    """
    runs = usable(frame)
    rows = []
    for profile in sorted(fit.profiles, key=lambda p: (p.budget, fit.variants.index(p.variant))):
        of_cell = (runs["variant"] == profile.variant) & (runs["budget"] == profile.budget)
        chosen = runs.loc[of_cell & (runs["size"] == profile.best_size)]
        usage, unevenness = (float(np.mean(chosen[name])) for name in EXPERT_USE)
        if not np.isnan(usage):
            name, perplexity = display_name(profile.variant, frame), np.exp(profile.best_loss)
            row = [name, budget_label(profile.budget), profile.best_size, f"{perplexity:.2f}"]
            rows.append([*row, f"{100 * usage:.1f}", f"{unevenness:.2f}"])
    columns = ["variant", "budget", "size", "perplexity", "usage (%)", "unevenness"]
    return pd.DataFrame(rows, columns=columns).set_index("variant")


def published(name: str) -> pd.DataFrame:
    """A table of the paper: `table1` or `table2` (He 2024, 2407.04153)."""
    with (files("analysis") / "published" / f"{name}.csv").open() as file:
        return pd.read_csv(file, comment="#", dtype={"budget": str})


def published_nats_below_dense(column: str = "c4") -> pd.DataFrame:
    """Table 1 as ln(dense perplexity / perplexity), variant x budget: comparable across scales."""
    table = published("table1").pivot(index="method", columns="budget", values=column)
    gaps = np.log(table.loc[BASELINE]) - np.log(table.loc[list(ORDER)])
    budgets = sorted(gaps.columns, key=float)
    formatted = gaps[budgets].map(lambda gap: f"{gap:+.3f}")
    return formatted.rename_axis(index="variant", columns=None)


def published_expert_use() -> pd.DataFrame:
    """Table 2, indexed by the number of experts: PEER on C4, with and without query BatchNorm."""
    table = published("table2").set_index("num_experts")
    columns = {"expert_usage_percent": "usage (%)", "query_norm": "query norm"}
    formats = {"perplexity": "{:.2f}", "usage (%)": "{:.1f}", "unevenness": "{:.2f}"}
    table = table.rename(columns=columns)
    return table.assign(**{name: table[name].map(form.format) for name, form in formats.items()})


def to_markdown(table: pd.DataFrame) -> str:
    """A frame with its index as a Markdown table."""
    header = [table.index.name or "", *map(str, table.columns)]
    rows = [[str(i), *map(str, row)] for i, row in zip(table.index, table.to_numpy(), strict=True)]
    lines = [header, ["---"] + ["---:"] * len(table.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def to_latex(table: pd.DataFrame) -> str:
    """A frame with its index as a LaTeX tabular (booktabs)."""
    header = [table.index.name or "", *map(str, table.columns)]
    rows = [[str(i), *map(str, row)] for i, row in zip(table.index, table.to_numpy(), strict=True)]
    body = [" & ".join(map(_latex_escaped, row)) + r" \\" for row in rows]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(map(_latex_escaped, header)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def write_table(
    table: pd.DataFrame, folder: Path, name: str, csv_only: Sequence[str] = ()
) -> list[Path]:
    """Write a table as .md, .tex and .csv; some columns into the last alone."""
    folder.mkdir(parents=True, exist_ok=True)
    read = table.drop(columns=list(csv_only))
    texts = {"md": to_markdown(read), "tex": to_latex(read), "csv": table.to_csv().rstrip("\n")}
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"{name}.{suffix}")
        paths[-1].write_text(text + "\n")
    return paths


def _latex_escaped(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(
            character, rf"\{character}" if character != "\\" else r"\textbackslash "
        )
    return text
