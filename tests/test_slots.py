"""What a run may use: a GPU is leased to one run at a time, or to as many as was asked for."""

import json
import os
import signal
import sys
import time
from functools import partial

import pytest
import torch
from torch.optim import AdamW

from peer_scaling import slots
from peer_scaling.pool import Pool, Slot, Work
from peer_scaling.slots import make_slots, visible_gpus


class Calls(Work):
    """Every end is final, but that of a piece which SIGKILL ended: it runs again, alone."""

    def __init__(self, calls, bytes_each=0):
        super().__init__(calls)
        self.killed, self.bytes_each = set(), bytes_each

    def memory(self, number):
        return self.bytes_each

    def alone(self, number):
        return number in self.killed

    def ended(self, number, exit_code, error, hung):
        self.exit_codes[number] = exit_code
        if exit_code == -signal.SIGKILL and number not in self.killed:
            self.killed.add(number)
            return 0.0
        return None


def lease(folder, name, seconds=0.3):
    """Notes from when to when it ran, what it was given, and whether CUDA was there before."""
    began = time.monotonic()
    given, used = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.is_initialized()
    time.sleep(seconds)
    notes = [given, used, began, time.monotonic()]
    (folder / name).write_text(json.dumps(notes))
    return 0


def killed_once(folder, name):
    if not (folder / f"{name}-killed").exists():
        (folder / f"{name}-killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return lease(folder, name)


def leases(folder):
    notes = [json.loads(path.read_text()) for path in folder.iterdir() if path.stat().st_size]
    return sorted(notes, key=lambda note: note[2])


def most_at_once(notes):
    return max(sum(a[2] <= b[2] < a[3] for a in notes) for b in notes)


def test_what_was_killed_for_its_memory_runs_again_alone(tmp_path):
    calls = [partial(killed_once, tmp_path, "a")]
    calls += [partial(lease, tmp_path, name) for name in "bcde"]
    work = Calls(calls)
    Pool([Slot(), Slot()]).run(work)
    assert work.exit_codes == [0] * 5
    again = json.loads((tmp_path / "a").read_text())
    others = [note for note in leases(tmp_path) if note != again]
    assert most_at_once(others) == 2
    assert most_at_once([*others, again]) == 2
    assert not [note for note in others if note[2] < again[3] and again[2] < note[3]]


def new_modules():
    """How many modules the first optimiser of this process imports."""
    before = set(sys.modules)
    AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return len(set(sys.modules) - before)


def test_what_every_run_imports_is_there_before_it_starts():
    work = Calls([new_modules])
    Pool([Slot()]).run(work)
    assert work.exit_codes == [0]


@pytest.fixture
def gpus(monkeypatch):
    """Makes this process see GPUs, which CUDA counts and whose free memory it gives."""

    def see(visible, count, free=None):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(slots, "_free_bytes", lambda names: dict.fromkeys(names, free))

    return see


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [
        (None, 2, ["0", "1"]),
        ("3,1", 2, ["3", "1"]),
        ("3, 1,-1,0", 2, ["3", "1"]),
        ("GPU-8932f937-d72c,GPU-1f0a", 2, ["GPU-8932f937-d72c", "GPU-1f0a"]),
        ("MIG-a-1,MIG-b-2,MIG-c-3", 1, ["MIG-a-1", "MIG-b-2", "MIG-c-3"]),
        ("", 0, []),
    ],
)
def test_names_of_gpus_are_those_of_the_environment(gpus, visible, count, names):
    gpus(visible, count)
    assert visible_gpus() == names
    got = make_slots("auto", 1, None)
    if names:
        assert [slot.environment for slot in got] == [{"CUDA_VISIBLE_DEVICES": n} for n in names]
        assert {slot.memory for slot in got} == {None}, "host memory holds no run on a GPU back"
    assert all(slot.device == "cpu" for slot in make_slots("cpu", 1, 3))


@pytest.mark.parametrize(("workers", "each"), [(None, 1), (4, 2)])
def test_a_gpu_is_leased_to_as_many_runs_as_it_has_slots(gpus, tmp_path, workers, each):
    gpus("MIG-a,MIG-b", 1, free=100)
    work = Calls([partial(killed_once, tmp_path, f"{n}") for n in range(8)], bytes_each=40)
    work.alone = lambda number: False
    Pool(make_slots("cuda", None, workers)).run(work)
    notes = leases(tmp_path)
    assert work.exit_codes == [0] * 8
    assert len({note[0] for note in notes}) == 2
    for gpu in {note[0] for note in notes}:
        assert most_at_once([note for note in notes if note[0] == gpu]) == each
    assert not any(note[1] for note in notes), "the lease came before CUDA"


def test_runs_that_share_a_gpu_share_its_memory(gpus, tmp_path):
    gpus("GPU-a,GPU-b", 2, free=100)
    work = Calls([partial(lease, tmp_path, f"{n}") for n in range(6)], bytes_each=60)
    Pool(make_slots("cuda", None, 4)).run(work)
    notes = leases(tmp_path)
    assert most_at_once(notes) == 2
    assert {most_at_once([n for n in notes if n[0] == gpu]) for gpu in ("GPU-a", "GPU-b")} == {1}
