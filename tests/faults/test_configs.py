"""F29: malformed configurations are refused in lines that help, and good ones are not."""

import random
import re
import statistics

from cases import Case, study, study_text
from commands import peer_train
from drive import drive, lay_out
from malformed import malformed
from scorecard import report
from tiers import count
from valid import valid

MAX_SECONDS = 1.0
"""Of the process's own time: for a run, or a study of two models, each composed by itself. That of
most: a shared machine takes two seconds for one of a hundred now and then."""
HANG_SECONDS = 5.0


def lines_of(outcome):
    return outcome["err"].strip().splitlines()


def names_it(case, outcome):
    return re.search(rf"(?<!\w){re.escape(case.names)}(?!\w)", outcome["err"])


def suggests_it(case, outcome):
    leaf = case.meant.rpartition(".")[2]
    return re.search(rf"did you mean ({re.escape(case.meant)}|{re.escape(leaf)})\?", outcome["err"])


def refused(outcome):
    lines = lines_of(outcome)
    return outcome["code"] == 2 and lines and all(line.startswith("error: ") for line in lines)


def test_malformed_configurations_are_refused_with_their_key(tmp_path):
    cases = malformed(random.Random(29), count(52, 1000))
    results = [(case, outcome) for case, _, outcome in drive(cases, tmp_path)]
    named = [(c, o) for c, o in results if c.names]
    typos = [(c, o) for c, o in results if c.meant]
    wrong = {
        "tracebacks": [(c, o) for c, o in results if "Traceback" in o["err"]],
        "hangs": [(c, o) for c, o in results if o["seconds"] > HANG_SECONDS],
        "not refused in error lines": [(c, o) for c, o in results if not refused(o)],
        "unnamed": [(c, o) for c, o in named if not names_it(c, o)],
        "not suggested": [(c, o) for c, o in typos if not suggests_it(c, o)],
    }
    shares = {k: f"{len(v)}" for k, v in wrong.items()}
    report("F29", f"{len(cases)} malformed, {len(named)} with a key, {len(typos)} typos: {shares}")
    detail = "\n".join(
        f"{k}: {c.arguments} {str(list(c.files.values()))[:600]}: {o['code']} {o['seconds']:.1f}s {o['err'][-400:]}"
        for k, v in wrong.items() for c, o in v
    )  # fmt: skip
    assert not wrong["tracebacks"], detail
    assert not wrong["hangs"], detail
    assert statistics.median(o["seconds"] for _, o in results) <= MAX_SECONDS
    assert not wrong["not refused in error lines"], detail
    assert len(wrong["unnamed"]) <= 0.05 * len(named), detail
    assert len(wrong["not suggested"]) <= 0.1 * len(typos), detail


def test_good_configurations_are_not_refused(tmp_path):
    cases = valid(random.Random(2900), count(12, 200))
    results = drive(cases, tmp_path)
    bad = [(c.arguments, list(c.files.values()), o["err"]) for c, _, o in results if o["code"] != 0]
    report("F29", f"{len(cases)} valid: {len(bad)} refused")
    assert not bad


def test_the_command_does_the_same(tmp_path):
    cases = malformed(random.Random(2901), count(2, 20))
    for (case, _, outcome), number in zip(
        drive(cases, tmp_path / "driven"), range(99), strict=False
    ):
        folder = tmp_path / str(number)
        lay_out(case, folder)
        result = peer_train(*case.arguments, folder=folder)
        assert result.returncode == outcome["code"]
        told = result.stderr.replace(str(folder), "")
        assert told == outcome["err"].replace(str(tmp_path / "driven" / f"{number:04d}"), "")


def test_control_the_detectors_fire(tmp_path):
    cases = [
        study(study_text("a: [1"), kind="syntax", names="own.yaml"),
        Case("key typo", ("seeed=1",), names="sed", meant="size"),
    ]
    (case, _, bad), (typo, _, good) = drive(cases, tmp_path, UNGUARDED="1")
    assert "Traceback" in bad["err"]
    assert not refused(bad)
    assert refused(good)
    assert not names_it(typo, good)
    assert not suggests_it(typo, good)
    assert names_it(case, {"err": "error: mine/own.yaml: line 2"})
