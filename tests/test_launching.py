"""The cells of a study through launchers of others: by policy, and what is said of failures."""

from dataclasses import replace

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from peer_scaling.errors import StudyIncompleteError
from peer_scaling.jobs import CellJob, check_results, failure_table
from peer_scaling.launching import Launching
from peer_scaling.policy import FailurePolicy
from peer_scaling.publish import write_record
from peer_scaling.record import RunRecord, find_record

QUICK = FailurePolicy(first_seconds=0.01)


def fields(name):
    return {"run_id": name, "study": "s", "ffw": "dense", "variant": "dense", "size": "d8_l2", "seed": 0, "budget": 1e9}  # fmt: skip


def jobs_of(root, *names):
    """The first one is the largest."""
    return [
        CellJob((name,), name, name, root / name, 10.0 - n, 0, fields(name), f"again {name}")
        for n, name in enumerate(names)
    ]


class Scripted(Launcher):
    """Ends each cell as its script says, one word per attempt: the last one stays."""

    def __init__(self, root, **scripts):
        self.root, self.scripts, self.launches = root, scripts, []

    def setup(self, **_):
        raise NotImplementedError

    def launch(self, job_overrides, initial_job_idx):
        self.launches.append([name for (name,) in job_overrides])
        return [self._one(name) for (name,) in job_overrides]

    def _one(self, name):
        words = self.scripts.get(name, ["done"])
        word = words.pop(0) if len(words) > 1 else words[0]
        result = JobReturn(status=JobStatus.COMPLETED)
        if word == "raises":
            result.status, result.return_value = JobStatus.FAILED, ValueError("wrong")
        elif word == "silent":
            result.return_value = 0
        else:
            earlier = find_record(self.root / name)
            failed = {
                "status": "failed",
                "failure": word,
                "reason": f"{word} it is",
                "last_step": 3,
            }
            ended = {"status": word, "reason": None}
            record = RunRecord(
                **fields(name), **(ended if word in ("done", "diverged") else failed),
                attempts=1 + (earlier.attempts if earlier else 0),
            )  # fmt: skip
            write_record(record, self.root / name)
            result.return_value = 0 if word == "done" else 1
        return result


class OneByOne(Scripted, BasicLauncher):
    """In place of Hydra's own."""


def run(launcher, jobs, policy=QUICK, **options):
    launching = Launching(launcher, policy, options.pop("canary", False))
    return launching, launching.run(jobs, any_done=options.pop("any_done", False))


def test_cells_are_tried_again_by_kind(tmp_path, capsys):
    launcher = Scripted(tmp_path, a=["transient", "crashed", "done"], b=["error"], c=["raises"])
    _, results = run(launcher, jobs_of(tmp_path, *"abcd"))
    assert launcher.launches == [["a", "b", "c", "d"], ["a"], ["a"]]
    assert [r.job.run_id for r in results if not r.has_ended] == ["b", "c"]
    assert find_record(tmp_path / "a").attempts == 3
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "a: failed, transient it is; again in 0 s"
    assert said[1:3] == ["b: failed, error it is", "c: failed, ended without a record (ValueError: wrong)"]  # fmt: skip


def test_retries_end(tmp_path):
    launcher = Scripted(tmp_path, a=["transient"])
    _, (result,) = run(launcher, jobs_of(tmp_path, "a"), replace(QUICK, retries=2))
    assert len(launcher.launches) == 3
    assert not result.has_ended


def test_left_to_another_process_is_looked_at_again(tmp_path):
    launcher = Scripted(tmp_path)
    launcher._one = lambda name: _left(launcher, name)
    _, (result,) = run(launcher, jobs_of(tmp_path, "a"))
    assert len(launcher.launches) == 2
    assert result.has_ended


def _left(launcher, name):
    if len(launcher.launches) == 2:
        return Scripted._one(launcher, name)
    result = JobReturn(status=JobStatus.COMPLETED)
    result.return_value = 75
    return result


def test_stop_starts_no_further_round(tmp_path):
    launcher = Scripted(tmp_path, a=["error"], b=["transient"])
    launching, results = run(launcher, jobs_of(tmp_path, *"ab"), replace(QUICK, on_failure="stop"))
    assert launcher.launches == [["a", "b"]]
    assert launching.halted
    assert all(result.started for result in results)


def test_stop_where_one_runs_after_another(tmp_path):
    launcher = OneByOne(tmp_path, b=["error"])
    launching, results = run(launcher, jobs_of(tmp_path, *"abc"), replace(QUICK, on_failure="stop"))
    assert launcher.launches == [["a"], ["b"]]
    assert [r.started for r in results] == [True, True, False]
    with pytest.raises(StudyIncompleteError) as caught:
        check_results(results)
    assert caught.value.problems == (
        "2 of 3 cells have no result, 1 of them not started because another failed; the same command starts them again",
    )  # fmt: skip
    assert launching.halted


@pytest.mark.parametrize(("word", "launches"), [("done", [["c"], ["a", "b"]]), ("error", [["c"]])])
def test_the_canary_is_the_smallest_and_alone(tmp_path, word, launches):
    launcher = Scripted(tmp_path, c=[word])
    launching, results = run(launcher, jobs_of(tmp_path, *"abc"), canary=True)
    assert launcher.launches == launches
    assert launching.halted is (word == "error")
    assert len(results) == 3


def test_no_canary_once_something_is_done(tmp_path):
    launcher = Scripted(tmp_path)
    run(launcher, jobs_of(tmp_path, *"abc"), canary=True, any_done=True)
    assert launcher.launches == [["a", "b", "c"]]


def test_the_table_of_failures(tmp_path):
    launcher = Scripted(tmp_path, a=["error"], b=["diverged"], c=["silent"])
    _, results = run(launcher, jobs_of(tmp_path, *"abcd"))
    header, *rows = [line.split("  ") for line in failure_table(results).splitlines()]
    columns = [[word.strip() for word in row if word.strip()] for row in (header, *rows)]
    assert columns == [
        ["run", "state", "attempts", "last step", "cause", "again with"],
        ["a", "failed", "1", "3", "error it is", "again a"],
        ["b", "diverged", "1", "None", "again b"],
        ["c", "failed", "ended without a record (exit code 0)", "again c"],
    ]
    assert failure_table([result for result in results if result.job.run_id == "d"]) == ""
