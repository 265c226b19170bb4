"""The stamp of a finished study: believed while all it was made from is as it was, and not after."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from commands import BIN, peer_train
from conftest import ROOT
from peer_scaling import stamp
from peer_scaling.paths import PACKAGE, config_folder
from peer_scaling.stamp import Command, DoubtError, Launch, Stamp, result_digest, state_of

TEXT = "own: 1 cells, 1 done"
RUN = "dense-d8_l2-1e9-s0-00000000"
HEAVY = ("torch", "hydra", "omegaconf", "numpy", "pandas", "transformers", "datasets", "wandb")
NOT_KEYED = {
    "CXX": "which compiler builds kernels",
    "WANDB_MODE": "what is sent while a run trains",
    "WANDB_API_KEY": "the same",
    "CUBLAS_WORKSPACE_CONFIG": "set for runs that train",
    "name": "distributed.py: of the variables that are refused",
}  # fmt: skip
"""Variables that our code reads and that say nothing of a study with nothing to do."""


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def made(tmp_path):
    """A command of a finished study of one run, with its stamp; nothing in it is the real one."""
    write(tmp_path / "package" / "ffw" / "peer.py", "width = 1\n")
    write(tmp_path / "conf" / "size" / "d8_l2.yaml", "d_model: 8\n")
    write(tmp_path / "mine" / "own.yaml", "budget: 1e9\n")
    write(tmp_path / "site" / "torch-2.11.0.dist-info" / "METADATA")
    write(tmp_path / "site" / "hydra_plugins" / "slurm" / "__init__.py")
    write(tmp_path / "runs" / "own" / "plan.csv", f"{RUN}\n")
    write(tmp_path / "runs" / "own" / RUN / "record.json", '{"status": "done"}\n')
    write(tmp_path / "corpus" / "manifest.json", "{}\n")
    text = write(tmp_path / "text.txt", "words\n")
    (tmp_path / "cache" / "finished").mkdir(parents=True)
    command = Command(
        arguments=("--config-dir", "mine", "--config-name=own", "seed=0"),
        folder=tmp_path,
        environment={"HOME": "/home/me", "PEER_SCALING_CACHE": "cache"},
        search=("missing.zip", str(tmp_path / "site")),
        package=tmp_path / "package",
        configs=(tmp_path / "conf",),
        cache=tmp_path / "cache",
    )
    watched = [tmp_path / "corpus", tmp_path / "corpus" / "manifest.json", tmp_path / "tokenizer"]
    names = ["plan.csv", f"{RUN}/record.json"]
    launch = Launch(command, command.facts())
    launch.leave(
        Stamp(
            facts=launch.facts,
            text=TEXT,
            runs_dir=str(tmp_path / "runs"),
            study="own",
            results={name: result_digest(tmp_path / "runs" / "own", name) for name in names},
            sources={str(text): stamp.source_identity("local", str(text))},
            states={str(path): state_of(path) for path in watched},
        )
    )
    return command


def text_of(command):
    """What a launch prints that believes its stamp; None if it goes the ordinary way."""
    try:
        return Launch(command, command.facts()).finished_text()
    except DoubtError:
        return None


def test_a_stamp_is_believed_while_all_is_as_it_was(made, tmp_path):
    assert text_of(made) == TEXT
    write(tmp_path / "runs" / "own" / "another" / "record.json", "{}")
    write(tmp_path / "notes.txt", "nothing to do with it")
    assert text_of(made) == TEXT
    assert replace(made, arguments=("--config-name", "own", "runs_dir=../runs")).facts()


COMMANDS = {
    "another argument": {"arguments": ("--config-dir", "mine", "--config-name=own", "seed=1")},
    "another order": {"arguments": ("seed=0", "--config-dir", "mine", "--config-name=own")},
    "a flag": {"arguments": ("--config-dir", "mine", "--config-name=own", "seed=0", "--help")},
    "another cache": {"environment": {"HOME": "/home/me", "PEER_SCALING_CACHE": "other"}},
    "another home": {"environment": {"HOME": "/home/you", "PEER_SCALING_CACHE": "cache"}},
    "without them": {"environment": {}},
    "another place for packages": {"search": ()},
}


@pytest.mark.parametrize("changed", COMMANDS.values(), ids=list(COMMANDS))
def test_another_command_goes_the_ordinary_way(made, changed):
    other = replace(made, **changed)
    assert text_of(other) is None
    if other.stamp != made.stamp:  # not only because it looks elsewhere
        shutil.copy(made.stamp, other.stamp)
        assert text_of(other) is None


def test_another_folder_goes_the_ordinary_way(made, tmp_path):
    other = replace(made, folder=write(tmp_path / "there" / "mine" / "own.yaml").parent.parent)
    shutil.copy(made.stamp, other.stamp)
    assert text_of(other) is None


@pytest.mark.parametrize("name", stamp.REFUSED)
def test_ranks_and_injected_faults_go_the_ordinary_way(made, name):
    with pytest.raises(DoubtError):
        replace(made, environment={**made.environment, name: "0"}).facts()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config-name", "../own"), ("size=../../other",), ("--config-path", "mine"), ("-m",),
        ("--cfg", "job"), ("--", "seed=0"), ("--config-na", "own"),
    ],
)  # fmt: skip
def test_what_may_read_other_files_goes_the_ordinary_way(made, arguments):
    with pytest.raises(DoubtError):
        replace(made, arguments=arguments).facts()


def replaced_by_link(path):
    target = path.rename(path.with_name("elsewhere"))
    path.symlink_to(target.name)


def copied(path):
    """The same bytes at another time."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


