"""What a study may ask of a cluster, and what is read back of it: no Slurm is needed here."""

import json

import pytest

from peer_scaling import launcher_keys, slurm
from peer_scaling.launcher_keys import launcher_problems
from peer_scaling.slurm import TaskState, task_states
from peer_scaling.submissions import FOLDER, Submission, read_submissions, write_submission
from peer_scaling.submit import SlurmConfig, batches

SUBMITIT = "hydra_plugins.peer_scaling.SubmititSlurmLauncher"
PLUGINS = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
OWN = Submission("12", "study", "smoke", None, ("seed=1",), ("a", "b"), "x", "2026-01-01T00:00:00")


def problems(target=SUBMITIT, **launcher):
    return list(launcher_problems({"launcher": {"_target_": target, **launcher}, "job": {}}))


@pytest.mark.parametrize(
    "launcher",
    [
        {"setup": ["touch CANARY"]},
        {"additional_parameters": {"wrap": "touch CANARY"}},
        {"srun_args": ["--task-prolog=x"]},
        {"python": "touch CANARY; python"},
        {"partition": "main' --wrap='touch CANARY"},
        {"partition": "main\n#SBATCH --wrap=x"},
        {"comment": "a --wrap=x"},
        {"submitit_folder": "../escaped"},
        {"name": "a; touch CANARY"},
        {"tasks_per_node": 2},
        {"nodes": 2},
    ],
)
def test_hydras_launcher_is_given_no_code(launcher):
    for target in (SUBMITIT, PLUGINS):
        (problem, *_) = problems(target, **launcher)
        assert next(iter(launcher)) in problem


@pytest.mark.parametrize(
    "ray",
    [
        {"init": {"runtime_env": {"py_executable": "touch CANARY"}}},
        {"init": {"_temp_dir": "../escaped"}},
        {"init": {"address": "ray://elsewhere:10001"}},
        {"init": {"num_cpus": "2"}},
        {"remote": {"runtime_env": {"pip": ["x"]}}},
        {"run_env": "auto"},
        ["init"],
    ],
)
def test_ray_is_given_no_code_and_no_place(ray, monkeypatch):
    monkeypatch.setattr(launcher_keys, "find_spec", bool)
    (problem,) = problems(RAY, ray=ray)
    assert problem.startswith("hydra.launcher.ray.")


def test_plain_options_of_ray(monkeypatch):
    plain = {"init": {"address": None, "num_cpus": 2, "include_dashboard": False}, "remote": {}}
    monkeypatch.setattr(launcher_keys, "find_spec", bool)
    assert problems(RAY, ray=plain) == []
    monkeypatch.setattr(launcher_keys, "find_spec", lambda name: None)
    (line,) = problems(RAY, ray=plain)
    assert "pip install 'peer-scaling[ray]'" in line
    (line,) = problems(RAY.replace("RayLauncher", "RayAWSLauncher"), ray=plain, env_setup={"a": 1})
    assert "rents machines" in line


def test_plain_options_of_hydras_launcher_are_accepted():
    plain = {"partition": "gpu,long", "gres": "gpu:a100:2", "constraint": "[a|b]", "setup": None}
    assert problems(**plain, timeout_min=5, additional_parameters={}, nodes=1) == []


@pytest.mark.parametrize("text", ["a b", "a'b", "-x\n", "$(x)", "a;b", "", "x" * 201])
def test_options_of_our_launcher_are_names(text):
    with pytest.raises(ValueError, match="partition="):
        SlurmConfig(partition=text)


def test_all_problems_of_the_options_at_once():
    with pytest.raises(ValueError, match="qos=") as error:
        SlurmConfig(qos="a b", cpus_per_task=0, timeout_min=1, signal_delay_s=60)
    assert len(str(error.value).splitlines()) == 3


def test_a_submission_is_read_back_and_never_replaced(tmp_path):
    first = write_submission(tmp_path, OWN)
    again = write_submission(tmp_path, OWN)
    assert first != again
    assert read_submissions(tmp_path) == ([OWN, OWN], [])


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": "12; touch x"}, {"job_id": 12}, {"run_ids": ["../x"]}, {"run_ids": "ab"},
        {"job_name": "a\nb"}, {"schema": 2}, {"logs": "../x"}, {"unknown": 1}, {"arguments": [1]},
    ],
)  # fmt: skip
def test_what_is_no_submission_is_left_out_with_a_line(tmp_path, change):
    path = write_submission(tmp_path, OWN)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / FOLDER / "13.json").write_text("[")
    found, lines = read_submissions(tmp_path)
    assert found == []
    assert len(lines) == 2


def test_states_of_tasks_ranges_and_jobs_of_other_names(monkeypatch):
    told = {
        "sacct": "12_0|COMPLETED|0:0|n1|study\n12_1|CANCELLED by 0|0:0|None assigned|study\n"
        "12_[2,4-5%2]|PENDING|0:0|None assigned|study\n13|FAILED|1:0|n1|other\n14|FAILED|1:0|n2|study\n",
        "squeue": "12_4|RUNNING|n2|None|study\n12_5|PENDING||Resources|study\n",
    }
    monkeypatch.setattr(slurm, "command_output", lambda name, *_: told[name])
    states, lines = task_states({"12": "study", "13": "study", "14": "study"})
    assert lines == []
    assert states == {
        ("12", 0): TaskState("12_0", "completed", False, "0:0", "n1"),
        ("12", 1): TaskState("12_1", "cancelled", False, "0:0"),
        ("12", 2): TaskState("12_2", "pending", False, "0:0"),
        ("12", 4): TaskState("12_4", "running", True, "", "n2"),
        ("12", 5): TaskState("12_5", "pending", True, "", "", "Resources"),
        ("14", 0): TaskState("14", "failed", False, "1:0", "n2"),
    }


def test_without_slurm_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    states, lines = task_states({"12": "study"})
    assert states == {}
    assert lines == [f"{name}: no such command on this machine" for name in ("sacct", "squeue")]


def test_arrays_are_no_longer_than_slurm_takes():
    assert [list(part) for part in batches(list("abcde"), 2)] == [["a", "b"], ["c", "d"], ["e"]]
