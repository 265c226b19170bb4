"""What is done to a run: faults, and protections switched off for positive controls.

Each takes a `pytest.MonkeyPatch` first, so that it works in a test and in a process of its own.
"""

import os
import resource
import signal
from pathlib import Path

from peer_scaling import attempt, checkpoint, durable, history, publish, saver, snapshot
from peer_scaling.checkpoint import CheckpointError, Checkpoints
from peer_scaling.claims import Claim
from peer_scaling.evaluate import ExpertUse
from peer_scaling.saver import Saver
from peer_scaling.step import Stepper


def at_call(patch, owner, name, number, act):
    """Call `act` before call `number` (from 1) of a function or method."""
    real, calls = getattr(owner, name), []

    def wrapper(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(*arguments, **options)

    patch.setattr(owner, name, wrapper)


def kill_at_step(patch, step):
    """SIGKILL before update number `step` of this attempt."""
    at_call(patch, Stepper, "step", step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def pause(patch, where, number, path):
    """SIGSTOP before call `number` of something; `path` gets this process's number, and a dot for
    each step that begins after it was woken.
    """
    noted = Path(path)

    def act():
        noted.write_text(f"{os.getpid()}\n")
        os.kill(os.getpid(), signal.SIGSTOP)

    places = {
        "step": (Stepper, "step"),
        "check": (Claim, "check"),
        "write": (attempt, "write_record"),
    }
    if where in places:
        at_call(patch, *places[where], number, act)
    else:
        at_label(patch, where, number, act)
    real = Stepper.step

    def step(self, *arguments):
        if noted.exists():
            with noted.open("a") as file:
                file.write(".")
        return real(self, *arguments)

    patch.setattr(Stepper, "step", step)


def at_label(patch, label, number, act):
    """Call `act` at visit `number` of a fault point of durable.py."""
    real, visits = durable.fault_point, []

    def fault_point(name):
        visits.extend([name] * (name == label))
        if name == label and len(visits) == number:
            act()
        real(name)

    patch.setattr(durable, "fault_point", fault_point)


def no_fence(patch):
    """Control: who lost a run does not find out, and a record may be replaced."""
    patch.setattr(Claim, "lost", lambda self: False)
    patch.setattr(Claim, "check", lambda self: None)
    patch.setattr(publish, "write_once", write_over)


def write_over(path, text, label, last_look):
    """Control: instead of `durable.write_once`."""
    durable.write_atomically(path, text, label)


def signal_at_step(patch, step, name):
    number = signal.Signals[name]
    at_call(patch, Stepper, "step", step, lambda: signal.raise_signal(number))


def interrupt_twice_at_step(patch, step):
    def act():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_call(patch, Stepper, "step", step, act)


def signal_in_save(patch, file, name):
    """While file number `file` of this attempt's checkpoints is written."""
    number = signal.Signals[name]
    at_call(patch, checkpoint, "write_synced", file, lambda: signal.raise_signal(number))


def signal_in_evaluation(patch, batch, name):
    number = signal.Signals[name]
    at_call(patch, ExpertUse, "add", batch, lambda: signal.raise_signal(number))


def earlier_handler(patch, name, path):
    """As submitit's: something else handles the signal too, and notes how much is saved by then."""
    noted = Path(path)

    def handler(number, frame):
        saved = list(noted.parent.rglob("step-" + "[0-9]" * 8))
        noted.write_text(f"{signal.Signals(number).name} {len(saved)}\n")

    signal.signal(signal.Signals[name], handler)


def no_stop_flag(patch):
    """Control: signals do what they do to any process."""
    patch.setattr("peer_scaling.stop.STOP_SIGNALS", ())


def limit_file_size(patch, size):
    """For this process and for good, as `ulimit -f` does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def saves_in_place(patch):
    """Control: no temporary folder, no rename."""

    def save(self, snapshot):
        folder = self._folder_of(snapshot.step)
        folder.mkdir(parents=True)
        checkpoint._write_files(snapshot, folder)
        self._retire()

    patch.setattr(Checkpoints, "save", save)


def no_moments(patch):
    """Control: the optimiser starts anew, and nobody compares digests."""
    real = saver.put_back

    def put_back(snapshot, state):
        try:
            return real(snapshot, state)
        except CheckpointError:
            return snapshot.tensors["course"]["losses"].tolist()

    patch.setattr(snapshot, "_put_back_moments", lambda *_: None)
    patch.setattr(saver, "put_back", put_back)


def no_resume(patch):
    """Control: every attempt starts at the first step."""
    patch.setattr(Saver, "resume", lambda self: None)


def no_rewind(patch):
    """Control: an attempt appends to whatever the history holds."""
    patch.setattr(history, "rewind", lambda *_: None)
