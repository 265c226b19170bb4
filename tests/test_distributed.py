"""Two processes on one run: what one would do, to rounding; the same bits each time; one writer.

All two-process cases of a test session run in one pair of processes (ranks.py), once.
"""

import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ranks
from conftest import ROOT
from peer_scaling.causality import NOT_RUN, WHOLE
from peer_scaling.distributed import World, check_ranks, num_ranks
from peer_scaling.errors import UserError
from peer_scaling.kernels.segments import RowGradient
from peer_scaling.parallel import merge_rows, sent_bytes
from peer_scaling.publish import WEIGHTS
from peer_scaling.record import HISTORY, RECORD, read_record
from peer_scaling.train import run_once
from planned_runs import make_planned, make_run

STEPS = 24
COMMON = ["batch_size=8", "eval.every=0.5", "eval.tokens=1024"]
RUNS = {
    "dense": ("dense", []),
    "moe": ("moe", ["micro_batch=4"]),
    "token": ("moe", ["ffw.router=token_choice", "ffw.balance_loss=0.1"]),
    "pkm": ("pkm", []),
    "peer": ("peer", ["micro_batch=4"]),
}
FSDP = ("moe", "peer")


def options_of(base):
    """Of a run of so many steps exactly."""
    ffw, own = RUNS[base]
    run = make_run("runs", *COMMON, *own, ffw=ffw)
    return [*COMMON, *own, f"budget={STEPS * run.batch_tokens * run.cost().flops_per_token}"]


def case(name, base, *options, **more):
    return {"name": name, "ffw": RUNS[base][0], "options": [*options_of(base), *options], **more}