FILES = {
    "our code is edited": lambda f: write(f / "package" / "ffw" / "peer.py", "width = 2\n"),
    "our code is in an archive": lambda f: shutil.rmtree(f / "package"),
    "our code has a new file": lambda f: write(f / "package" / "ffw" / "new.py"),
    "a shipped configuration is edited": lambda f: write(f / "conf/size/d8_l2.yaml", "d_model: 9\n"),
    "a configuration is new": lambda f: write(f / "conf" / "size" / "d9_l2.yaml", "d_model: 9\n"),
    "a configuration is gone": lambda f: (f / "conf" / "size" / "d8_l2.yaml").unlink(),
    "the user's configuration is edited": lambda f: write(f / "mine" / "own.yaml", "budget: 2e9\n"),
    "a configuration names one elsewhere": lambda f: write(f / "mine/a.yaml", "defaults: [../b]\n"),
    "a package has another version": lambda f: (f / "site" / "torch-2.11.0.dist-info").rename(
        f / "site" / "torch-2.12.0.dist-info"
    ),
    "a package is new": lambda f: write(f / "site" / "ray-2.0.dist-info" / "METADATA"),
    "a plugin of Hydra's is new": lambda f: write(f / "site" / "hydra_plugins" / "own.py"),
    "the corpus is touched": lambda f: os.utime(f / "corpus" / "manifest.json"),
    "the corpus is another copy": lambda f: copied(f / "corpus" / "manifest.json"),
    "the corpus has a new file": lambda f: write(f / "corpus" / "shard.bin"),
    "the corpus is gone": lambda f: shutil.rmtree(f / "corpus"),
    "a tokenizer is there now": lambda f: write(f / "tokenizer" / "tokenizer.json"),
    "the text is touched": lambda f: os.utime(f / "text.txt"),
    "the text is gone": lambda f: (f / "text.txt").unlink(),
    "the plan is edited": lambda f: write(f / "runs" / "own" / "plan.csv", "another\n"),
    "the plan is gone": lambda f: (f / "runs" / "own" / "plan.csv").unlink(),
    "a record is edited": lambda f: write(f / "runs" / "own" / RUN / "record.json", "{}\n"),
    "a record is gone": lambda f: (f / "runs" / "own" / RUN / "record.json").unlink(),
    "a record is a link": lambda f: replaced_by_link(f / "runs" / "own" / RUN / "record.json"),
    "a run is a link": lambda f: replaced_by_link(f / "runs" / "own" / RUN),
    "a run is gone": lambda f: shutil.rmtree(f / "runs" / "own" / RUN),
    "a link leads out of the runs": lambda f: (f / "runs" / "own" / RUN / "out").symlink_to(f),
    "the runs are gone": lambda f: shutil.rmtree(f / "runs"),
}  # fmt: skip


@pytest.mark.parametrize("change", FILES.values(), ids=list(FILES))
def test_a_change_on_disk_goes_the_ordinary_way(made, tmp_path, change):
    change(tmp_path)
    assert text_of(made) is None


def test_a_record_that_is_no_file_does_not_hang(made, tmp_path):
    record = tmp_path / "runs" / "own" / RUN / "record.json"
    record.unlink()
    os.mkfifo(record)
    assert text_of(made) is None


