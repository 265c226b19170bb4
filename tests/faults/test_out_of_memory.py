"""F18 and F15: memory that runs out in the middle of a step, or was never there."""

import time
from itertools import product
from random import Random

import pytest
import torch

from ledger import INDEPENDENT, Ledger, expected_ledger, short_run
from peer_scaling import adamw, attempt
from peer_scaling.adamw import AdamW
from peer_scaling.errors import UserError
from peer_scaling.model import Decoder
from peer_scaling.preflight import check_memory, check_run
from peer_scaling.step import Stepper
from peer_scaling.train import run_once
from planned_runs import make_run
from scorecard import report
from tiers import count

MICRO_BATCH = 2
MICRO_BATCHES = 2
"""Of a step of 4 sequences, before memory runs out."""
STEPS = 24


def of_pytorch():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def of_the_cpu_allocator():
    torch.empty(2**50, dtype=torch.uint8)


PLACES = {
    "forward": (Decoder, "forward", MICRO_BATCHES),
    "backward": (torch.Tensor, "backward", MICRO_BATCHES),
    "before the update": (AdamW, "step", 1),
    "half an update": (adamw, "_fused", 2),
}
"""What fails, and how often it is called in a step at least. Every model has two groups of parameters
or more: when the second call of `_fused` fails, the first group is updated already."""


def fail_once(patch, place, which, step, fail):
    """Let memory run out at call number `which` of a step."""
    owner, name, _ = PLACES[place]
    real, begin, calls = getattr(owner, name), Stepper.step, []

    def first_of_step(stepper, *arguments):
        calls.append(0)
        return begin(stepper, *arguments)

    def failing(*arguments, **options):
        if torch.is_grad_enabled() or owner is not Decoder:
            calls[-1] += 1
            if len(calls) == step + 1 and calls[-1] == which + 1:
                calls[-1] = 1000  # never again
                fail()
        return real(*arguments, **options)

    patch.setattr(Stepper, "step", first_of_step)
    patch.setattr(owner, name, failing)


def choose_cases(number):
    """Variants and places in turn: 20 cases have every pair. The rest is drawn, none twice."""
    rng, drawn, cases = Random("F18"), {}, []
    variants, places = list(INDEPENDENT), list(PLACES)
    for n in range(number):
        pair = variants[n % len(variants)], places[n % len(places)]
        if pair not in drawn:
            calls = [1] if pair[1] == "half an update" else range(PLACES[pair[1]][2])
            drawn[pair] = list(product(calls, (0, 13), (of_pytorch, of_the_cpu_allocator)))
            rng.shuffle(drawn[pair])
        cases.append((*pair, *drawn[pair].pop()))
    return cases


def test_out_of_memory_costs_no_sample(tmp_path, monkeypatch, capsys):
    """F18: each case ends as the run that never ran out of memory does, with the same samples."""
    cases, ledgers, largest = choose_cases(count(12, 60)), {}, 0.0
    assert {place for _, place, *_ in cases} == set(PLACES)
    assert {variant for variant, *_ in cases} == set(INDEPENDENT)
    whole = {v: run_once(short_run(tmp_path / "whole", v, chosen=MICRO_BATCH)) for v in INDEPENDENT}
    for number, (variant, place, which, step, error) in enumerate(cases):
        planned = short_run(tmp_path / str(number), variant, chosen=MICRO_BATCH)
        ledgers.setdefault(variant, expected_ledger(planned))
        records, write = [], attempt.write_record
        with monkeypatch.context() as patch:
            patch.setattr(attempt, "write_record", lambda r, f, _, rs=records, w=write: (rs.append(r), w(r, f, _)))  # fmt: skip
            fail_once(patch, place, which, step, error)
            ledger = Ledger(patch)
            record = run_once(planned)
        case = cases[number]
        assert [(r.status, r.failure) for r in records] == [("failed", "out_of_memory"), ("done", None)], case  # fmt: skip
        assert (record.attempts, record.config["micro_batch"]) == (2, 1), case
        assert ledger.steps == ledgers[variant], case
        for name in ("loss", "train_loss"):
            difference = abs(getattr(record, name) / getattr(whole[variant], name) - 1)
            assert difference < 1e-6, (case, name)
            largest = max(largest, difference)
        shown = capsys.readouterr().out
        assert "once more, with micro_batch=1" in shown, case
        assert ("resumed from step 10" if step else "fresh") in shown.split("once more")[1], case
    report(
        "F18",
        f"{len(cases)} times out of memory: {len(cases)} classified, 0 samples dropped or doubled, "
        f"loss within {largest:.0e} of the run that never was",
    )


@pytest.mark.parametrize("control", ["swallowed", "again from live state"])
def test_the_ledger_sees_what_a_careless_trainer_does(tmp_path, monkeypatch, control):
    """Positive control of F18: one that goes on without the micro-batch, and one that repeats the
    step with the gradients that the first try left."""
    planned = short_run(tmp_path, "dense", chosen=MICRO_BATCH)
    fail_once(monkeypatch, "forward", 1, 13, of_pytorch)
    name = {"swallowed": "_backward", "again from live state": "step"}[control]
    real = getattr(Stepper, name)

    def careless(stepper, *arguments, **options):
        try:
            return real(stepper, *arguments, **options)
        except torch.OutOfMemoryError:
            if control == "swallowed":
                return torch.zeros((), dtype=torch.float64)
            return real(stepper, *arguments, **options)

    monkeypatch.setattr(Stepper, name, careless)
    ledger = Ledger(monkeypatch)
    record = run_once(planned)
    assert (record.status, record.attempts) == ("done", 1)
    expected = expected_ledger(planned)
    wrong = [step for step, pair in enumerate(zip(ledger.steps, expected, strict=True)) if pair[0] != pair[1]]  # fmt: skip
    assert wrong == [13]


def test_what_can_never_fit_is_refused_at_once(tmp_path):
    """F15: 20 configurations whose state alone is larger than any machine's memory."""
    sizes = ("size.d_model=1024", "size.d_model=4096")
    pools = ("ffw.num_experts=4194304", "ffw.num_experts=67108864")
    wide = [("dense", f"size.d_model={d}", "size.num_layers=200") for d in (16384, 24576, 32768, 65536)]  # fmt: skip
    tables = list(product(("pkm", "peer"), sizes, pools))
    many = [("moe", *m, "ffw.router=token_choice") for m in product(sizes, ("ffw.num_experts=65536", "ffw.num_experts=1048576"))]  # fmt: skip
    rows = [(*t, "ffw.table_gradient=rows") for t in tables[:4]]
    configs = [*wide, *tables, *many, *rows]
    slowest = 0.0
    for ffw, *overrides in configs:
        run = make_run(tmp_path, "budget=1e24", "size.num_heads=4", *overrides, ffw=ffw)
        began = time.process_time()
        with pytest.raises(UserError, match=r"[\d.e+]+ GB needed .*, [\d.e+]+ GB available on cpu"):
            check_memory(check_run(run))
        slowest = max(slowest, time.process_time() - began)
    assert len(configs) == 20
    assert slowest < 5
    assert not list(tmp_path.iterdir())
    report("F15", f"memory: {len(configs)} configs refused in {slowest:.2f} s at most, with need and have")  # fmt: skip
