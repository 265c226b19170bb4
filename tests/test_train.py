"""Training: records, determinism, accumulation, divergence."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from peer_scaling import loop as loop_module
from peer_scaling.data import Windows
from peer_scaling.display import result_line
from peer_scaling.evaluate import EvalConfig, ExpertUse, evaluate, num_batches
from peer_scaling.ffw.base import Routing
from peer_scaling.history import Course
from peer_scaling.loop import next_interval
from peer_scaling.parallel import Losses
from peer_scaling.prepare import prepare
from peer_scaling.publish import load_weights
from peer_scaling.record import HISTORY, RECORD, read_record
from peer_scaling.snapshot import state_digest
from peer_scaling.step import DivergedError, Stepper, Update, read_results
from peer_scaling.train import run_once
from planned_runs import SMALL, batch_of, make_planned, stepper_of

PEAK = "matmul_peak_flops_per_second"


@pytest.mark.parametrize("ffw", SMALL)
def test_a_run_leaves_a_complete_record(tmp_path, ffw):
    planned = make_planned(tmp_path, ffw=ffw)
    record = run_once(planned)
    assert record == read_record(planned.folder / RECORD)
    assert record.status == "done"
    unset = {k for k, v in vars(record).items() if v is None}
    expected = {"reason", "failure", "bits_per_byte"}  # synthetic tokens have no bytes
    expected |= {"git_commit"} & unset
    expected |= {"expert_usage", "expert_unevenness"} if ffw == "dense" else set()
    assert unset == expected
    assert abs(record.flops - 1e9) <= 0.005 * 1e9
    assert sum(record.flops_by_component.values()) == pytest.approx(record.flops)
    assert record.flops_by_convention["matmul"] == pytest.approx(record.flops)
    assert record.tokens == record.steps * 4 * 64
    assert record.perplexity == pytest.approx(np.exp(record.loss))
    assert record.val_tokens == 2048
    assert record.peak_memory_bytes > 2**20
    assert 0 < record.utilisation < 1
    assert record.utilisation == record.flops_per_second / record.matmul_peak_flops_per_second
    assert f"({100 * record.utilisation:.0f} % of peak)" in result_line(record)
    assert (planned.folder / "model.safetensors").is_file()


def test_history_has_each_logged_step_once(tmp_path):
    planned = make_planned(tmp_path, "eval.every=0.25", ffw="dense")
    run_once(planned)
    lines = [json.loads(x) for x in (planned.folder / HISTORY).read_text().splitlines()]
    training = [line for line in lines if "train/loss" in line]
    steps = [line["step"] for line in training]
    assert steps == sorted(set(steps))
    assert steps[-1] == planned.plan.steps
    assert len(steps) >= 100
    assert len([line for line in lines if "eval/loss" in line]) == 4
    assert training[-1]["flops"] == pytest.approx(planned.plan.flops)
    assert training[-1]["train/lr"] == pytest.approx(0.1 * planned.run.lr)


def test_losses_approach_the_entropy_of_the_source(tmp_path):
    """A first-order Markov chain: well below its unigram entropy, never below its entropy rate."""
    planned = make_planned(
        tmp_path,
        "budget=1e10",
        "size=d16_l2",
        "eval.tokens=16384",
        "data.num_tokens=1000000",
        ffw="dense",
    )
    record = run_once(planned)
    corpus = prepare(planned.run.data)
    tokens = np.fromfile(corpus.folder / "validation-00000.bin", corpus.manifest["dtype"])
    share = np.bincount(tokens) / len(tokens)
    unigram = -(share * np.log(share)).sum()
    assert corpus.manifest["entropy_nats"] - 0.02 < record.loss < 0.75 * unigram


@pytest.mark.parametrize("ffw", SMALL)
def test_same_config_same_bits(tmp_path, ffw):
    first = run_once(make_planned(tmp_path / "a", "budget=7e8", ffw=ffw))
    torch.rand(3)  # global randomness must not matter
    np.random.default_rng().random()
    second = run_once(make_planned(tmp_path / "b", "budget=7e8", "log_lines=7", ffw=ffw))
    assert first.run_id == second.run_id
    assert first.state_digest == second.state_digest
    assert first.loss == second.loss
    other = run_once(make_planned(tmp_path / "c", "budget=7e8", "seed=1", ffw=ffw))
    assert other.state_digest != first.state_digest


@pytest.mark.parametrize("ffw", SMALL)
def test_evaluation_leaves_no_trace(tmp_path, ffw):
    never = run_once(make_planned(tmp_path / "a", "budget=7e8", ffw=ffw))
    often = run_once(make_planned(tmp_path / "b", "budget=7e8", "eval.every=0.02", ffw=ffw))
    assert never.state_digest == often.state_digest


@pytest.mark.parametrize("ffw", SMALL)
@pytest.mark.parametrize("option", ["precision=bfloat16", "deterministic=true"])
def test_options_change_the_loss_by_rounding_only(tmp_path, ffw, option):
    plain = run_once(make_planned(tmp_path / "plain", ffw=ffw))
    other = run_once(make_planned(tmp_path / "other", option, ffw=ffw))
    assert other.status == "done"
    assert other.loss == pytest.approx(plain.loss, abs=0.05)
    if option == "precision=bfloat16":
        assert other.loss != plain.loss


@pytest.mark.parametrize("ffw", SMALL)
def test_activation_checkpointing_gives_the_same_bits(tmp_path, ffw):
    """Of losses, parameters, buffers (the query norm's statistics) and optimiser state."""
    states = []
    for option in ("false", "true"):
        planned = make_planned(tmp_path, f"activation_checkpointing={option}", ffw=ffw)
        stepper, model, optimizer = stepper_of(planned)
        results = [stepper.step(batch_of(planned, n), 1.0) for n in range(3)]
        states.append((read_results(results), state_digest(model, optimizer)))
    assert states[0] == states[1]


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own look at its inputs
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_compiled_model_trains_to_the_same_loss(tmp_path, checkpointing):
    plain = run_once(make_planned(tmp_path / "plain"))
    option = f"activation_checkpointing={checkpointing}"
    compiled = run_once(make_planned(tmp_path / "compiled", "compile=true", option))
    assert compiled.loss == pytest.approx(plain.loss, abs=0.01)


@pytest.mark.parametrize("ffw", ["dense", "peer"])
def test_accumulated_gradients_equal_the_whole_batch(tmp_path, ffw):
    extra = ["ffw.query_norm=layer"] if ffw == "peer" else []
    results = []
    for micro in ("null", "2", "1"):
        planned = make_planned(tmp_path, f"micro_batch={micro}", *extra, ffw=ffw)
        stepper, model, _ = stepper_of(planned)
        (update,) = read_results([stepper.step(batch_of(planned), 1.0)])
        results.append((*update, model))
    whole = results[0]
    for loss, norm, model in results[1:]:
        assert loss == pytest.approx(whole[0], rel=1e-6)
        assert norm == pytest.approx(whole[1], rel=1e-5)
        for a, b in zip(model.parameters(), whole[2].parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_micro_batch_is_part_of_the_identity_only_where_it_matters(tmp_path):
    def name(ffw, *overrides):
        return make_planned(tmp_path, *overrides, ffw=ffw).run_id

    assert name("dense", "micro_batch=2") == name("dense")
    assert name("moe", "micro_batch=2") != name("moe")
    assert name("peer", "micro_batch=2") != name("peer")
    layer = "ffw.query_norm=layer"
    assert name("peer", "micro_batch=2", layer) == name("peer", layer)
    choice, alone = "ffw.router=token_choice", "ffw.balance_loss=0"
    assert name("moe", "micro_batch=2", choice) != name("moe", choice)
    assert name("moe", "micro_batch=2", choice, alone) == name("moe", choice, alone)


def test_identity_is_what_is_computed_and_nothing_else(tmp_path):
    base = make_planned(tmp_path).run_id
    for cosmetic in (
        "tracker=wandb", "log_lines=3", "progress=lines", "device=auto", "threads=1",
        "save_model=false", "activation_checkpointing=true", "eval.every=0.5", "tracker.project=other", "data.max_epochs=3",
    ):  # fmt: skip
        assert make_planned(tmp_path, cosmetic).run_id == base, cosmetic
    for semantic in (
        "seed=1", "budget=2e9", "optim.lr=0.01", "optim.beta2=0.9", "data.seed=1", "ffw.key_dim=4",
        "batch_size=8", "backbone.norm=layer", "precision=bfloat16", "eval.tokens=4096",
        "data.num_tokens=120000", "size.num_heads=2",
    ):  # fmt: skip
        assert make_planned(tmp_path, semantic).run_id != base, semantic


def test_what_is_done_is_not_trained_again(tmp_path, capsys):
    planned = make_planned(tmp_path, "budget=7e8", ffw="dense")
    record = run_once(planned)
    written = (planned.folder / RECORD).stat().st_mtime_ns
    assert run_once(planned) == record
    assert (planned.folder / RECORD).stat().st_mtime_ns == written
    assert "done before, not trained again" in capsys.readouterr().out


def test_weights_on_disk_are_the_final_ones(tmp_path):
    planned = make_planned(tmp_path, "budget=7e8")
    record = run_once(planned)
    stepper, model, _ = stepper_of(planned)
    load_weights(model, planned.folder)
    assert stepper.evaluate(prepare(planned.run.data)).loss == record.loss


def test_a_bad_number_stops_before_the_update(tmp_path):
    """And what comes after it changes nothing either: the host finds out only later."""
    planned = make_planned(tmp_path, ffw="dense")
    stepper, model, optimizer = stepper_of(planned)
    results = [stepper.step(batch_of(planned), 1.0)]
    weight = model.blocks[0].ffw.in_FD[0, 0]
    good = weight.item()
    with torch.no_grad():
        weight.fill_(float("nan"))
    before = state_digest(model, optimizer)
    results.append(stepper.step(batch_of(planned, 1), 1.0))
    assert state_digest(model, optimizer) == before
    with torch.no_grad():
        weight.fill_(good)
    before = state_digest(model, optimizer)
    results.append(stepper.step(batch_of(planned, 2), 1.0))
    assert state_digest(model, optimizer) == before
    updates = read_results(results)
    assert [update.finite for update in updates] == [True, False, True]
    course = Course()
    with pytest.raises(DivergedError, match="loss nan"):
        course.add(updates, 3.0)
    assert (course.step, course.train_seconds, course.losses) == (1, 1.0, [updates[0].loss])


def test_a_diverged_run_is_an_outcome(tmp_path, monkeypatch):
    planned = make_planned(tmp_path, "log_lines=3", ffw="dense")
    real = Stepper.step

    def poisoned(self, tokens, factor):
        result = real(self, tokens, factor)
        poisoned.calls += 1
        return result._replace(loss=result.loss * float("nan")) if poisoned.calls == 5 else result

    poisoned.calls = 0
    monkeypatch.setattr(Stepper, "step", poisoned)
    record = run_once(planned)
    assert record.status == "diverged"
    assert record.reason.startswith("after step 4: loss nan")
    assert (record.last_step, record.loss) == (4, None)
    poisoned.calls = -(10**9)
    assert run_once(planned).status == "diverged", "not tried again with the same seed"


@pytest.mark.parametrize("every", [(1,), (4,), (3, 4), (100,), (10, 10), (7, 100)])
def test_intervals_end_where_something_is_due(every):
    ranges = [next_interval(0, 10, *every)]
    while ranges[-1].stop < 10:
        ranges.append(next_interval(ranges[-1].stop, 10, *every))
    assert [step for steps in ranges for step in steps] == list(range(10))
    ends = {steps.stop for steps in ranges}
    assert ends == {n for n in range(1, 11) if n == 10 or any(n % e == 0 for e in every)}


def test_a_failure_is_recorded_and_tried_again(tmp_path, monkeypatch, capsys):
    planned = make_planned(tmp_path, "budget=7e8", ffw="dense")

    def broken(*_):
        raise OSError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "save_weights", broken)
        failed = run_once(planned)
    assert (failed.status, failed.reason, failed.attempts) == ("failed", "OSError: disk on fire", 1)
    assert "disk on fire" in (planned.folder / "error.txt").read_text()
    again = run_once(planned)
    assert (again.status, again.attempts) == ("done", 2)
    capsys.readouterr()


def test_an_interrupted_run_has_no_record(tmp_path, monkeypatch):
    planned = make_planned(tmp_path, ffw="dense")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stepper, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_once(planned)
    assert not (planned.folder / RECORD).exists()


def test_evaluation_equals_a_plain_mean(tmp_path):
    planned = make_planned(tmp_path)
    _, model, _ = stepper_of(planned)
    windows = Windows(prepare(planned.run.data), "validation", 64)
    batches = num_batches(EvalConfig(tokens=2048), windows, 4)
    off = torch.autocast("cpu", enabled=False)
    result = evaluate(Losses(model), windows, batches, 4, torch.device("cpu"), off)
    rows = torch.from_numpy(windows.read(np.arange(32)))
    with torch.no_grad():
        logits = model.eval()(rows[:, :-1]).logits_BTV
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert (batches, result.tokens) == (8, 2048)
    assert result.loss == pytest.approx(float(plain), abs=1e-6)


def test_expert_use_follows_the_papers_definitions():
    use = ExpertUse()
    assert (use.usage, use.unevenness) == (None, None)
    use.add(Routing(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]), 4))
    use.add(Routing(torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]]), 4))
    assert use.usage == 0.5
    assert use.unevenness == pytest.approx(np.log(2))


