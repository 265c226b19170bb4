"""F30: plans, records and manifests are data; they name no place outside and end no command."""

import json
import os
import shutil

import pytest

from drive import run_all
from scorecard import report
from studies import COMMANDS, failures, trained_study
from tiers import count

OUTSIDE = "the text of a file outside"
ROW = "{run_id},dense,d8_l2,2e9,0,{flops},1,missing,\n"
ESCAPES = ("../../outside", "/etc", "..", ".", "", "a/b", "a\\b", "a\0b", "x" * 5000, "\x1b[31m")
NUMBERS = ("abc", "nan", "-1", "inf", "1e999", "1" * 6000, "٣", "0x1")
PLANS = [ROW.format(run_id=name, flops="2e9") for name in ESCAPES]
PLANS += [ROW.format(run_id="own", flops=number) for number in NUMBERS]
PLANS += ["a,b\n", "x" * 200_000 + "\n", '"', "\udcff\udcfe\0", "\n" * 50, ",,,,,,,,\n" * 20]
RECORDS = (
    "[]", "null", "3", '"x"', "{}", '{"schema": true}', '{"schema": 1}', '{"schema": 99}', "[" * 100_000,
    '{"schema": 1, "tokens": 1' + "0" * 400 + "}", "NaN", '{"schema": NaN}', "\udcff\udcfe", "\0", "{",
)  # fmt: skip
FIELDS = {
    "run_id": ("../../x", "a\nb", "", "$\\frac{$", 3), "study": ("../x", "a,b\n", None),
    "variant": ("$\\frac{$", "$x$", "\x1b[2J", "a\nb", "x" * 5000, "", "../x", "|a|b|", "{0}%s"),
    "size": ("", "\0", 8), "budget": (-1, 0, "1e9", 1e308, 10**400, True), "seed": (-1, 2**70, 1.5, "0"),
    "loss": (-1e308, 1e308, None, "low"), "status": ("done; rm", 0, None), "reason": ("\x1b[31m\n" * 9,),
    "tokens": (0, -1, 2**63, 10**400), "config": (None, [], {"ffw": 3}, {"ffw": {"name": "x\n"}}),
    "num_params_total": (0, -5, 1e300), "finished_at": ("no date", "\0"), "flops": (0, -1.0, 1e-300),
    "expert_usage": (-1, 5), "protocol": ("x", None), "schema": (2, "1", None, 1.0),
}  # fmt: skip
MANIFESTS = (
    {"shards": [{"file": "../../outside", "split": "train", "tokens": 1, "bytes": 26, "sha256": ""}]},
    {"shards": [{"file": "/etc/passwd", "split": "train", "tokens": 1, "bytes": 1, "sha256": ""}]},
    {"shards": [{"file": "..", "split": "train", "tokens": 1, "bytes": 4096, "sha256": ""}]},
    {"shards": 3}, {"shards": []}, {"shards": [{}]}, {"shards": None}, {"dtype": "object"}, {"dtype": "O"},
    {"dtype": "float64"}, {"dtype": "uint32"}, {"splits": {}}, {"splits": {"validation": {}}}, {"spec": 1},
    {"tokenizer_sha256": 5}, {"splits": {"validation": {"bytes": -1}}}, {"eod": "x"},
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_study(tmp_path_factory)


def in_plan(text):
    def change(folder):
        with (folder / "runs" / "own" / "plan.csv").open("ab") as file:
            file.write(text.encode("utf-8", "surrogateescape"))

    return change


def as_file(pattern, text):
    def change(folder):
        (path,) = folder.glob(pattern)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))

    return change


def with_values(pattern, **values):
    def change(folder):
        (path,) = folder.glob(pattern)
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def another_kind(pattern, kind):
    def change(folder):
        (path,) = folder.glob(pattern)
        path.unlink()
        {"pipe": os.mkfifo, "folder": os.mkdir, "link": link_outside, "loop": link_to_itself}[kind](
            path
        )

    return change


def link_outside(path):
    path.symlink_to(path.parents[2 if "cache" in path.parts else 3] / "outside")


def link_to_itself(path):
    path.symlink_to(path.name)


RECORD, MANIFEST = "runs/own/*/record.json", "cache/*/manifest.json"
KINDS = ("pipe", "folder", "link", "loop")
CHANGES = [in_plan(text) for text in PLANS]
CHANGES += [as_file(RECORD, text) for text in RECORDS]
CHANGES += [as_file(MANIFEST, text) for text in RECORDS]
CHANGES += [with_values(RECORD, **{k: v}) for k, values in FIELDS.items() for v in values]
CHANGES += [with_values(MANIFEST, **values) for values in MANIFESTS]
CHANGES += [another_kind(p, k) for p in (RECORD, MANIFEST, "runs/own/plan.csv") for k in KINDS]
CHANGES += [another_kind("cache/*/validation-documents.npy", kind) for kind in KINDS]


def test_hostile_stored_files_end_no_command_and_lead_nowhere(trained, tmp_path):
    changes = CHANGES[:: len(CHANGES) // count(5, len(CHANGES))]
    commands = []
    for number, change in enumerate(changes):
        folder = tmp_path / str(number)
        shutil.copytree(trained, folder, copy_function=shutil.copy2)
        (folder / "outside").write_text(OUTSIDE)
        change(folder)
        commands += [(folder, command) for command in COMMANDS]
    outcomes = run_all(commands, "commands")
    bad = failures(commands, outcomes)
    told = [
        o for o in outcomes if OUTSIDE in o["out"] + o["err"] or "root:x:" in o["out"] + o["err"]
    ]
    written = [f for f, _ in commands if (f / "outside").read_text() != OUTSIDE]
    strays = [
        p
        for f, _ in commands
        for p in f.iterdir()
        if p.name not in ("mine", "runs", "cache", "outside")
    ]
    report(
        "F30",
        f"{len(changes)} hostile stored files: {len(bad)} tracebacks, {len(told)} read and {len(written) + len(strays)} written outside",
    )
    assert not bad
    assert not told
    assert not written
    assert not strays
