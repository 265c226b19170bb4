"""F37: planted leaks are found and named, clean models are left alone, and a run that leaks is invalid."""

import math
import random
import time

import numpy as np
import pytest
import torch

import plants
from analysis.load import load_runs, usable
from peer_scaling import causality, parallel
from peer_scaling.display import result_line
from peer_scaling.distributed import ALONE
from peer_scaling.ffw.base import FFWOutput
from peer_scaling.ffw.dense import Dense
from peer_scaling.ffw.moe import MoE, MoEFFW
from peer_scaling.leaks import BITS, LABELS, LATER, Search
from peer_scaling.model import DecoderConfig, build_model
from peer_scaling.optim import OptimConfig, make_optimizer
from peer_scaling.parallel import Losses
from peer_scaling.probing import Probe
from peer_scaling.record import RECORD
from peer_scaling.snapshot import state_digest
from peer_scaling.train import exit_code, run_once
from planned_runs import make_planned
from scorecard import report
from tiers import count

SEEDS = range(5)
SHORT = ("budget=7e8", "threads=1", "save_model=false")


def probed(losses, context=plants.CONTEXT, vocab=plants.VOCAB, **options):
    return causality.probe(losses, vocab, context, torch.device("cpu"), **options)


def kinds(found):
    return {leak.kind for leak in found.leaks}


def test_planted_leaks_are_found_and_named_and_clean_models_left_alone():
    """F37."""
    cases = [(name, plants.planted(name, seed)) for name in plants.LEAKS for seed in SEEDS]
    cases += [(name, plants.clean(name, seed)) for name in plants.CLEAN for seed in SEEDS]
    began, results = time.process_time(), []
    for name, losses in cases:
        options = {"document_end": plants.END} if name == "document border" else {}
        results.append((name, probed(losses, **options)))
    seconds = time.process_time() - began
    assert [r for r in results if kinds(r[1]) != plants.LEAKS.get(r[0], set())] == []
    for name, found in results[-len(plants.CLEAN) * len(SEEDS) :]:
        assert found.batch_coupled == plants.CLEAN[name].batch_coupled
    planted, clean = (len(names) * len(SEEDS) for names in (plants.LEAKS, plants.CLEAN))
    report(
        "F37",
        f"{planted} of {planted} leaks found and named, 0 of {clean} false alarms, "
        f"{seconds:.1f} s of processor time",
    )


@pytest.mark.parametrize("width", [16, 96])
def test_rounding_is_no_leak(width):
    """Padded FFTs round anywhere, and a token's place among those of its expert may matter."""
    padded = plants.with_ffw(0, Dense(), lambda layer: plants.Around(layer, plants.padded))
    assert not probed(padded).leaks
    shape = DecoderConfig(d_model=width, num_layers=2, num_heads=2)
    for ffw in (*plants.CLEAN.values(), MoE(num_experts=8, router="token_choice", top_k=2)):
        model = build_model(shape, ffw, 256, 96, seed=0)
        assert not probed(Losses(model), context=96, vocab=256).leaks
    inside = plants.masked(0, plants.within)
    assert not probed(inside, document_end=plants.END).leaks


@pytest.mark.parametrize("context", [1, 2, 5, 17])
def test_short_contexts(context):
    model = build_model(plants.SHAPE, Dense(), 2, context, seed=0)
    assert not probed(Losses(model), context, vocab=2).leaks
    if context > 1:
        model = build_model(plants.SHAPE, Dense(), plants.VOCAB, context, seed=0)
        given = probed(plants.GivenLabels(model), context)
        assert LABELS in kinds(given)


def test_a_model_that_computes_twice_is_probed_alike():
    model = build_model(
        plants.SHAPE, Dense(), plants.VOCAB, plants.CONTEXT, 0, activation_checkpointing=True
    )
    assert not probed(Losses(model)).leaks


