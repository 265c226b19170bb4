"""Tables 1 and 2, figures 3a and 3b, from runs that are made up."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.captions import num_experts_caption, num_heads_caption
from analysis.experts import experts_study
from analysis.experts_figures import plot_num_experts, plot_num_heads, plot_usage_growth
from analysis.isoflop import fit_isoflop
from analysis.load import AnalysisError, as_frame, load_runs
from analysis.paper_command import write_figures, write_tables
from analysis.paper_tables import published_table1, table1, table2
from analysis.usage_growth import growth_table, usage_growth
from conftest import ROOT
from peer_scaling.publish import write_record
from reported import record_of

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
                    "expert_usage": 0.5, "expert_unevenness": 1.0, "val_tokens": 131072, "study": "made_up",
                    "run_id": f"n{num_experts}-h{heads}-k{per_head}-{norm}-{size}-s{seed}",
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
    assert table.loc["effective experts", "16,384 none"] == f"{16384 / np.e:,.0f}"
    assert set(table.loc["validation tokens"]) == {"131,072"}
    frame.loc[frame["seed"] == 1, "val_tokens"] = 65536
    some = table2(experts_study(frame), 6e10)
    assert set(some.loc["validation tokens"]) == {"65,536 to 131,072"}
    unknown = table2(experts_study(frame.assign(val_tokens=np.nan, expert_unevenness=np.nan)), 6e10)
    for row in ("validation tokens", "effective experts"):
        assert set(unknown.loc[row]) == {"not recorded"}


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


def records_of(frame, growth):
    """Of its runs; `growth` by seed and number of experts."""
    return [
        replace(record_of(row | {"status": "done", "causal": True}), expert_usage_growth=growth(row["seed"], row["num_experts"]))
        for row in frame.to_dict("records")
    ]  # fmt: skip


def test_growth_is_mean_and_range_over_the_runs_that_have_it():
    frame = as_frame(runs(TABLE2))
    study = experts_study(frame)

    def growth(seed, num_experts):
        if seed == 2:
            return {}
        extra = {"2048": 0.9} if seed else {}
        return {
            "512": 0.1 + 0.2 * seed,
            "1024": 256 / num_experts,
            "x": 0.5,
            "0": 0.5,
            "9": 2.0,
        } | extra

    found = usage_growth(study, 6e10, records_of(frame, growth))
    assert [g.point.num_experts for g in found] == [256, 256, 1024, 1024, 16384, 16384]
    for g in found:
        assert (g.num_runs, g.tokens) == (2, (512, 1024))
        assert g.share == pytest.approx((0.2, 256 / g.point.num_experts))
        assert (g.least[0], g.most[0]) == pytest.approx((0.1, 0.3))
    table = growth_table(found)
    assert table["val_tokens"].tolist() == [512, 1024] * 6
    (ax,) = plot_usage_growth(found, 6e10).axes
    assert [line.get_label() for line in ax.lines][:2] == [
        "256 experts, query norm batch",
        "256 experts, query norm none",
    ]
    assert len({line.get_color() for line in ax.lines}) == 3
    assert ax.get_xscale() == "log"
    assert list(ax.lines[0].get_ydata()) == list(found[0].share)
    with pytest.raises(AnalysisError, match="none of 6 settings has runs with"):
        usage_growth(study, 6e10, records_of(frame, lambda *_: {}))


def test_growth_and_captions_are_written_from_records(tmp_path):
    frame = as_frame(runs(TABLE2))
    for number, record in enumerate(records_of(frame, lambda *_: {"512": 0.25, "1024": 0.5})):
        layer = frame.iloc[number][["num_experts", "num_heads", "experts_per_head"]].astype(int)
        norm = {"name": "peer", "query_norm": frame["query_norm"][number]}
        config = {"ffw": layer.to_dict() | norm}
        write_record(replace(record, config=config), tmp_path / "made_up" / record.run_id)
    write_record(replace(record, run_id="bad", status="diverged", reason="nan", loss=None), tmp_path / "made_up" / "bad")  # fmt: skip
    lines = write_figures(str(tmp_path / "made_up"), None, tmp_path / "out")
    (line,) = (line for line in lines if line.startswith("usage growth at 6e10: "))
    names = ["usage_growth_6e10.png", "usage_growth_6e10.svg", "usage_growth_6e10.caption.md", "usage_growth_6e10.csv"]  # fmt: skip
    assert [path.rpartition("/")[2] for path in line.split(": ")[1].split(", ")] == names
    table = pd.read_csv(tmp_path / "out" / "usage_growth_6e10.csv")
    assert set(table["expert_usage"]) == {0.25, 0.5}
    for name in ("figure3a_6e10", "usage_growth_6e10"):
        caption = (tmp_path / "out" / f"{name}.caption.md").read_text()
        assert "at 6e10 training FLOPs" in caption
        assert "- bad: diverged: nan" in caption
        points = [line for line in caption.splitlines() if line.startswith("- N ")]
        assert len(points) == 6


@pytest.mark.parametrize(("caption", "cells"), [(num_experts_caption, TABLE2), (num_heads_caption, FIGURE3B)])  # fmt: skip
def test_captions_of_figures_3a_and_3b(caption, cells):
    rows = pd.concat([runs(cells), runs([(512, 16, 1, "layer")])], ignore_index=True)
    frame = as_frame(rows)
    frame.loc[0, "excluded"] = "superseded by another"
    study = experts_study(frame)
    text = caption(study, 6e10, frame)
    assert "6e10 training FLOPs" in text
    assert "Bars are 95 % intervals" in text
    assert f"- {frame['run_id'][0]}: superseded by another" in text
    assert f"from {len(frame) - 1} of {len(frame)} runs" in text
    shown, others = text.split("that are no points")
    drawn = len(cells) + (caption is num_experts_caption)
    assert shown.count("- N ") == drawn
    assert others.count("- N 512, h 16, k 1, query norm layer") == len(cells) + 1 - drawn
    one = next(p for p in study.points if p.num_experts == cells[0][0])
    assert f"{one.loss:.4f} +- {one.margin:.4f}; {one.size} of d16_l2, d24_l2; 3 run(s)" in text
    alone = as_frame(runs(cells, seeds=1))
    assert "There are no intervals" in caption(experts_study(alone), 6e10, alone)
