"""F10, F11, F12: a checkpoint that is cut, flipped or incomplete is never used; the one before is."""

import io
import shutil
from random import Random

import pytest
import torch

from attempts import whole
from peer_scaling import checkpoint
from peer_scaling.checkpoint import CheckpointError
from peer_scaling.snapshot import put_back
from peer_scaling.train import run_once
from planned_runs import make_run
from scorecard import report
from stopped import BEFORE, NEWEST, fresh_saver, stopped_run, store_of
from tiers import count


class Victim:
    """The newest checkpoint of a stopped run, damaged again and again."""

    def __init__(self, planned, capsys):
        self.planned, self.store, self._capsys = planned, store_of(planned), capsys
        self.folder = self.store.folder / f"step-{NEWEST:08d}"
        self.files = {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}
        self.size = sum(map(len, self.files.values()))
        assert self.store.newest(planned.identity).step == NEWEST
        capsys.readouterr()

    def place(self, offset):
        """File and place in it of a byte of the whole checkpoint."""
        for name, data in self.files.items():
            if offset < len(data):
                return name, offset
            offset -= len(data)
        raise IndexError(offset)

    def check(self, what):
        """Detected, one line, the one before used; then whole again."""
        found = self.store.newest(self.planned.identity)
        lines = self._capsys.readouterr().out.splitlines()
        assert found.step == BEFORE, what
        assert len(lines) == 1, what
        assert lines[0].startswith(f"{self.folder}: "), what
        assert lines[0].endswith("; set aside, the one before is used"), what
        assert not self.folder.exists(), what
        for aside in self.store.folder.glob("bad-*"):
            shutil.rmtree(aside)
        self.restore()

    def restore(self):
        self.folder.mkdir(exist_ok=True)
        for name, data in self.files.items():
            (self.folder / name).write_bytes(data)


@pytest.fixture
def victim(tmp_path, capsys):
    return Victim(stopped_run(tmp_path), capsys)


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_cut_anywhere(victim):
    """F10."""
    rng, cuts = Random("F10"), count(25, 100)
    for _ in range(cuts):
        name, length = victim.place(rng.randrange(victim.size))
        (victim.folder / name).write_bytes(victim.files[name][:length])
        victim.check((name, length))
    report("F10", f"{cuts} of {cuts} truncations detected, the one before used, one line each")


def test_one_flipped_bit_anywhere(victim):
    """F11. Half of them in any byte, half in any file: small files matter as much."""
    rng, flips = Random("F11"), count(100, 1000)
    for number in range(flips):
        name, byte = victim.place(rng.randrange(victim.size))
        if number % 2:
            name = rng.choice(sorted(victim.files))
            byte = rng.randrange(len(victim.files[name]))
        bit = 8 * byte + rng.randrange(8)
        (victim.folder / name).write_bytes(flipped(victim.files[name], bit))
        victim.check((name, bit))
    report("F11", f"{flips} of {flips} flips detected, the one before used, one line each")


def test_any_file_deleted_or_renamed(victim):
    """F12."""
    for name in victim.files:
        (victim.folder / name).unlink()
        victim.check(f"{name} deleted")
        (victim.folder / name).rename(victim.folder / f"{name}.old")
        victim.check(f"{name} renamed")
        (victim.folder / name).unlink()
        (victim.folder / name).mkdir()
        victim.check(f"{name} a folder")
    report("F12", f"{len(victim.files)} files, each deleted, renamed, made a folder: all detected")


def test_a_run_with_a_damaged_checkpoint_ends_with_the_right_bits(victim, capsys):
    name = "moments.safetensors"
    (victim.folder / name).write_bytes(flipped(victim.files[name], 8 * len(victim.files[name]) - 9))
    record = run_once(victim.planned)
    assert f"resumed from step {BEFORE} " in capsys.readouterr().out
    assert record.state_digest == whole("peer").record.state_digest


def test_a_run_without_a_good_checkpoint_starts_anew(victim, capsys):
    for folder in victim.store.folder.glob("step-*"):
        (folder / "manifest.json").unlink()
    record = run_once(victim.planned)
    out = capsys.readouterr().out
    assert out.count("set aside") == 2
    assert ": fresh" in out
    assert record.state_digest == whole("peer").record.state_digest


def test_control_without_verification_wrong_bits_are_read(victim, monkeypatch):
    """Most flips then pass; the digest of the state, compared on resume, still finds them all."""

    def unverified(folder):
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}

    right = victim.store.newest(victim.planned.identity)
    rng, flips, read, found = Random("control"), count(20, 200), 0, 0
    name = "model.safetensors"
    monkeypatch.setattr(checkpoint, "verify", unverified)
    for _ in range(flips):
        bit = rng.randrange(8 * len(victim.files[name]))
        (victim.folder / name).write_bytes(flipped(victim.files[name], bit))
        wrong = checkpoint.read_checkpoint(victim.folder) if loads(victim.folder) else None
        if wrong and not same(wrong.tensors["model"], right.tensors["model"]):
            read += 1
            with pytest.raises(CheckpointError):
                put_back(wrong, fresh_saver(victim.planned).state)
            found += 1
    assert read == found > 0.5 * flips
    report("F11", f"control, no verification: {read} of {flips} flips in the weights read as good")


def loads(folder):
    try:
        checkpoint.read_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def test_control_plain_torch_files_miss_most_flips(tmp_path):
    """What `torch.save` writes has checksums that `torch.load` does not look at."""
    right = make_run(tmp_path, "size=d64_l4", ffw="dense").model().state_dict()
    buffer = io.BytesIO()
    torch.save(right, buffer)
    data, rng, flips = buffer.getvalue(), Random("torch"), count(50, 1000)
    outcomes = [outcome(flipped(data, rng.randrange(8 * len(data))), right) for _ in range(flips)]
    wrong, raised = outcomes.count("wrong"), outcomes.count("raised")
    assert wrong > 0.8 * flips
    report(
        "F11",
        f"control, plain torch.load: {wrong} of {flips} flips read as good with wrong bits, "
        f"{raised} detected, {outcomes.count('same')} in bytes without use",
    )


def outcome(data, right):
    try:
        found = torch.load(io.BytesIO(data), weights_only=True)
        return "same" if same(found, right) else "wrong"
    except Exception:  # whatever it is, the damage was noticed
        return "raised"


def same(some, others):
    return some.keys() == others.keys() and all(
        some[n].dtype == others[n].dtype
        and some[n].numpy().tobytes() == others[n].numpy().tobytes()
        for n in some
    )