def cases():
    for base in RUNS:
        yield case(base, base, measure=True)
    for base in FSDP:
        yield case(f"{base}-fsdp", base, "parallel=fsdp")
    yield case("again", "peer")
    for kind in ("ddp", "fsdp"):
        option, runs = f"parallel={kind}", f"cut-{kind}"
        yield case(f"{kind}-1", "peer", option, runs=runs, signal=[1, 7])
        yield case(f"{kind}-2", "peer", option, runs=runs)
    yield case("to-one", "peer", signal=[0, 9])
    yield case("from-one", "peer", runs="from-one")
    yield case("fsdp-then", "moe", "parallel=fsdp", runs="mixed", signal=[1, 5])
    yield case("ddp-after", "moe", runs="mixed")
    yield case("no-spread", "moe", without="spread")
    yield case("no-exchange", "peer", without="exchange")
    yield case("bad", "dense", fail=[1, 5])  # ends the processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes have run all cases."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 11)
        with pytest.raises(KeyboardInterrupt):
            run_once(planned_of(folder / "from-one", "peer"))
    codes, outputs = ranks.start(folder, list(cases()))
    assert codes == [1, 1], outputs
    (folder / "silent.txt").write_text(outputs[1])
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs by one process: name -> record, loss of every step, hash of the tokens."""
    folder, results = tmp_path_factory.mktemp("alone"), {}
    for name in RUNS:
        with pytest.MonkeyPatch.context() as patch:
            read, losses = watch(patch)
            record = run_once(planned_of(folder, name))
        stream = hashlib.sha256(np.stack(read).tobytes()).hexdigest()
        results[name] = record, [float(x) for x in losses], stream, folder
    return results


def planned_of(folder, name):
    return make_planned(folder, *options_of(name), ffw=RUNS[name][0])


def stop_after(patch, steps):
    real, calls = ranks.Stepper.step, []

    def step(self, tokens, factor):
        calls.append(1)
        if len(calls) == steps:
            signal.raise_signal(signal.SIGTERM)
        return real(self, tokens, factor)

    patch.setattr(ranks.Stepper, "step", step)


def watch(patch):
    real_step = ranks.Stepper.step
    read, losses = [], []

    def step(self, tokens, factor):
        read.append(tokens)
        result = real_step(self, tokens, factor)
        losses.append(result.loss)
        return result

    patch.setattr(ranks.Stepper, "step", step)
    return read, losses


def difference(losses, reference):
    assert len(losses) == len(reference) == STEPS
    return float(np.max(np.abs(np.array(losses) / np.array(reference) - 1)))


def final_weights(folder):
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_read_the_stream_of_one(pair, alone, name):
    per_forward = 4 if "micro_batch=4" in RUNS[name][1] else 8
    reads = [ranks.tokens(pair, name, rank) for rank in (0, 1)]
    parts = [read[:STEPS] for read in reads]
    for read in reads:  # the cutoffs of expert choice are from the last steps' tokens
        assert np.array_equal(read[STEPS:], read[2 * STEPS - len(read) : STEPS])
    shares = [p.reshape(len(p), -1, per_forward // 2, p.shape[-1]) for p in parts]
    together = np.concatenate(shares, axis=2).reshape(len(parts[0]), 8, -1)
    assert hashlib.sha256(np.ascontiguousarray(together).tobytes()).hexdigest() == alone[name][2]
    assert not np.array_equal(*parts)


@pytest.mark.parametrize("name", [*RUNS, *(f"{base}-fsdp" for base in FSDP)])
def test_the_causality_gate_is_asked_by_all_ranks_or_none(pair, name):
    both = [ranks.seen(pair, name, rank) for rank in (0, 1)]
    expected = "leaks, as declared" if name == "moe" else "passed"
    expected = f"{NOT_RUN}: {WHOLE}" if name.endswith("fsdp") else expected
    assert [seen["environment"]["causality_gate"] for seen in both] == [expected] * 2
    assert {seen["status"] for seen in both} == {"done"}


@pytest.mark.parametrize("name", [*RUNS, *(f"{base}-fsdp" for base in FSDP)])
def test_two_processes_train_what_one_does_to_rounding(pair, alone, name):
    record, losses, _, folder = alone[name.removesuffix("-fsdp")]
    both = [ranks.seen(pair, name, rank) for rank in (0, 1)]
    assert both[0]["losses"] == both[1]["losses"]
    assert difference(both[0]["losses"], losses) < 1e-5
    assert both[0]["digest"] == both[1]["digest"]
    assert both[0]["loss"] == pytest.approx(record.loss, rel=1e-6)
    assert both[0]["usage"] == record.expert_usage
    own = final_weights(folder / "default" / record.run_id)
    weights = final_weights(type(folder)(both[0]["folder"]))
    assert weights.keys() == own.keys()
    for key, tensor in own.items():  # BatchNorm's running statistics are among them
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-4)
    assert both[0]["environment"]["world_size"] == 2
    assert (both[0]["environment"]["backend"], record.environment["backend"]) == ("gloo", None)


def test_the_identity_does_not_know_how_many_processes_there_are(pair, alone):
    for name in RUNS:
        assert ranks.seen(pair, name)["folder"].endswith(alone[name][0].run_id)


def test_without_their_part_the_comparisons_fail(pair, alone):
    """Positive controls: expert choice among own tokens only, tables that are not exchanged."""
    assert difference(ranks.seen(pair, "no-spread")["losses"], alone["moe"][1]) > 1e-4
    for rank in (0, 1):
        seen = ranks.seen(pair, "no-exchange", rank)
        assert seen["status"] == "failed"
        assert "drifted apart" in seen["reason"]


def test_two_processes_repeat_themselves(pair):
    assert ranks.seen(pair, "again")["digest"] == ranks.seen(pair, "peer")["digest"]


@pytest.mark.parametrize(("kind", "whole"), [("ddp", "peer"), ("fsdp", "peer-fsdp")])
def test_a_signal_to_one_rank_stops_both_and_they_continue_to_the_bit(pair, kind, whole):
    stopped = [ranks.seen(pair, f"{kind}-1", rank) for rank in (0, 1)]
    assert [s["reason"] for s in stopped] == ["stopped by SIGTERM, saved after step 7"] * 2
    continued = ranks.seen(pair, f"{kind}-2")
    assert continued["digest"] == ranks.seen(pair, whole)["digest"]
    assert stopped[0]["losses"] + continued["losses"] == ranks.seen(pair, whole)["losses"]


def test_checkpoints_are_the_same_for_any_number_of_processes(pair, alone):
    whole = alone["peer"]
    first = ranks.seen(pair, "to-one")
    assert first["status"] == "stopped"
    with pytest.MonkeyPatch.context() as patch:
        _, losses = watch(patch)
        record = run_once(planned_of(pair / "to-one", "peer"))
    assert len(first["losses"]) == 9
    assert difference(first["losses"] + [float(x) for x in losses], whole[1]) < 1e-5
    assert record.loss == pytest.approx(whole[0].loss, rel=1e-6)
    later = ranks.seen(pair, "from-one")["losses"]
    assert difference(whole[1][:11] + later, whole[1]) < 1e-5
    mixed = ranks.seen(pair, "fsdp-then")["losses"] + ranks.seen(pair, "ddp-after")["losses"]
    assert difference(mixed, alone["moe"][1]) < 1e-5


def test_only_the_first_rank_writes_and_prints(pair):
    folder = pair / "peer"
    (run,) = (folder / "default").iterdir()
    assert {p.name for p in run.iterdir()} == {HISTORY, RECORD, WEIGHTS, "claim-000001.json"}
    lines = (run / HISTORY).read_text().splitlines()
    assert len(lines) == len(set(lines))
    assert (read_record(run / RECORD).status, read_record(run / RECORD).attempts) == ("done", 1)
    # A traceback, of the rank that is made to fail, names files: what they are called is no output.
    silent = (pair / "silent.txt").read_text().replace(str(ROOT), "")
    assert "fresh" not in silent
    assert "nats" not in silent


@pytest.mark.skipif(not ranks.IO.exists(), reason="needs Linux's count of bytes written")
@pytest.mark.parametrize(("name", "tables"), [("pkm", 1), ("peer", 2), ("dense", 0)])
def test_a_step_sends_the_bytes_that_the_docstring_says(pair, name, tables):
    seen = [ranks.seen(pair, name, rank) for rank in (0, 1)]
    steps = len(seen[0]["losses"])
    assert [len(s["sent"]) for s in seen] == [steps * tables] * 2
    for rows, width, sent in seen[0]["sent"] + seen[1]["sent"]:
        said = 8 + sent_bytes(rows, torch.empty(1, width))
        assert said <= sent <= said + 2000, "gloo's own words are some hundred bytes"


def test_an_error_on_one_rank_ends_both_and_is_in_the_record(pair):
    """That it ended them is what `pair` has seen."""
    record = read_record(next((pair / "bad").rglob("failed-001.json")))
    assert (record.status, record.failure) == ("failed", "out_of_memory")
    assert "rank 1: MemoryError: no room on this rank" in record.reason


def torchrun(folder, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    own = ["ffw=peer", "size=d8_l2", "data=synthetic", "data.num_tokens=100000", "tracker=off"]
    own += ["ffw.num_experts=64", "ffw.num_heads=2", "ffw.experts_per_head=4", "ffw.key_dim=8"]
    own += ["device=cpu", *options_of("peer"), f"runs_dir={folder}", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    full = [*command, "-m", "peer_scaling.train", *own]
    return subprocess.run(full, env=env, cwd=folder, capture_output=True, text=True, timeout=120)


def test_torchrun_starts_the_command(tmp_path):
    result = torchrun(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("fresh") == 1
    assert result.stdout.count("nats, perplexity") == 1
    record = read_record(next(tmp_path.rglob(RECORD)))
    assert (record.status, record.environment["world_size"]) == ("done", 2)


def test_what_cannot_be_shared_is_refused_in_one_line(tmp_path):
    result = torchrun(tmp_path, "micro_batch=1")
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "1 sequences per forward pass" in line
    assert "multiple of 2" in line
    assert not list(tmp_path.iterdir())


def test_world_size_without_a_rank_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="start with torchrun, or unset WORLD_SIZE"):
        num_ranks()
    with pytest.raises(UserError):
        check_ranks(4, torch.device("cpu"))


@pytest.mark.parametrize(("sequences", "per_forward", "size"), [(8, 8, 2), (12, 6, 3), (4, 2, 1)])
def test_shares_are_contiguous_and_complete(sequences, per_forward, size):
    shares = [World(rank, size).own_sequences(sequences, per_forward) for rank in range(size)]
    own = per_forward // size
    for start in range(0, sequences // size, own):
        together = np.concatenate([share[start : start + own] for share in shares])
        assert together.tolist() == list(range(together[0], together[0] + per_forward))
    assert sorted(np.concatenate(shares).tolist()) == list(range(sequences))


def test_merged_rows_are_the_sum_of_the_dense_gradients():
    generator = torch.Generator().manual_seed(0)
    picked = ([0, 3, 4], [3, 7], [])
    parts = [
        RowGradient(torch.tensor(p, dtype=torch.int64), torch.randn(len(p), 5, generator=generator))
        for p in picked
    ]
    merged = merge_rows(parts)
    assert merged.row_R.tolist() == [0, 3, 4, 7]
    torch.testing.assert_close(merged.dense(9), sum(part.dense(9) for part in parts))