def test_a_leak_that_is_zero_at_first_is_found_after_training():
    losses = plants.with_ffw(0, Dense(), plants.Gated)
    assert not probed(losses).leaks
    optimizer = torch.optim.Adam(losses.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        tokens = torch.randint(plants.VOCAB, (4, 17), generator=generator)
        (losses(tokens).cross_entropy_sum / 64).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert kinds(probed(losses)) == {LATER}


def test_a_leak_below_single_precision_has_a_derivative():
    losses = plants.with_ffw(0, Dense(), plants.Gated)
    tokens = Probe.draw(plants.VOCAB, plants.CONTEXT, torch.device("cpu"), None)
    with torch.no_grad():
        search = Search(losses, tokens, BITS, ALONE)
        assert search._gradient_leaks(search._base()[1]) == []
        losses.model.blocks[plants.SHAPE.swapped_block].ffw.gate.fill_(1e-11)
        (leak,) = search._gradient_leaks(search._base()[1])
    assert (leak.kind, leak.unit) == (LATER, "nats per unit of an embedding")
    assert kinds(probed(losses)) == {LATER}


def test_a_leak_in_training_alone_is_found():
    class Sometimes(plants.Around):
        def forward(self, x_BTD):
            return self.layer(self.change(x_BTD) if self.training else x_BTD)

    leaky = plants.with_ffw(0, Dense(), lambda layer: Sometimes(layer, plants.chunk_mean(16)))
    (leak,) = probed(leaky).leaks
    assert leak.kind == LATER
    assert "in training" in leak.place


def test_labels_count_for_every_layer_and_the_rest_where_it_is_declared_causal():
    chooser = probed(plants.planted("expert choice", 0))
    assert chooser.reason(causal=True).startswith("leak: later tokens: output ")
    assert chooser.reason(causal=False) is None
    assert chooser.outcome(causal=False) == "leaks, as declared"
    told = probed(plants.planted("shifted label", 0))
    assert told.reason(causal=False).startswith("leak: labels: the targets are the model's own")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["clean", "expert choice", "bidirectional mask"])
def test_nothing_is_left_behind(name, training):
    losses = plants.clean("peer", 0) if name == "clean" else plants.planted(name, 0)
    inner = losses.model if name != "bidirectional mask" else losses.model.model
    optimizer = make_optimizer(OptimConfig(), inner.optim_groups(), 0.01)
    losses.train()
    tokens = torch.randint(plants.VOCAB, (4, 17), generator=torch.Generator().manual_seed(0))
    losses(tokens).cross_entropy_sum.backward()
    optimizer.step()
    losses.train(training)
    losses.model.norm_was_off = inner.norm.eval()
    inner.norm.weight.requires_grad_(False)

    def state():
        tensors = [*losses.parameters(), *losses.buffers()]
        return (
            state_digest(losses, optimizer),
            [(t.data_ptr(), t.dtype, t.requires_grad) for t in tensors],
            [p.grad.sum().item() for p in losses.parameters() if p.grad is not None],
            [module.training for module in losses.modules()],
            [len(module._forward_hooks) for module in losses.modules()],
            (random.getstate(), str(np.random.get_state())),  # noqa: NPY002
            torch.get_rng_state().tolist(),
        )

    before = state()
    found = probed(losses)
    assert bool(found.leaks) == (name != "clean")
    assert state() == before


def test_the_code_of_a_compiled_model_is_probed_uncompiled():
    losses = plants.clean("peer", 0)
    losses.model.compile(backend=never)
    assert not probed(losses, compiled=True).leaks
    leaky = plants.planted("mean of chunks of 16", 0)
    leaky.model.compile(backend=never)
    assert kinds(probed(leaky, compiled=True)) == {LATER}


def never(graph, inputs):
    raise AssertionError("compiled")


def chunked(self, x_BTD):
    """Token choice with the mean of a chunk beside each token."""
    output = real_forward(self, x_BTD)
    return FFWOutput(plants.chunk_mean(16)(output.y_BTD), output.aux_loss, output.stats)


real_forward = MoEFFW.forward


