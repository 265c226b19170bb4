"""F13, F14, F15: a disk that fills up, goes bad or was too small from the start."""

import errno
import itertools
import os
import resource
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from attempts import OPTIONS, SAVE_STEPS, Attempts, differences, whole
from injectors import at_call, signal_at_step
from labels import run_labels
from peer_scaling import checkpoint, durable, faultpoints, preflight
from peer_scaling.checkpoint import FOLDER, verify
from peer_scaling.errors import EXIT_USAGE, UserError
from peer_scaling.planned import plan_run
from peer_scaling.preflight import check_disk
from peer_scaling.record import RECORD, read_record
from peer_scaling.step import Stepper
from peer_scaling.stop import StoppedError
from peer_scaling.train import exit_code, run_once
from planned_runs import SMALL, make_planned, make_run
from scorecard import report
from stopped import BEFORE, NEWEST, fresh_saver, stopped_run, store_of
from tiers import count

ERRORS = ("ENOSPC", "EIO", "ESTALE", "EROFS")
SAVING = [f for f in run_labels() if f.startswith("checkpoint.") and f not in ("checkpoint.clear", "checkpoint.retire")]  # fmt: skip
AROUND = [label for label in run_labels() if label not in SAVING]


def full_at(patch, offset):
    """The kernel takes `offset` bytes of the next checkpoint and no more."""
    real, sizes = durable.write_synced, []

    def write_synced(path, data, label):
        left = offset - sum(sizes)
        sizes.append(len(data))
        if left >= len(data):
            real(path, data, label)
            return
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(left, 0), limits[1]))
        try:
            real(path, data, label)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    patch.setattr(checkpoint, "write_synced", write_synced)


def resumed(planned):
    """A saver with the state of the newest checkpoint, and a way to save further steps."""
    saver = fresh_saver(planned)
    snapshot, losses = saver.resume()

    def save_next():
        losses.append(3.0)
        return saver.save(losses, snapshot.history, snapshot.state)

    return save_next, losses


def size_of(planned, step):
    folder = store_of(planned).folder / f"step-{step:08d}"
    return sum(path.stat().st_size for path in folder.iterdir())


def test_disk_full_at_any_byte_of_a_save(tmp_path, capsys):
    """F13: each time the one before is as it was, and with room again the next save succeeds."""
    planned = stopped_run(tmp_path)
    save_next, losses = resumed(planned)
    store, rng, places = store_of(planned), Random("F13"), count(12, 50)
    size = size_of(planned, NEWEST)
    for offset in [0, size - 1, *(rng.randrange(size) for _ in range(places - 2))]:
        newest = store.steps()[0]
        before = verify(store.folder / f"step-{newest:08d}")
        with pytest.MonkeyPatch.context() as patch:
            full_at(patch, offset)
            assert not save_next(), offset
        out = capsys.readouterr().out
        assert f"checkpoint after step {len(losses)} NOT saved: [Errno {errno.EFBIG}]" in out
        assert "saved after" not in out
        assert verify(store.folder / f"step-{newest:08d}") == before, offset
        assert not list(store.folder.glob("*.tmp"))
        assert store.steps()[0] == newest
        assert save_next(), "there is room again"
        assert store.steps() == [len(losses), newest]
        assert capsys.readouterr().out == ""
    report("F13", f"disk full at {places} bytes of a save: {places}/{places} kept the one before, 0 false 'saved'")  # fmt: skip


def to_dev_full(number):
    """`write_synced` with another disk for file `number`."""
    calls, real = itertools.count(1), durable.write_synced

    def write_synced(path, data, label):
        real(Path("/dev/full") if next(calls) == number else path, data, label)

    return write_synced


def test_dev_full(tmp_path, capsys):
    """The kernel's own ENOSPC, for each file of a checkpoint."""
    planned = stopped_run(tmp_path)
    save_next, _ = resumed(planned)
    for number in range(1, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "write_synced", to_dev_full(number))
            assert not save_next()
        assert "No space left on device" in capsys.readouterr().out
        assert store_of(planned).steps() == [NEWEST, BEFORE]
    assert save_next()