@pytest.mark.parametrize(
    "change",
    [
        {"facts": "0"}, {"text": "\x1b[2J"}, {"text": None}, {"study": "../own"}, {"results": None}, {"results": {"../x": "0"}},
        {"results": {"/etc/passwd": "0"}}, {"states": []}, {"sources": 3}, {"more": 1},
    ],
)  # fmt: skip
def test_a_stamp_that_is_none_goes_the_ordinary_way(made, change):
    values = json.loads(made.stamp.read_text())
    made.stamp.write_text(json.dumps(values | change))
    assert text_of(made) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\0\xff"])
def test_a_damaged_stamp_goes_the_ordinary_way(made, text):
    made.stamp.write_bytes(text.encode("latin-1"))
    assert text_of(made) is None


def test_no_stamp_is_left_if_what_the_launch_began_with_changed_meanwhile(made, tmp_path):
    launch = Launch(made, made.facts())
    left = Stamp(**json.loads(made.stamp.read_text()))
    made.stamp.unlink()
    write(tmp_path / "mine" / "own.yaml", "budget: 2e9\n")
    with pytest.raises(DoubtError):
        launch.leave(left)
    assert not list(made.stamp.parent.iterdir())


def test_folders_of_configurations_may_not_be_whole_disks(made, monkeypatch):
    monkeypatch.setattr(stamp, "MAX_ENTRIES", 1)
    assert text_of(made) is None


def test_every_variable_that_our_code_reads_is_keyed_refused_or_says_nothing():
    read = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.get":
                read.add(ast.unparse(node.args[0]).strip("'"))
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                read.add(ast.unparse(node.slice).strip("'"))
    assert {"PEER_SCALING_CACHE", "RANK"} <= read
    unknown = {
        name
        for name in read - {"VARIABLE", "VISIBLE"} - set(NOT_KEYED) - set(stamp.REFUSED)
        if not name.startswith(stamp.KEYED)
    }
    assert not unknown
    assert stamp.VARIABLE in stamp.REFUSED


def test_a_process_knows_what_it_was_started_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["peer-train", "--config-name", "smoke"])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    command = Command.of_process()
    assert command.arguments == ("--config-name", "smoke")
    assert (command.folder, command.package) == (Path.cwd(), ROOT / "peer_scaling")
    assert command.configs == (config_folder("conf"), config_folder("sweeps"))
    assert Launch.begin() == Launch(command, command.facts())
    assert command.environment["HOME"] == os.environ["HOME"]
    assert "canary" not in repr(command)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Launch.begin() is None


def test_without_a_home_a_launch_goes_the_ordinary_way(monkeypatch):
    monkeypatch.setattr(stamp, "cache_folder", lambda: Path("~nobody-at-all/x").expanduser())
    assert Launch.begin() is None


def test_a_finished_study_is_known_without_heavy_imports(tmp_path):
    smoke = ["--config-name", "smoke", "ffw=dense", "size=d8_l2"]
    environment = {"PEER_SCALING_CACHE": str(tmp_path / "cache")}
    first = peer_train(*smoke, folder=tmp_path, **environment)
    assert first.returncode == 0, first.stderr
    plan = (tmp_path / "runs" / "smoke" / "plan.csv").read_text()
    again = subprocess.run(
        [sys.executable, "-X", "importtime", str(BIN / "peer-train"), *smoke],
        cwd=tmp_path,
        env={k: os.environ[k] for k in ("PATH", "HOME", "LANG", "TMPDIR") if k in os.environ} | environment,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert (again.returncode, again.stdout) == (0, "smoke: 1 cells, 1 done\n")
    imported = {line.split("|")[-1].strip().split(".")[0] for line in again.stderr.splitlines()}
    assert "peer_scaling" in imported
    assert not imported & set(HEAVY)
    # The ordinary way says and leaves the same.
    shutil.rmtree(tmp_path / "cache" / "finished")
    ordinary = peer_train(*smoke, folder=tmp_path, **environment)
    assert (ordinary.returncode, ordinary.stdout, ordinary.stderr) == (0, again.stdout, "")
    assert (tmp_path / "runs" / "smoke" / "plan.csv").read_text() == plan
    assert list((tmp_path / "cache" / "finished").iterdir())
    (record,) = (tmp_path / "runs" / "smoke").glob("*/record.json")
    record.unlink()
    trained = peer_train(*smoke, folder=tmp_path, **environment)
    assert "smoke: 1 cells, 1 missing" in trained.stdout
    assert trained.stdout.count("perplexity") == 1
    assert record.is_file()