def test_a_run_that_leaks_is_invalid_and_in_no_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(MoEFFW, "forward", chunked)
    planned = make_planned(tmp_path, *SHORT, "ffw.router=token_choice", ffw="moe")
    record = run_once(planned)
    assert record.status == "invalid"
    assert record.reason.startswith("leak: later tokens: output ")
    assert record.loss is not None
    assert record.environment["causality_gate"] == "leaks"
    assert f"invalid, {record.reason}" in result_line(record)
    assert exit_code(record) == 1
    written = (planned.folder / RECORD).stat().st_mtime_ns
    assert run_once(planned) == record
    assert (planned.folder / RECORD).stat().st_mtime_ns == written
    frame = load_runs(planned.folder)
    assert usable(frame).empty
    assert frame["excluded"].iloc[0].startswith("invalid: leak: later tokens: output ")


def test_a_layer_that_says_so_may_leak_but_not_be_told_its_labels(tmp_path, monkeypatch):
    record = run_once(make_planned(tmp_path / "a", *SHORT, ffw="moe"))
    assert (record.status, record.reason, record.causal) == ("done", None, False)
    assert record.environment["causality_gate"] == "leaks, as declared"
    monkeypatch.setattr(parallel.Losses, "forward", plants.ShiftedLabels.forward)
    record = run_once(make_planned(tmp_path / "b", *SHORT, ffw="moe"))
    assert record.status == "invalid"
    assert record.reason.startswith("leak: labels: ")


@pytest.mark.parametrize("ffw", ["dense", "peer"])
def test_a_run_has_the_bits_of_one_without_the_gate(tmp_path, monkeypatch, ffw):
    record = run_once(make_planned(tmp_path / "a", *SHORT, ffw=ffw))
    assert record.status == "done"
    assert record.environment["causality_gate"] == "passed"

    def fails(*_, **__):
        raise torch.OutOfMemoryError("no room for float64")

    monkeypatch.setattr("peer_scaling.step.probe", fails)
    without = run_once(make_planned(tmp_path / "b", *SHORT, ffw=ffw))
    assert without.status == "done"  # what trained is not lost for want of room for a probe
    assert (without.state_digest, without.loss) == (record.state_digest, record.loss)
    gate = without.environment["causality_gate"]
    assert gate == f"{causality.NOT_RUN}: OutOfMemoryError: no room for float64"


def train_on_noise(losses, steps):
    """Trained on random tokens; how many standard errors below log V the loss on fresh ones is."""
    optimizer = torch.optim.Adam(losses.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    shape = (8, plants.CONTEXT + 1)
    for _ in range(steps):
        tokens = torch.randint(plants.VOCAB, shape, generator=generator)
        output = losses(tokens)
        loss = output.cross_entropy_sum / tokens[:, 1:].numel()
        (loss + output.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    losses.eval()
    with torch.no_grad():
        fresh = [torch.randint(plants.VOCAB, shape, generator=generator) for _ in range(40)]
        means = [float(losses(t).cross_entropy_sum) / t[:, 1:].numel() for t in fresh]
    error = np.std(means, ddof=1) / math.sqrt(len(means))
    return (math.log(plants.VOCAB) - np.mean(means)) / error


@pytest.mark.skipif(not count(0, 1), reason="trains for minutes: PEER_SCALING_FAULTS=full")
def test_random_tokens_cannot_be_predicted():
    """The behavioural canary: below log V by more than 4 standard errors is a leak."""
    below = {name: train_on_noise(plants.clean(name, 0), 1500) for name in plants.CLEAN}
    assert max(below.values()) < 4, below
    chooser = plants.with_ffw(0, MoE(num_experts=4), plants.PerSequence)
    leak = train_on_noise(chooser, 1500)
    assert leak > 4
    worst = max(below.values())
    report(
        "F37",
        f"trained on noise, standard errors below log V: expert choice per sequence {leak:.0f}, "
        f"clean at most {worst:.1f}",
    )
