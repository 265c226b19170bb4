"""Which experts fire: the numbers of training's own count, figures, and files that are none."""

import numpy as np
import pytest
import torch

from analysis.expert_shares import (
    ExpertShares,
    read_expert_shares,
    shares_table,
    top_experts,
    top_share,
)
from analysis.expert_shares_figures import plot_key_map, plot_shares
from analysis.load import load_runs
from analysis.schema import AnalysisError
from conftest import ROOT
from peer_scaling.evaluate import ExpertUse
from peer_scaling.ffw.base import Routing

STUDY = ROOT / "docs" / "studies" / "laptop_experts"


def layer(scores, label="a layer"):
    return ExpertShares(label, np.array(scores, dtype=float), np.arange(len(scores)))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_committed_files_are_what_the_records_say(norm):
    shares = read_expert_shares(STUDY / f"peer_{norm}.csv", norm)
    runs = load_runs(STUDY / "records").set_index("query_norm")
    assert shares.usage == runs["expert_usage"][norm]
    assert shares.unevenness == pytest.approx(runs["expert_unevenness"][norm], abs=1e-12)
    tokens = runs["val_tokens"][norm]
    heads, kept = (runs[name][norm] for name in ("num_heads", "experts_per_head"))
    assert shares.choices_N.sum() == tokens * heads * kept
    assert shares.score_N.sum() == pytest.approx(tokens * heads, rel=1e-6)  # a softmax per head


def test_usage_and_unevenness_are_those_of_training():
    generator = torch.Generator().manual_seed(0)
    expert = torch.randint(12, (500,), generator=generator)  # 4 of 16 are never chosen
    weight = torch.rand(500, generator=generator)
    use = ExpertUse()
    use.add(Routing(expert, weight, 16))
    score_N = np.bincount(expert.numpy(), weight.double().numpy(), 16)
    shares = layer(score_N)
    assert shares.usage == use.usage == 0.75
    assert shares.unevenness == pytest.approx(use.unevenness, abs=1e-12)


def test_a_uniform_layer_and_one_expert_alone():
    uniform, alone = layer(np.ones(16)), layer([0.0, 7.0, 0.0, 0.0])
    assert uniform.unevenness == pytest.approx(0, abs=1e-12)
    assert uniform.effective == pytest.approx(16)
    assert alone.unevenness == pytest.approx(np.log(4))
    assert alone.effective == pytest.approx(1)
    assert (uniform.unread, alone.unread) == ((0, 0), (1, 1))
    assert (top_share(uniform, 0.5), top_share(alone, 0.01)) == (0.5, 1)


def test_tables_name_the_most_used_by_their_sub_keys():
    shares = layer([1, 1, 2, 0, 0, 6, 0, 0, 0])
    table = top_experts(shares, 2)
    assert table.index.tolist() == [5, 2]
    assert table.loc[5].tolist() == [1, 2, 5.4, 5]
    summary = shares_table([shares, layer(np.ones(5), "no square")])
    assert summary.loc["a layer", "usage (%)"] == "44.4"
    assert summary.loc["a layer", "unread sub-keys"] == "1 + 0 of 2 x 3"
    assert summary.loc["no square", "unread sub-keys"] == ""
    with pytest.raises(AnalysisError, match="5 experts are no square"):
        plot_key_map([layer(np.ones(5))])


def test_figures_show_every_expert():
    shares = layer([0, 1, 1, 0, 0, 6, 0, 0, 0])
    left, right = plot_shares([shares]).axes
    drawn = left.lines[0].get_ydata()
    assert np.nansum(drawn) == pytest.approx(9)
    assert np.isnan(drawn).sum() == 6
    assert right.lines[0].get_ydata()[-1] == pytest.approx(1)
    image = plot_key_map([shares]).axes[0].images[0].get_array()
    assert image.shape == (3, 3)
    assert image.mask.sum() == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expert,score\n0,1\n", "no column choices; `peer-eval RUN --experts"),
        ("expert,score,choices\n", "no row"),
        ("expert,score,choices\n0,x,1\n", "could not convert"),
        ("expert,score,choices\n0,1\n", "columns"),
        ("expert,score,choices\n0,1,1\n2,1,1\n", "experts must be 0 to 1, once each"),
        ("expert,score,choices\n0,-1,1\n1,1,1\n", "must be numbers from 0 on"),
        ("expert,score,choices\n0,nan,1\n1,1,1\n", "must be numbers from 0 on"),
        ("expert,score,choices\n0,0,0\n1,0,0\n", "not all 0"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "experts.csv"
    path.write_text(text)
    with pytest.raises(AnalysisError, match=message):
        read_expert_shares(path, "a layer")


def test_rows_may_come_in_any_order(tmp_path):
    path = tmp_path / "experts.csv"
    path.write_text("choices,expert,score,more\n4,1,2.5,x\n1,0,0.5,y\n")
    shares = read_expert_shares(path, "a layer")
    assert shares.score_N.tolist() == [0.5, 2.5]
    assert shares.choices_N.tolist() == [1, 4]
