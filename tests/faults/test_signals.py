"""F05: a run that is asked to stop is saved within the step and exits 75; who asks twice is obeyed."""

import os
import signal
import subprocess
import time
from random import Random

import pytest

from attempts import OPTIONS, SAVE_STEPS, Attempts, logged, whole
from commands import BIN
from peer_scaling.checkpoint import FOLDER, Checkpoints, verify
from peer_scaling.errors import EXIT_INTERRUPTED, EXIT_REQUEUE
from peer_scaling.record import RECORD
from planned_runs import BASE, SMALL, make_planned
from scorecard import report
from tiers import count

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")


def new(folder, ffw="dense"):
    return Attempts(make_planned(folder, *OPTIONS, ffw=ffw), whole(ffw))


def saved_steps(planned):
    """Of the checkpoints that verify, newest first."""
    store = Checkpoints(planned.folder, 2)
    return [step for step in store.steps() if verify(store.folder / f"step-{step:08d}")]


def check_stopped(attempts, ended, name):
    """Exit code, message, and a checkpoint of the last step that was logged."""
    (step, *_) = saved_steps(attempts.planned)
    assert ended.code == EXIT_REQUEUE, ended.output
    assert f"stopped by {name}, saved after step {step}; the same command" in ended.output
    assert step == max(line["step"] for line in logged(attempts.planned.folder))
    assert not (attempts.planned.folder / RECORD).exists()
    return step


@pytest.mark.parametrize("name", NAMES)
def test_stopped_at_random_steps(tmp_path, name):
    """While an update is made; then the run goes on where it was."""
    rng, wanted, stops, runs, lost = Random(f"F05 {name}"), count(2, 25), 0, 0, []
    variants = list(SMALL)
    while stops < wanted:
        attempts, at = new(tmp_path / str(runs), variants[(runs + NAMES.index(name)) % 4]), 0
        while stops < wanted and at < 60:
            steps = rng.randint(1, 30)
            ended = attempts.attempt(inject=[["signal_at_step", steps, name]])
            step = check_stopped(attempts, ended, name)
            assert step == at + steps, "not saved within the step"
            at, stops = step, stops + 1
        assert attempts.finish() == []
        runs, lost = runs + 1, lost + attempts.lost_steps
    report("F05", f"{name}: {stops} stops: all durable, exit 75, {max(lost)} steps lost")


@pytest.mark.parametrize("name", NAMES)
def test_stopped_from_outside_at_random_times(tmp_path, name):
    """Whatever the run is doing then; before it begins and after its record, nothing is to save."""
    rng, number, wanted, stops, runs = (
        Random(f"F05 outside {name}"),
        signal.Signals[name],
        count(1, 10),
        0,
        0,
    )
    attempts = new(tmp_path / "0", "peer")
    while stops < wanted:
        ended = attempts.attempt(signals=[[rng.uniform(0.2, 2.0), number]])
        if ended.code == 0:  # it was faster
            runs += 1
            attempts = new(tmp_path / str(runs), "peer")
        elif ended.start is None or (attempts.planned.folder / RECORD).exists():
            assert ended.code in (-number, EXIT_REQUEUE), ended.output
        else:
            check_stopped(attempts, ended, name)
            stops += 1
    assert attempts.finish() == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "inject", [["signal_in_save", 9], ["signal_in_evaluation", 3], ["signal_in_evaluation", 35]]
)
def test_stopped_while_it_saves_or_evaluates(tmp_path, name, inject):
    """The second save; the first evaluation; the last one, after all steps."""
    if count(0, 1) or NAMES.index(name) == inject[1] % 4:
        attempts = new(tmp_path, "moe")
        check_stopped(attempts, attempts.attempt(inject=[[*inject, name]]), name)
        assert attempts.finish() == []


def test_a_second_interrupt_leaves_at_once(tmp_path):
    attempts = new(tmp_path)
    ended = attempts.attempt(inject=[["interrupt_twice_at_step", 15]])
    assert ended.code == EXIT_INTERRUPTED
    assert saved_steps(attempts.planned) == [SAVE_STEPS], "nothing since the last save"
    assert attempts.finish() == []


@pytest.mark.parametrize("name", NAMES[count(2, 0) :])
def test_who_handled_the_signal_before_is_called_after_the_save(tmp_path, name):
    """As submitit, which asks Slurm to start the job again and ends the process there."""
    attempts = new(tmp_path)
    noted = tmp_path / "handled"
    inject = [["earlier_handler", name, str(noted)], ["signal_at_step", 5, name]]
    check_stopped(attempts, attempts.attempt(inject=inject), name)
    assert noted.read_text() == f"{name} 1\n"


def test_control_without_the_flag_nothing_is_saved(tmp_path):
    attempts = new(tmp_path)
    ended = attempts.attempt(inject=[["no_stop_flag"], ["signal_at_step", 15, "SIGTERM"]])
    assert ended.code == -signal.SIGTERM
    assert saved_steps(attempts.planned) == [SAVE_STEPS]


@pytest.mark.parametrize("name", NAMES[: count(1, 4)])
def test_the_command_exits_75_and_goes_on(tmp_path, name):
    """The console script, in a process that nothing was preloaded into."""
    attempts = new(tmp_path)
    arguments = ["ffw=dense", *BASE, *OPTIONS, f"runs_dir={tmp_path}", "log_lines=1000"]
    with subprocess.Popen(
        [str(BIN / "peer-train"), *arguments], cwd=tmp_path, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as command:  # fmt: skip
        while command.poll() is None and len(logged(attempts.planned.folder)) < 3:
            time.sleep(0.002)
        command.send_signal(signal.Signals[name])
        output, _ = command.communicate(timeout=120)
    assert command.returncode == EXIT_REQUEUE, output
    (step, *_) = saved_steps(attempts.planned)
    assert f"stopped by {name}, saved after step {step}; the same command" in output
    assert "Traceback" not in output
    assert attempts.finish() == []
    assert not (attempts.planned.folder / FOLDER).exists()
