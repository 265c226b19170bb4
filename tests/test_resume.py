"""Runs that are stopped and started again: the same bits, each line once, checkpoints that go."""

import json
import signal
import tracemalloc

import pytest
import torch

from peer_scaling.checkpoint import FOLDER, Checkpoints, Snapshot
from peer_scaling.loop import Loop
from peer_scaling.record import HISTORY, RECORD, REWOUND
from peer_scaling.step import Stepper
from peer_scaling.stop import StoppedError
from peer_scaling.train import run_once
from planned_runs import SMALL, make_planned

BUDGET = "budget=7e8"


def stop_after(monkeypatch, steps, number=signal.SIGTERM):
    """Send this process a signal while step number `steps` of this attempt is made."""
    real, calls = Stepper.step, []

    def step(self, tokens, factor):
        calls.append(1)
        if len(calls) == steps:
            signal.raise_signal(number)
        return real(self, tokens, factor)

    monkeypatch.setattr(Stepper, "step", step)


def logged(folder):
    """Everything that was logged but speeds, which are times."""
    lines = [json.loads(line) for line in (folder / HISTORY).read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@pytest.mark.parametrize("ffw", SMALL)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stopped_run_ends_with_the_bits_of_one_never_stopped(
    tmp_path, monkeypatch, capsys, ffw, number
):
    options = (BUDGET, "eval.every=0.1", "log_lines=40")
    whole = run_once(make_planned(tmp_path / "whole", *options, ffw=ffw))
    planned = make_planned(tmp_path / "cut", *options, ffw=ffw)
    capsys.readouterr()
    for steps in (7, 1, 40):
        with monkeypatch.context() as patch:
            stop_after(patch, steps, number)
            with pytest.raises(StoppedError, match=f"stopped by {number.name}, saved after step"):
                run_once(planned)
        assert not (planned.folder / RECORD).exists()
    record = run_once(planned)
    assert record.state_digest == whole.state_digest
    assert (record.loss, record.train_loss) == (whole.loss, whole.train_loss)
    assert logged(planned.folder) == logged(tmp_path / "whole" / "default" / whole.run_id)
    starts = [line for line in capsys.readouterr().out.splitlines() if ": fresh" in line or ": resumed" in line]  # fmt: skip
    assert [line.split(": ")[1].split(" (")[0] for line in starts] == [
        "fresh", "resumed from step 7", "resumed from step 8", "resumed from step 48",
    ]  # fmt: skip
    assert not (planned.folder / FOLDER).exists(), "a run with a record needs no checkpoint"


def test_lines_after_the_checkpoint_are_set_aside(tmp_path, monkeypatch):
    planned = make_planned(tmp_path, BUDGET, "checkpoint.every_tokens=5120", ffw="dense")

    def crash(*_):
        raise SystemExit(9)  # like a kill: nothing is saved on the way out

    with monkeypatch.context() as patch:
        real = Loop._interval

        def interval(self, steps):
            if self._course.step >= 33:
                crash()
            real(self, steps)

        patch.setattr(Loop, "_interval", interval)
        with pytest.raises(SystemExit):
            run_once(planned)
    assert Checkpoints(planned.folder, 2).steps() == [20]
    before = (planned.folder / HISTORY).read_text()
    run_once(planned)
    rewound = (planned.folder / REWOUND).read_text()
    assert before.endswith(rewound)
    assert all(json.loads(line)["step"] > 20 for line in rewound.splitlines())
    steps = [line["step"] for line in logged(planned.folder) if "train/loss" in line]
    assert steps == sorted(set(steps))


def test_a_second_interrupt_leaves_at_once(monkeypatch):
    from peer_scaling.stop import StopFlag

    left = []
    monkeypatch.setattr("peer_scaling.stop.os._exit", left.append)
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGINT)
        assert (stop.signal, left) == (signal.SIGINT, [])
        signal.raise_signal(signal.SIGINT)
        assert left == [130]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_earlier_handlers_are_called_after_the_save_and_set_again():
    from peer_scaling.stop import StopFlag

    calls = []

    def requeue(number, frame):
        calls.append(number)

    previous = signal.signal(signal.SIGUSR2, requeue)
    try:
        with StopFlag() as stop:
            signal.raise_signal(signal.SIGUSR2)
            assert calls == []
            with pytest.raises(StoppedError, match="SIGUSR2"):
                stop.check()
            stop.chain()
            assert calls == [signal.SIGUSR2]
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_a_checkpoint_that_verifies_but_does_not_fit_leaves_a_fresh_state(
    tmp_path, monkeypatch, capsys
):
    """Its digest is found wrong only when the model is overwritten already."""
    whole = run_once(make_planned(tmp_path / "whole", BUDGET, ffw="dense"))
    planned = make_planned(tmp_path / "cut", BUDGET, ffw="dense")
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        patch.setattr("peer_scaling.snapshot.state_digest", lambda *_: "0" * 64)
        with pytest.raises(StoppedError):
            run_once(planned)
    assert run_once(planned).state_digest == whole.state_digest
    out = capsys.readouterr().out
    assert "not 00000000; set aside, the one before is used" in out
    assert out.count(": fresh") == 3


def test_what_a_checkpoint_says_of_itself(tmp_path, monkeypatch):
    planned = make_planned(tmp_path, BUDGET, ffw="peer")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(StoppedError):
            run_once(planned)
    snapshot = Checkpoints(planned.folder, 2).newest(planned.identity)
    assert snapshot.step == 5
    assert snapshot.state["tokens_per_step"] == planned.plan.batch_tokens
    assert snapshot.state["data_fingerprint"] == planned.fingerprint
    assert {"python", "numpy"} == set(snapshot.state["rng"])
    assert "rng.cpu" in snapshot.tensors["course"]
    assert any("running_mean" in name for name in snapshot.tensors["model"])
    assert Checkpoints(planned.folder, 2).newest("another") is None, "set aside: not this run's"


def test_a_save_holds_one_file_at_a_time(tmp_path):
    """Its tensors and its bytes; not all files again when they are read back."""
    size = 4_000_000
    tensors = {file: {"w": torch.zeros(size // 4)} for file in ("model", "moments", "squares")}
    snapshot = Snapshot(1, "identity", "digest", tensors, {}, "")
    tracemalloc.start()
    try:
        Checkpoints(tmp_path, 2).save(snapshot)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * size
