"""What the README says of the committed study holds for its records."""

import numpy as np
import pytest

from analysis.isoflop import fit_isoflop
from analysis.load import excluded, load_runs
from analysis.profile import ProfileStatus
from conftest import ROOT
from peer_scaling.data import DataConfig, Windows
from peer_scaling.prepare import prepare
from peer_scaling.tokenizer import TokenizerConfig

STUDY = ROOT / "docs" / "figures" / "isoflop_laptop"


@pytest.fixture(scope="module")
def frame():
    return load_runs(STUDY)


def test_every_run_is_used(frame):
    assert len(frame) == 4 * 6 * 3 * 2
    assert excluded(frame).empty
    assert frame["budget"].max() / frame["budget"].min() >= 8


def test_eleven_of_twelve_curves_have_a_minimum(frame):
    """Expert choice at 1.6e11: its seeds are 0.1 nats apart, the valley is not told from a plain."""
    fit = fit_isoflop(frame)
    assert len(fit.profiles) == 4 * 3
    refused = {(p.variant, p.budget, p.status) for p in fit.profiles if not p.ok}
    assert refused == {("moe", 1.6e11, ProfileStatus.FLAT)}


def test_budgets_are_met(frame):
    assert (frame["flops"] / frame["budget"] - 1).abs().max() <= 0.005


def test_every_run_learned_more_than_frequencies(frame):
    """Losses are far below the entropy of the validation tokens' frequencies."""
    corpus = prepare(DataConfig("sotu", TokenizerConfig("bpe", 512), 128))
    windows = Windows(corpus, "validation", 128)
    counts = np.bincount(windows.read(np.arange(len(windows)))[:, 1:].ravel())
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    assert entropy == pytest.approx(5.26, abs=0.01)
    assert frame["loss"].max() < entropy - 0.8
    best = frame.groupby(["variant", "budget"])["loss"].min().unstack()
    assert (best[best.columns.max()] < entropy - 1.8).all()
