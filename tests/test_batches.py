"""Batches are a pure function of (seed, step); the synthetic source has the entropy it states."""

import numpy as np
import pytest

from peer_scaling import documents
from peer_scaling.data import DataConfig, TrainingBatches, Windows, window_order
from peer_scaling.prepare import find_prepared, prepare
from peer_scaling.synthetic import entropy_rate, markov_chain, stationary, transition_matrix
from peer_scaling.tokenizer import TokenizerConfig


def synthetic(**options):
    tokenizer = TokenizerConfig("none", 32)
    return DataConfig("synthetic", tokenizer, **{"context": 16, "num_tokens": 20_000, **options})


def test_every_token_but_the_first_is_predicted_once():
    corpus = prepare(synthetic())
    windows = Windows(corpus, "train", 16)
    rows = windows.read(np.arange(len(windows)))
    stream = np.fromfile(corpus.folder / "train-00000.bin", corpus.manifest["dtype"])
    assert rows.shape == (len(windows), 17)
    assert np.array_equal(rows[:, 1:].ravel(), stream[1 : 1 + len(windows) * 16])
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])


def test_windows_do_not_cross_shards():
    corpus = prepare(synthetic(shard_tokens=1000))
    windows = Windows(corpus, "train", 16)
    assert len(windows) == 20 * (999 // 16)
    last = windows.read(np.array([len(windows) - 1]))
    stream = np.fromfile(corpus.folder / "train-00019.bin", corpus.manifest["dtype"])
    assert np.array_equal(last[0], stream[61 * 16 : 62 * 16 + 1])


def test_batches_are_a_function_of_seed_and_step():
    windows = Windows(prepare(synthetic()), "train", 16)
    forward = TrainingBatches(windows, 8, seed=3, order="shuffled")
    backward = TrainingBatches(windows, 8, seed=3, order="shuffled")
    steps = [0, 1, 155, 156, 157, 400]
    first = {s: forward.batch(s) for s in steps}
    assert all(np.array_equal(backward.batch(s), first[s]) for s in reversed(steps))
    other = TrainingBatches(windows, 8, seed=4, order="shuffled")
    assert not np.array_equal(other.batch(0), first[0])


def test_an_epoch_reads_every_window_once_and_epochs_differ():
    windows = Windows(prepare(synthetic()), "train", 16)
    orders = [window_order(len(windows), 0, epoch, "shuffled") for epoch in (0, 1)]
    assert all(np.array_equal(np.sort(o), np.arange(len(windows))) for o in orders)
    assert not np.array_equal(*orders)
    batches = TrainingBatches(windows, len(windows), 0, "shuffled")
    assert np.array_equal(batches.batch(1), windows.read(orders[1]))


def test_window_order_is_the_same_for_all_time():
    assert window_order(8, 1, 0, "shuffled").tolist() == [3, 5, 2, 7, 0, 6, 1, 4]


def test_stream_order_does_not_depend_on_how_much_is_prepared(monkeypatch):
    monkeypatch.setitem(documents.SOURCES, "c4", fake_c4)
    monkeypatch.setattr(documents, "check_hub", lambda dataset: None)
    config = DataConfig("c4", TokenizerConfig("bytes", 257), 16, order="stream", shard_tokens=1000)
    assert find_prepared(config) is None
    small, large = prepare(config, 900), prepare(config, 2500)
    assert small.num_tokens("train") == 1000
    assert large.num_tokens("train") == 3000
    assert small.fingerprint("stream") == large.fingerprint("stream")
    batches = [
        TrainingBatches(Windows(c, "train", 16), 4, 0, "stream").batch(3) for c in (small, large)
    ]
    assert np.array_equal(*batches)
    found = find_prepared(config)
    assert found is not None
    assert found.num_tokens("train") == 3000


def test_a_stream_is_prepared_once_for_all_runs_of_a_study(monkeypatch):
    """However many tokens a run needs, whole windows hold them, and shorter runs read the same."""
    monkeypatch.setitem(documents.SOURCES, "c4", fake_c4)
    monkeypatch.setattr(documents, "check_hub", lambda dataset: None)
    config = DataConfig("c4", TokenizerConfig("bytes", 257), 48, order="stream", shard_tokens=500)
    corpus = prepare(config, 9000)
    assert len(Windows(corpus, "train", 48)) * 48 >= 9000
    monkeypatch.setitem(documents.SOURCES, "c4", None)
    assert prepare(config, 500).folder == corpus.folder


def fake_c4(path, fraction):
    yield from (("validation", f"held out {i} " * 9) for i in range(20))
    yield from (("train", f"training text number {i}, of some length") for i in range(1000))


def test_markov_chain_has_the_entropy_that_it_says():
    matrix = transition_matrix(16)
    chain = markov_chain(matrix, 400_000, seed=5)
    counts = np.zeros((16, 16))
    np.add.at(counts, (chain[:-1], chain[1:]), 1)
    assert np.allclose(counts.sum(1) / counts.sum(), stationary(matrix), atol=0.01)
    probability = counts / counts.sum(1, keepdims=True).clip(1)
    logs = np.log(np.where(probability > 0, probability, 1))
    empirical = -(counts / counts.sum() * logs).sum()
    assert empirical == pytest.approx(entropy_rate(matrix), abs=0.01)
    assert np.array_equal(chain, markov_chain(matrix, 400_000, seed=5))


def test_synthetic_manifest_states_its_entropy():
    corpus = prepare(synthetic())
    assert corpus.manifest["entropy_nats"] == pytest.approx(entropy_rate(transition_matrix(32)))
    assert corpus.num_tokens("train") == 20_000
