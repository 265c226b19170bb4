"""Tables 1 and 2, figures 3a and 3b, from runs that are made up."""

import numpy as np
import pandas as pd
import pytest

from analysis.experts import experts_study
from analysis.experts_figures import plot_num_experts, plot_num_heads
from analysis.isoflop import fit_isoflop
from analysis.load import AnalysisError, as_frame, load_runs
from analysis.paper_command import write_figures, write_tables
from analysis.paper_tables import published_table1, table1, table2
from conftest import ROOT

COMMITTED = ROOT / "docs" / "figures" / "isoflop_laptop"
NOISE = 0.01


def loss_of(num_experts, heads, per_head, norm, size):
    best = 4.0 - 0.04 * np.log2(num_experts / 256) - 0.01 * np.log2(heads * per_head)
    return best + (0.02 if norm == "none" else 0.0) + {"d16_l2": 0.05, "d24_l2": 0.0}[size]


def runs(cells, seeds=3):
    rng, rows = np.random.default_rng(0), []
    for num_experts, heads, per_head, norm in cells:
        for size, N in (("d16_l2", 1e5), ("d24_l2", 2e5)):
            for seed in range(seeds):
                loss = loss_of(num_experts, heads, per_head, norm, size) + rng.normal(0, NOISE)
                rows.append({
                    "variant": f"n{num_experts}_h{heads}_k{per_head}_{norm}", "ffw": "peer", "size": size,
                    "budget": 6e10, "flops": 6e10, "seed": seed, "num_params_total": N + num_experts,
                    "num_params_active": N, "tokens": 1e6, "loss": loss, "num_experts": num_experts,
                    "num_heads": heads, "experts_per_head": per_head, "query_norm": norm,
                    "expert_usage": 0.5, "expert_unevenness": 1.0, "study": "made_up",
                })  # fmt: skip
    return pd.DataFrame(rows)


TABLE2 = [(n, 4, 8, norm) for n in (256, 1024, 16384) for norm in ("none", "batch")]
FIGURE3B = [(4096, h, hk // h, "batch") for hk in (8, 32) for h in (1, 2, 4)]


def test_table_2_has_a_column_per_number_and_norm_at_the_best_size():
    frame = as_frame(runs(TABLE2))
    table = table2(experts_study(frame), 6e10)
    numbers = ("256", "1,024", "16,384")
    assert list(table.columns) == [f"{n} {norm}" for n in numbers for norm in ("none", "batch")]
    assert set(table.loc["best size"]) == {"d24_l2"}
    of = frame[(frame["variant"] == "n1024_h4_k8_none") & (frame["size"] == "d24_l2")]["loss"]
    assert table.loc["perplexity", "1,024 none"] == f"{np.exp(of.mean()):.2f}"
    assert table.loc["perplexity, He 2024", "16,384 batch"] == "23.47"
    assert table.loc["perplexity, He 2024", "256 batch"] == ""


def test_margins_are_those_of_the_spread_between_seeds():
    """Over many settings: about 95 % of the means are within their margin of the truth."""
    cells = [(n, h, 8, norm) for n in (256, 1024, 4096, 16384) for h in (1, 2, 4, 8, 16) for norm in ("none", "batch")]  # fmt: skip
    points = experts_study(as_frame(runs(cells))).points
    truth = [loss_of(p.num_experts, p.num_heads, 8, p.query_norm, p.size) for p in points]
    inside = [abs(p.loss - true) <= p.margin for p, true in zip(points, truth, strict=True)]
    assert np.mean(inside) > 0.85
    assert points[0].margin == pytest.approx(2 * NOISE / np.sqrt(3), rel=0.3)
    alone = experts_study(as_frame(runs(cells[:3], seeds=1))).points[0]
    assert np.isnan(alone.margin)


def test_figure_3a_draws_the_numbers_of_experts_and_dense():
    frame = runs(TABLE2)
    dense = {"variant": "dense", "ffw": "dense", "size": "d16_l2", "budget": 6e10, "flops": 6e10, "seed": 0,
             "num_params_total": 1e5, "num_params_active": 1e5, "tokens": 1e6, "loss": 4.2, "study": "made_up"}  # fmt: skip
    study = experts_study(as_frame(pd.concat([frame, pd.DataFrame([dense])], ignore_index=True)))
    (ax,) = plot_num_experts(study, 6e10).axes
    lines = {c.get_label(): c.lines[0] for c in ax.containers}
    assert list(lines["PEER, query norm batch"].get_xdata()) == [256, 1024, 16384]
    drawn = [p.loss for p in study.with_experts(6e10, "none")]
    assert list(lines["PEER, query norm none"].get_ydata()) == drawn
    assert any(line.get_label() == "dense" and set(line.get_ydata()) == {4.2} for line in ax.lines)


def test_figure_3b_has_a_line_per_number_of_active_experts():
    study = experts_study(as_frame(runs(FIGURE3B)))
    (ax,) = plot_num_heads(study, 6e10).axes
    lines = {c.get_label(): c.lines[0] for c in ax.containers}
    assert sorted(lines) == ["h k = 32", "h k = 8"]
    assert list(lines["h k = 8"].get_xdata()) == [1, 2, 4]


def test_what_a_study_lacks_is_said(tmp_path):
    path = tmp_path / "runs.csv"
    runs(FIGURE3B).to_csv(path, index=False)
    lines = write_figures(str(path), None, tmp_path) + write_tables(str(path), None, tmp_path)
    said = {line.split(":")[0]: line for line in lines}
    assert said["figure 3b at 6e10"].endswith("figure3b_6e10.csv")
    for missing in ("figure 1, or 4", "figure 3a at 6e10", "table 1", "table 2 at 6e10"):
        assert "not written" in said[missing]
    frame = load_runs(COMMITTED)
    with pytest.raises(AnalysisError, match="none of 72 runs is a finished one of peer"):
        experts_study(frame.loc[frame["ffw"].isin(["dense", "moe"])])


def test_table_1_is_in_the_papers_layout():
    frame = load_runs(COMMITTED)
    ours, theirs = table1(fit_isoflop(frame), frame), published_table1()
    assert ours.loc["dense (6e10)", "nats below dense"] == "+0.000"
    assert ours.loc["moe (not causal) (1.6e11)", "perplexity at the minimum"] == "flat"
    assert theirs.loc["peer (6e18)", "nats below dense, C4"] == "+0.145"
    assert theirs.shape == (8, 6)