def test_control_a_save_in_place_loses_what_it_overwrites(tmp_path):
    """As `torch.save` to one file: the disk fills up, and the only checkpoint is gone."""
    planned = stopped_run(tmp_path)
    folder = store_of(planned).folder / f"step-{NEWEST:08d}"
    save_next, _ = resumed(planned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_folder_of", lambda *_: folder)
        patch.setattr(checkpoint.Checkpoints, "save", lambda self, s: checkpoint._write_files(s, folder))  # fmt: skip
        full_at(patch, 1000)
        assert not save_next()
    with pytest.raises(checkpoint.CheckpointError):
        verify(folder)


def test_the_disk_has_every_byte_before_its_name(tmp_path, monkeypatch):
    """What no kill can show, for want of a power cut: the order of syncs and renames."""
    planned = stopped_run(tmp_path)
    save_next, losses = resumed(planned)
    events, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(self, target):
        events.append((str(self), str(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    assert save_next()
    final = store_of(planned).folder / f"step-{len(losses):08d}"
    temporary, number = final.with_suffix(".tmp"), events.index((f"{final}.tmp", str(final)))
    assert set(events[: number - 2]) == {
        str(temporary / path.name) for path in final.iterdir() if path.name != "manifest.json"
    }
    assert events[number - 2 : number] == [str(temporary / "manifest.json"), str(temporary)]
    assert events[number + 1] == str(final.parent)
    assert events[number + 2][0].endswith(f"step-{BEFORE:08d}"), "deleted last"


def fail_from(monkeypatch, label, visit, error):
    faultpoints._visits.cache_clear()
    monkeypatch.setenv("FAULT_AT", f"{label}:{visit}:{error}")


def third_save(label):
    """Which visit of a point is the first one of the third save."""
    return 13 if label in ("checkpoint.write", "checkpoint.sync") else 3


PAIRS = [(label, error) for label in SAVING for error in ERRORS]
SAMPLE = [(label, ERRORS[n % 4]) for n, label in enumerate(SAVING)]


@pytest.mark.parametrize(("label", "error"), PAIRS if count(0, 1) else SAMPLE[:4])
def test_a_disk_that_goes_bad_in_a_save(tmp_path, monkeypatch, capsys, label, error):
    """F14: training goes on, nothing is called saved that is not, the two before stay."""
    planned = make_planned(tmp_path, *OPTIONS, ffw="dense")
    with monkeypatch.context() as patch:
        fail_from(patch, label, third_save(label), error)
        signal_at_step(patch, 55, "SIGTERM")
        with pytest.raises(StoppedError, match="stopped by SIGTERM, not saved"):
            run_once(planned)
    out = capsys.readouterr().out
    assert out.count("NOT saved") == 4, "after steps 30, 40, 50 and when stopped"
    assert os.strerror(getattr(errno, error)) in out
    published = label == "checkpoint.publish"  # whole, but the disk may not have the name
    steps = store_of(planned).steps()
    assert steps[-2:] == [2 * SAVE_STEPS, SAVE_STEPS]
    assert (len(steps) > 2) is published
    assert all(verify(store_of(planned).folder / f"step-{step:08d}") for step in steps)
    run_once(planned)
    assert f"resumed from step {steps[0]} " in capsys.readouterr().out
    assert differences(planned, whole("dense")) == []
    report("F14", "an error in a save: the two before intact, 0 false 'saved', right bits")


@pytest.mark.parametrize("error", ERRORS[: count(1, 4)])
def test_a_run_that_outlives_the_fault_has_the_right_bits(tmp_path, monkeypatch, capsys, error):
    """With no signal, and no save from the third on: it needs none to end."""
    planned = make_planned(tmp_path, *OPTIONS, ffw="peer")
    with monkeypatch.context() as patch:
        fail_from(patch, "checkpoint.rename", 3, error)
        assert run_once(planned).status == "done"
    assert capsys.readouterr().out.count("NOT saved") == 9
    assert differences(planned, whole("peer")) == []


@pytest.mark.parametrize("error", ERRORS[: count(1, 4)])
def test_no_checkpoint_at_all_is_a_failure(tmp_path, monkeypatch, error):
    planned = make_planned(tmp_path, *OPTIONS, ffw="dense")
    with monkeypatch.context() as patch:
        fail_from(patch, "checkpoint.write", 1, error)
        record = run_once(planned)
    assert (record.status, record.failure) == ("failed", "no_durable_checkpoint")
    assert os.strerror(getattr(errno, error)) in record.reason
    assert record.last_step == planned.plan.steps, "training went on"
    assert exit_code(record) == 1
    assert run_once(planned).status == "done"
    assert differences(planned, whole("dense")) == []


@pytest.mark.parametrize("label", AROUND if count(0, 1) else ["history.sync", "checkpoint.retire", "record.rename"])  # fmt: skip
def test_a_disk_that_goes_bad_elsewhere(tmp_path, monkeypatch, capsys, label):
    """Deleting what is old may fail; without history, weights or record a run is not done."""
    planned = make_planned(tmp_path, *OPTIONS, ffw="dense")
    with monkeypatch.context() as patch:
        fail_from(patch, label, 1, "EIO")
        record = run_once(planned)
    out = capsys.readouterr().out
    if label in ("checkpoint.retire", "checkpoint.clear"):
        assert record.status == "done"
        assert "not deleted (Input/output error)" in out
        assert "NOT saved" not in out
    else:
        assert (record.status, record.failure, exit_code(record)) == ("failed", "transient", 1)
        assert "Input/output error" in record.reason
        on_disk = (
            read_record(planned.folder / RECORD) if (planned.folder / RECORD).exists() else None
        )
        assert on_disk == (
            None if label.startswith("record.") and label != "record.publish" else on_disk
        )
    run_once(planned)
    assert differences(planned, whole("dense")) == []


def mounted(folder, size):
    """A file system of its own in `folder`; the test is skipped where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted(folder, "2m")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_for_a_while(small_disk, monkeypatch, capsys):
    """History and all: from step 25 to step 62 nothing can be written, then there is room again."""
    planned = make_planned(small_disk, *OPTIONS, ffw="moe")
    ballast = small_disk / "ballast"

    def fill():
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    at_call(monkeypatch, Stepper, "step", 25, fill)
    at_call(monkeypatch, Stepper, "step", 62, ballast.unlink)
    assert run_once(planned).status == "done"
    out = capsys.readouterr().out
    assert out.count("NOT saved") == 4, "after steps 30, 40, 50, 60"
    assert out.count("history NOT written: [Errno 28] No space left on device") >= 1
    assert differences(planned, whole("moe")) == []
    report(
        "F13", "a file system full from step 25 to 62: training went on, 0 lines lost, right bits"
    )


def test_a_folder_that_becomes_read_only(small_disk, monkeypatch, capsys):
    planned = make_planned(small_disk, *OPTIONS, ffw="dense")
    folder = planned.folder / FOLDER

    def protect():
        for options in ([], ["-o", "remount,ro,bind"]):
            subprocess.run(
                ["mount", *(options or ["--bind"]), str(folder), str(folder)], check=True
            )

    at_call(monkeypatch, Stepper, "step", 25, protect)
    at_call(monkeypatch, Stepper, "step", 45, lambda: subprocess.run(["umount", "-l", folder], check=True))  # fmt: skip
    assert run_once(planned).status == "done"
    out = capsys.readouterr().out
    assert out.count("Read-only file system") == 2, "after steps 30 and 40"
    assert differences(planned, whole("dense")) == []
    report("F14", "a checkpoint folder read-only from step 25 to 45: right bits")


def sized(number):
    """A configuration of each variant, at sizes and counts of experts that a study may have."""
    sizes = ("d64_l4", "d256_l6", "d512_l8", "d768_l12", "d1280_l18")
    ffw = list(SMALL)[number % 4]
    options = [] if ffw == "dense" else [f"ffw.num_experts={(16, 1024**2)[ffw != 'moe']}"]
    keep = f"checkpoint.keep={2 + number % 3}"
    size = f"size={sizes[number % 5]}"
    return plan_run(make_run("runs", size, "budget=1e18", keep, *options, ffw=ffw), None)


def one_checkpoint(planned):
    """Bytes: parameters and two moments in float32, a loss per step in float64."""
    return 12 * planned.cost.num_params_total + 8 * planned.plan.steps


def disk_with(monkeypatch, free):
    usage = shutil._ntuple_diskusage(10 * free, 9 * free, free)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)


@pytest.mark.parametrize("number", range(20))
def test_too_small_a_disk_is_refused_before_the_first_step(tmp_path, monkeypatch, number):
    """F15."""
    monkeypatch.chdir(tmp_path)
    planned = sized(number)
    copies = planned.run.checkpoint.keep + 1
    needed = copies * one_checkpoint(planned) + 4 * planned.cost.num_params_total
    monkeypatch.setattr(preflight, "_try_to_write", lambda *_: None)
    disk_with(monkeypatch, needed)
    check_disk([planned])
    disk_with(monkeypatch, needed - 1)
    began = time.perf_counter()
    with pytest.raises(UserError) as refused:
        check_disk([planned])
    assert time.perf_counter() - began < 5
    (problem,) = refused.value.problems
    assert f"{needed / 1e9:.3g} GB more needed" in problem
    assert f"{(needed - 1) / 1e9:.3g} GB free" in problem
    assert "runs_dir=" in problem
    assert refused.value.exit_code == EXIT_USAGE
    assert not list(tmp_path.iterdir())
    report("F15", "refused in under 5 s with need and have")


def test_a_study_needs_room_for_what_runs_at_once(tmp_path, monkeypatch):
    """All weights, but checkpoints of as many runs as there are workers: the largest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "_try_to_write", lambda *_: None)
    runs = [sized(0), sized(3)]
    weights = sum(4 * run.cost.num_params_total for run in runs)
    saved = sorted(one_checkpoint(run) for run in runs)
    for workers in (1, 2):
        needed = weights + 3 * sum(saved[-workers:])
        disk_with(monkeypatch, needed)
        check_disk(runs, workers)
        disk_with(monkeypatch, needed - 1)
        with pytest.raises(UserError, match=rf"of each of {workers} run"):
            check_disk(runs, workers)


def test_a_real_disk_that_is_too_small(small_disk):
    """The command on a file system of 2 MB; and where no file may be as large as a checkpoint."""
    attempts = Attempts(make_planned(small_disk, *OPTIONS, ffw="dense"), whole("dense"))
    large = [*OPTIONS, "size=d64_l4", "budget=1e12", "data.max_epochs=10000"]
    ended = refused(attempts, options=large)
    assert " more needed" in ended.output
    assert " GB free" in ended.output
    ended = refused(attempts, inject=[["limit_file_size", 8192]])
    assert "cannot be written (File too large)" in ended.output
    assert not list(small_disk.rglob("record.json"))
    report("F15", "a real file system of 2 MB: refused")


def refused(attempts, **how):
    ended = attempts.attempt(**how)
    assert ended.code == EXIT_USAGE, ended.output
    assert ended.output.count("error: ") == len(ended.output.splitlines()) == 1
    return ended


def test_a_run_that_goes_on_may_use_the_room_of_its_checkpoints(tmp_path, monkeypatch):
    planned = stopped_run(tmp_path)
    held = size_of(planned, NEWEST) + size_of(planned, BEFORE)
    needed = 3 * one_checkpoint(planned) + 4 * planned.cost.num_params_total
    disk_with(monkeypatch, needed - held)
    check_disk([planned])
    disk_with(monkeypatch, needed - held - 1)
    with pytest.raises(UserError, match="more needed"):
        check_disk([planned])
