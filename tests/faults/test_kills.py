"""F01, F02, F34: a run that is killed anywhere and started again ends with the bits of one that is
not.
"""

from random import Random
from signal import SIGKILL

import pytest

from attempts import OPTIONS, SAVE_STEPS, Attempts, differences, logged, torn, whole
from labels import run_labels
from peer_scaling.checkpoint import FOLDER
from peer_scaling.record import HISTORY, REWOUND
from planned_runs import SMALL, make_planned
from scorecard import report
from tiers import count

VISITS = {
    "checkpoint.write": 6, "checkpoint.sync": 6, "checkpoint.folder": 2, "checkpoint.rename": 2,
    "checkpoint.publish": 2, "checkpoint.retire": 2,
}  # fmt: skip
"""How often an attempt passes a point, at least, before the run is too near to its end for the
others. 6 files make a checkpoint."""
MANY = 60
"""Attempts at one run, after which it counts as lost."""


def new(folder, ffw):
    return Attempts(make_planned(folder, *OPTIONS, ffw=ffw), whole(ffw))


@pytest.mark.parametrize("ffw", SMALL)
def test_killed_at_random_times(tmp_path, ffw):
    """F01."""
    rng, wanted = Random(f"F01 {ffw}"), count(2, 75)
    running = whole(ffw).record.wall_seconds
    kills, in_saves, runs, lost = 0, 0, 0, []
    while kills < wanted:
        attempts = new(tmp_path / str(runs), ffw)
        for _ in range(MANY):
            kill = [rng.uniform(0, 0.8) * running, SIGKILL]
            if attempts.attempt(signals=[kill], when_begun=rng.random() < 0.9).code == 0:
                break
        assert attempts.finish() == []
        runs, kills, in_saves = runs + 1, kills + attempts.kills, in_saves + attempts.in_saves
        lost += attempts.lost_steps
    assert max(lost) <= SAVE_STEPS
    report(
        "F01",
        f"{ffw}: {kills} kills ({in_saves} with a checkpoint half written) in {runs} runs: 0 lost, "
        f"0 differing bits, at most {max(lost)} of {SAVE_STEPS} steps lost",
    )


@pytest.mark.parametrize("ffw", SMALL if count(0, 1) else ["peer"])
def test_killed_at_every_labelled_point(tmp_path, ffw):
    """F02. One run is killed at each point after the other, and gets on between them."""
    repeats, visits = count(1, 3), Random(f"F02 {ffw}")
    labels = sorted(run_labels(), key=when)
    for repeat in range(repeats):
        attempts = new(tmp_path / str(repeat), ffw)
        for label in labels:
            if label.startswith("history."):  # passed only where there is something to rewind
                assert attempts.attempt(inject=[["kill_at_step", 5]]).code == -SIGKILL
            visit = visits.randint(1, VISITS.get(label, 1))
            ended = attempts.attempt(fault_at=f"{label}:{visit}")
            assert ended.code == -SIGKILL, f"no run passes {label}: {ended.output}"
        assert attempts.finish() == []
    report(
        "F02",
        f"{ffw}: {len(labels)} points x {repeats}: all resumed, 0 torn checkpoints chosen, "
        f"0 differing bits",
    )


def when(label) -> tuple[int, bool]:
    """Where in a run a point is passed; after `publish` of the record it has ended."""
    order = (
        "claim.link", "history.", "checkpoint.", "weights.", "claim.renew", "record.", "checkpoint.clear"
    )  # fmt: skip
    place = max(n for n, prefix in enumerate(order) if label.startswith(prefix))
    return place, label.endswith(".publish")


def test_control_saves_in_place_are_torn(tmp_path):
    """Without a temporary folder and a rename, the same kill leaves what is no checkpoint."""
    attempts = new(tmp_path, "dense")
    ended = attempts.attempt(inject=[["saves_in_place"]], fault_at="checkpoint.write:9")
    assert ended.code == -SIGKILL
    assert torn(attempts.planned.folder / FOLDER) == attempts.problems != []
    ended = attempts.attempt()
    assert ended.output.count("set aside, the one before is used") == 1
    assert ended.start[0] == SAVE_STEPS
    assert differences(attempts.planned, attempts.whole) == [], "the checksums are the second line"


@pytest.mark.parametrize(
    ("control", "found"),
    [
        ("no_moments", "state_digest"), ("no_resume", "25 steps lost"), ("no_rewind", "twice"),
    ],
)  # fmt: skip
def test_control_what_is_switched_off_is_found(tmp_path, control, found):
    attempts = new(tmp_path, "dense")
    assert attempts.attempt(inject=[["kill_at_step", 26]]).code == -SIGKILL
    problems = attempts.finish(inject=[[control]])
    assert any(found in problem for problem in problems), problems


def test_each_step_is_logged_once(tmp_path):
    """F34: a checkpoint at step 200, lines up to 212."""
    options = (
        "budget=1.5e9",
        "log_lines=1000",
        "threads=1",
        f"checkpoint.every_tokens={200 * 256}",
    )
    planned = make_planned(tmp_path, *options, ffw="dense")
    attempts = Attempts(planned, whole("dense", options))
    ended = attempts.attempt(inject=[["kill_at_step", 213]], options=options)
    assert ended.code == -SIGKILL
    before = (planned.folder / HISTORY).read_text()
    assert logged(planned.folder)[-1]["step"] == 212
    assert attempts.attempt(options=options).start[0] == 200
    assert (planned.folder / REWOUND).read_text() == "".join(before.splitlines(True)[200:])
    assert differences(planned, attempts.whole) == []
    steps = [line["step"] for line in logged(planned.folder) if "train/loss" in line]
    assert steps == list(range(1, planned.plan.steps + 1))
    report("F34", "steps 201 to 212 once, in order; the 12 rewound lines in history-rewound.jsonl")