def test_records_from_before_the_peak_was_measured_still_load(tmp_path):
    record = run_once(make_planned(tmp_path, "budget=7e8", ffw="dense"))
    old = {k: v for k, v in vars(record).items() if k not in ("utilisation", PEAK)}
    (tmp_path / RECORD).write_text(json.dumps(old))
    read = read_record(tmp_path / RECORD)
    assert read == replace(record, utilisation=None, matmul_peak_flops_per_second=None)
    assert result_line(read).endswith("GFLOP/s")


def test_too_many_epochs_are_refused_with_their_number(tmp_path):
    from peer_scaling.plan import InfeasibleError

    with pytest.raises(
        InfeasibleError, match=r"tokens are \d+\.\d+ epochs .* above data.max_epochs=4"
    ):
        make_planned(tmp_path, "data.num_tokens=2000", ffw="dense")


def test_expert_choice_must_get_whole_numbers_of_tokens(tmp_path):
    from peer_scaling.plan import InfeasibleError

    with pytest.raises(InfeasibleError, match="give each of 3 experts"):
        make_planned(tmp_path, "ffw.num_experts=3", ffw="moe")


def test_course_counts():
    course = Course()
    assert course.final_loss is None
    course.add([Update(-float(loss), 1.0) for loss in range(15)], 7.5)
    course.add([Update(-float(loss), 1.0) for loss in range(15, 20)], 2.5)
    assert (course.step, course.train_seconds, course.final_loss) == (20, 10.0, -18.5)


def test_record_refuses_an_unknown_status(tmp_path):
    record = run_once(make_planned(tmp_path, "budget=7e8", ffw="dense"))
    with pytest.raises(ValueError, match="status='great'"):
        replace(record, status="great")
