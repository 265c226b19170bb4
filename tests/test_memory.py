"""`micro_batch=auto`: what is tried, what is chosen, that the choice is kept, and what is refused."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commands import peer_train
from ledger import INDEPENDENT, short_run
from peer_scaling import loop, machine, memory
from peer_scaling.adamw import AdamW
from peer_scaling.errors import EXIT_OUT_OF_MEMORY, UserError
from peer_scaling.memory import candidates, search, settled, smaller
from peer_scaling.model import Decoder
from peer_scaling.preflight import check_memory
from peer_scaling.prepare import prepare
from peer_scaling.rng import capture_rng
from peer_scaling.train import exit_code, run_once
from planned_runs import SMALL, batch_of, make_run, stepper_of

NUMBERS = (1, 2, 3, 4, 6, 12)
WIDE = ("micro_batch=auto", "batch_size=16", "data.context=256", "eval.tokens=8192", "size=d32_l2", "budget=4e11", "data.max_epochs=100")  # fmt: skip
"""Activations of 30 MB."""


@given(
    fixed=st.integers(0, 10**9), each=st.integers(1, 10**9), bend=st.floats(0, 0.2),
    have=st.integers(1, 10**10),
)  # fmt: skip
def test_the_search_finds_the_largest_that_fits_and_tries_few_that_do_not(fixed, each, bend, have):
    """Needs grow by a line, or a little faster than one: the first number is tried in any case."""

    def need(number):
        return fixed + each * number ** (1 + bend)

    needs = search(NUMBERS, need, fixed, have)
    tried = list(needs)
    assert tried == list(NUMBERS[: len(tried)])
    fitting = [n for n in NUMBERS if need(n) <= have]
    assert [n for n in tried if needs[n] <= have] == fitting
    if bend == 0:
        assert [n for n in tried if needs[n] > have] == tried[len(fitting) :][: not fitting]


def test_the_search_ends_where_memory_runs_out():
    needs = search(NUMBERS, lambda n: 1.0 if n < 4 else float("inf"), 1.0, 10.0)
    assert list(needs) == [1, 2, 3, 4]
    assert [n for n, need in needs.items() if need <= 10.0] == [1, 2, 3]


@pytest.mark.parametrize("ffw", ["dense", "peer"])
def test_a_probe_chooses_what_fits_and_leaves_no_trace(tmp_path, monkeypatch, capsys, ffw):
    run = make_run(tmp_path, *WIDE, ffw=ffw)
    settled(run, prepare(run.data))  # what a process needs once would shift the numbers
    measured, real = [], memory.search

    def spy(*arguments):
        measured.append(real(*arguments))
        return measured[-1]

    monkeypatch.setattr(memory, "search", spy)
    before = capture_rng()
    assert settled(run, prepare(run.data)).run.chosen_micro_batch == 16
    (needs,) = measured
    assert list(needs) == candidates(run)
    # Memory that tests before this one have freed is used again, and not seen.
    assert 3e6 < needs[4] < needs[8] - 2e6 < needs[16] - 5e6
    available = (needs[4] + needs[8]) / 2 / memory.SHARE
    monkeypatch.setattr(machine, "available_bytes", lambda device: available)
    assert settled(run, prepare(run.data)).run.chosen_micro_batch == 4
    after = capture_rng()
    assert before[0] == after[0]
    assert torch.equal(before[1]["cpu"], after[1]["cpu"])
    shown = capsys.readouterr().out.splitlines()
    assert "micro_batch=auto is 16 of 16 sequences" in shown[1]
    assert "micro_batch=auto is 4 of 16 sequences" in shown[2]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["forward", "update"])
def test_a_probe_ends_where_an_allocation_fails(tmp_path, monkeypatch, place):
    run = make_run(tmp_path, "micro_batch=auto", ffw="dense")
    forward, step, sizes = Decoder.forward, AdamW.step, []

    def failing(when):
        if place == when and sizes[-1] == 4:
            torch.empty(2**50)

    def failing_forward(model, tokens):
        sizes.append(len(tokens))
        failing("forward")
        return forward(model, tokens)

    def failing_step(optimizer, closure=None):
        failing("update")
        return step(optimizer, closure)

    monkeypatch.setattr(Decoder, "forward", failing_forward)
    monkeypatch.setattr(AdamW, "step", failing_step)
    assert settled(run, prepare(run.data)).run.chosen_micro_batch == 2
    assert sizes[-1] == 4


def test_the_probe_asks_most_of_the_router(tmp_path, monkeypatch):
    """One batch that picks most rows, and one whose tokens all go to one expert."""
    layer = ("ffw.router=token_choice", "ffw.num_experts=8")
    run = make_run(tmp_path, "micro_batch=auto", *layer, ffw="moe")
    used, real = [], Decoder.forward

    def spy(model, tokens):
        output = real(model, tokens)
        if len(tokens) == run.settings.batch_size:
            used.append(len(output.stats.expert.unique()))
        return output

    monkeypatch.setattr(Decoder, "forward", spy)
    settled(run, prepare(run.data))
    assert used[0] == 8
    assert used[-1] == 1


@pytest.mark.parametrize("ffw", SMALL)
def test_a_run_of_its_own_choice_is_the_run_with_that_number(tmp_path, ffw):
    run = short_run(tmp_path / "auto", ffw, "micro_batch=auto").run
    chosen = run_once(settled(run, prepare(run.data)))
    given = run_once(short_run(tmp_path / "given", ffw, "micro_batch=4"))
    assert chosen.run_id == given.run_id
    assert chosen.state_digest == given.state_digest
    assert (chosen.config["micro_batch"], chosen.config["micro_batch_chosen"]) == (4, True)
    assert (given.config["micro_batch"], given.config["micro_batch_chosen"]) == (4, False)


@pytest.mark.parametrize("ffw", ["dense", "peer"])
def test_the_choice_is_kept(tmp_path, monkeypatch, ffw):
    """By the checkpoints of a run that was stopped, and by the record of one that ended; for PEER
    with BatchNorm, whose folder depends on it, too."""
    options = ("ffw.query_norm=batch",) if ffw == "peer" else ()
    run = short_run(tmp_path, ffw, "micro_batch=auto", "save_model=true", *options).run
    corpus = prepare(run.data)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_probe", lambda run: 2)
        planned = settled(run, corpus)
        patch.setattr(loop, "save_weights", stop)
        with pytest.raises(KeyboardInterrupt):
            run_once(planned)
    monkeypatch.setattr(memory, "_probe", stop)
    again = settled(run, corpus)
    assert (again.folder, again.run.chosen_micro_batch) == (planned.folder, 2)
    assert run_once(again).config["micro_batch"] == 2
    assert settled(run, corpus).folder == planned.folder


def stop(*_):
    raise KeyboardInterrupt


def test_a_second_try_is_kept_too(tmp_path, monkeypatch):
    planned, steps, step = short_run(tmp_path, "dense", chosen=4), [], AdamW.step

    def failing(optimizer, closure=None):
        steps.append(1)
        if len(steps) == 8:
            raise torch.OutOfMemoryError("no more")
        if len(steps) == 14:
            raise KeyboardInterrupt
        return step(optimizer, closure)

    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            run_once(planned)
    monkeypatch.setattr(memory, "_probe", stop)
    unsettled = replace(planned.run, chosen_micro_batch=None)
    again = settled(unsettled, prepare(unsettled.data))
    assert again.run.chosen_micro_batch == 2
    assert run_once(again).config["micro_batch"] == 2


def of_pytorch(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_nothing_fits_is_one_line_before_anything_is_written(tmp_path, monkeypatch):
    run = make_run(tmp_path, *WIDE, ffw="dense")
    monkeypatch.setattr(machine, "available_bytes", lambda device: 2e5)
    with pytest.raises(UserError, match=r"1 sequence\(s\) makes an update need .* GB; 0.00018 GB may be used on cpu"):  # fmt: skip
        settled(run, prepare(run.data))
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "to", of_pytorch)
        with pytest.raises(UserError, match=r"an update need more than 0.00018 GB"):
            settled(run, prepare(run.data))
    monkeypatch.setattr(machine, "available_bytes", lambda device: None)
    with pytest.raises(UserError, match="is not known here; give a number"):
        settled(run, prepare(run.data))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (torch.OutOfMemoryError("x"), True), (MemoryError(), True), (OSError(12, "x"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("can't allocate memory"), False), (OSError(28, "x"), False),
    ],
)  # fmt: skip
def test_out_of_memory_is_known_by_type(error, known):
    assert machine.is_out_of_memory(error) == known


def test_next_smaller_divisors(tmp_path):
    run = make_run(tmp_path, "micro_batch=auto", "batch_size=12", ffw="dense")
    numbers = []
    run = replace(run, chosen_micro_batch=12)
    while run:
        numbers.append(run.forward_sequences)
        run = smaller(run)
    assert numbers == [12, 6, 4, 3, 2, 1]
    for ffw, option in (("dense", "micro_batch=4"), ("peer", "micro_batch=auto")):
        assert smaller(make_run(tmp_path, option, ffw=ffw)) is None
    assert smaller(replace(make_run(tmp_path, "micro_batch=auto"), chosen_micro_batch=4)) is None


@pytest.mark.parametrize(
    ("variant", "chosen"), [("dense", None), ("dense", 1), ("peer ffw.query_norm=batch", 2)]
)
def test_no_second_try_where_it_would_be_the_same_or_another_run(
    tmp_path, monkeypatch, variant, chosen
):
    variant, *options = variant.split()
    planned = short_run(tmp_path, variant, *options, chosen=chosen)

    def failing(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(AdamW, "step", failing)
    record = run_once(planned)
    assert (record.status, record.failure, record.attempts) == ("failed", "out_of_memory", 1)
    assert exit_code(record) == EXIT_OUT_OF_MEMORY


def test_the_first_try_is_gone_before_the_second_begins(tmp_path, monkeypatch):
    planned = short_run(tmp_path, "peer", chosen=4)
    models, alive, build, step = [], [], loop._fresh_state, AdamW.step

    def fresh(*arguments):
        alive.append([model for model in models if model() is not None])
        state = build(*arguments)
        models.append(weakref.ref(state.model))
        return state

    def failing(optimizer, closure=None):
        if len(models) == 1:
            raise torch.OutOfMemoryError("no more")
        return step(optimizer, closure)

    monkeypatch.setattr(loop, "_fresh_state", fresh)
    monkeypatch.setattr(AdamW, "step", failing)
    gc.disable()  # it must not depend on when the collector happens to run
    try:
        assert run_once(planned).status == "done"
    finally:
        gc.enable()
    assert alive == [[], []]


def test_control_groups_limit_what_is_available(tmp_path):
    """Version 2 with a limit above the process's own group, version 1 without a folder of its own."""
    group = tmp_path / "cgroup"
    files = {
        "a/memory.max": "1000", "a/memory.current": "700", "a/memory.stat": "anon 1\ninactive_file 200\n",
        "a/b/memory.max": "max", "memory/memory.limit_in_bytes": "900",
        "memory/memory.usage_in_bytes": "950", "memory/memory.stat": "total_inactive_file 10\n",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    group.write_text("0::/a/b\n")
    assert list(machine.cgroup_bytes(group, tmp_path / "root")) == [500]
    group.write_text("5:cpu:/x\n4:memory:/of/the/host\n")
    assert list(machine.cgroup_bytes(group, tmp_path / "root")) == [0]
    assert list(machine.cgroup_bytes(tmp_path / "none", tmp_path / "root")) == []


@pytest.mark.parametrize("variant", [*INDEPENDENT, "moe"])
def test_the_preflight_never_asks_for_more_than_an_update_has(tmp_path, monkeypatch, variant):
    """Parameters, moments and gradients of a real update, in bytes; one less than the estimate is
    refused, with both numbers."""
    planned = short_run(tmp_path, variant)
    stepper, model, optimizer = stepper_of(planned)
    held = []
    real = AdamW.step

    def weighed(self, closure=None):
        real(self, closure)
        gradients = [p.grad for p in model.parameters()]
        held.extend(g._values() if g.is_sparse else g for g in gradients)

    monkeypatch.setattr(AdamW, "step", weighed)
    stepper.step(batch_of(planned), 1.0)
    held += model.parameters()
    held += [t for state in optimizer.state.values() for t in state.values()]
    exact = sum(t.numel() * t.element_size() for t in held)
    asked = 16 * planned.cost.num_params_total - 4 * planned.cost.num_params_lookup
    assert 0.6 * exact < asked <= exact
    monkeypatch.setattr(machine, "available_bytes", lambda device: asked)
    check_memory(planned)
    monkeypatch.setattr(machine, "available_bytes", lambda device: asked - 1)
    with pytest.raises(UserError, match=r"GB needed for parameters, moments and gradients, .* GB available on cpu"):  # fmt: skip
        check_memory(planned)


def test_studies_refuse_it_where_machines_would_differ(tmp_path):
    result = peer_train("--config-name", "smoke", "micro_batch=auto", folder=tmp_path)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert [line.split(" depends")[0] for line in lines] == [
        f"error: micro_batch=auto: how variant={v} is trained" for v in ("moe", "pkm", "peer")
    ]
    assert all("use a number, or ffw.query_norm=layer" in line for line in lines)
    assert not list(tmp_path.iterdir())
    smoke = ("--config-name", "smoke", "ffw=dense", "size=d8_l2", "micro_batch=auto")
    allowed = peer_train(*smoke, folder=tmp_path)
    assert allowed.returncode == 0, allowed.stderr
    assert "micro_batch=auto is 4 of 4 sequences" in allowed.stdout


@pytest.mark.parametrize("value", ["some", "2.5", "3", "-1", "0"])
def test_other_values_are_refused_by_name(tmp_path, value):
    with pytest.raises(UserError) as caught:
        make_run(tmp_path, f"micro_batch={value}", ffw="dense")
    assert all(line.startswith(f"micro_batch={value}") for line in caught.value.problems)


def test_from_the_command_line(tmp_path):
    fast = ["data=synthetic", "tracker=off", "ffw=dense", "size=d8_l2", "budget=7e8"]
    run = peer_train(*fast, "micro_batch=auto", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "micro_batch=auto is 4 of 4 sequences" in run.stdout
    absurd = ["ffw=peer", "size=d1024_l16", "ffw.num_experts=67108864", "budget=1e24"]
    refused = peer_train(*fast[:2], *absurd, folder=tmp_path)
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "GB needed for parameters, moments and gradients" in line
