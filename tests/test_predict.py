"""Predictions at budgets that were not trained: coverage, refusals, sizes, files, later checks."""

import json
import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from analysis.cli import main
from analysis.csv_runs import write_csv
from analysis.isoflop import fit_isoflop
from analysis.load import AnalysisError, as_frame, load_runs
from analysis.predict import MAX_FACTOR, predict
from analysis.prediction_file import check, read, save
from analysis.routes import by_power_laws, by_surface
from analysis.runnable import runnable
from commands import command
from conftest import ROOT
from drawn_surfaces import CHINCHILLA, draw_law
from peer_scaling.config import run_from
from peer_scaling.paths import config_folder

STUDY = ROOT / "docs" / "figures" / "isoflop_laptop"
BUDGETS = (1e18, 3e18, 1e19, 3e19)
NOISE = 0.003
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def made(law, budgets, rng, noise=NOISE, seeds=2, finished=None, size="x{k}"):
    rows = []
    for C in budgets:
        for k, x in enumerate(np.linspace(-1.4, 1.4, 6)):
            N = law.best(C) * np.exp(x)
            for seed in range(seeds):
                rows.append(
                    {
                        "variant": "dense", "study": "made", "budget": C, "flops": C, "seed": seed,
                        "num_params_total": N, "num_params_active": N, "tokens": C / (6 * N),
                        "loss": law.loss(N, C) + noise * rng.standard_normal(),
                        "size": size.format(k=k), "run_id": f"{C:g}-{k}-{seed}", "finished_at": finished,
                    }
                )  # fmt: skip
    return as_frame(rows)


@pytest.fixture(scope="module")
def frame():
    return made(CHINCHILLA, BUDGETS, np.random.default_rng(0))


@pytest.fixture(scope="module")
def csv(tmp_path_factory, frame):
    path = tmp_path_factory.mktemp("csv") / "runs.csv"
    write_csv(frame, path)
    return path


def analyze(*arguments, folder):
    return command("peer-analyze", *arguments, folder=folder)


def test_intervals_at_ten_times_hold_the_truth_about_as_often_as_they_say():
    """60 surfaces, four budgets of six sizes and two seeds, 10 times beyond; 80 % intervals of N*,
    and of the loss of one new run at N*. Limits: three standard errors of 60 draws.
    """
    inside = {"N": [], "L": []}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        law = draw_law(rng)
        try:
            route = by_surface(made(law, BUDGETS, rng), 3e20, "num_params_total", 0.8, 100)
        except AnalysisError:  # the fit is no answer, and says so
            continue
        N = law.best(3e20)
        new = law.loss(N, 3e20) + NOISE * rng.standard_normal()
        inside["N"].append(route.N.low <= N <= route.N.high)
        inside["L"].append(route.L.low <= new <= route.L.high)
    assert len(inside["N"]) >= 55
    for name, held in inside.items():
        assert 0.65 <= np.mean(held) <= 0.95, name


def test_both_approaches_find_the_optimum_of_a_surface_without_noise():
    frame = made(CHINCHILLA, BUDGETS, np.random.default_rng(0), noise=1e-7)
    found = predict(frame, "dense", 3e20)
    N = CHINCHILLA.best(3e20)
    three, two = found.routes
    assert (three.approach, two.approach) == ("approach 3", "approach 2")
    assert three.N.value == pytest.approx(N, rel=1e-4)
    assert three.L.value == pytest.approx(CHINCHILLA.loss(N, 3e20), rel=1e-5)
    assert three.D.value == pytest.approx(3e20 / (6 * N), rel=1e-4)
    assert two.N.value == pytest.approx(N, rel=0.03)
    assert two.L.low <= CHINCHILLA.loss(N, 3e20) <= two.L.high
    assert found.objections == ()
    errors = fit_isoflop(frame).optima("dense")
    assert two == by_power_laws(errors, 3e20, 0.95)


def test_two_budgets_have_a_law_and_no_interval():
    found = predict(made(CHINCHILLA, BUDGETS[:2], np.random.default_rng(0)), "dense", 1e19)
    assert [route.approach for route in found.routes] == ["approach 2"]
    assert not found.best.L.finite
    assert "no approach 3: 12 configurations at 2 budgets" in found.notes[0]
    assert found.objections == ("2 budgets with a minimum (limit: at least 3)",)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--budget", "1e22", "--variant", "dense"], r"--budget 1e\+22: 333 times the largest budget trained, 3e\+19 \(limit 30\); --force"),
        (["--budget", "1e20", "--variant", "peer"], "--variant peer: no usable run of it; there are dense"),
        (["--budget", "-1", "--variant", "dense"], "--budget -1: give a positive number"),
        (["--budget", "1e20"], "predict needs --budget and --variant"),
        (["--budget", "1e20", "--variant", "dense", "--level", "95"], "--level 95: give one from"),
        (["--check", "nowhere.json"], "--check nowhere.json: No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_predicted_is_said_in_one_line(
    csv, monkeypatch, capsys, arguments, expected
):
    monkeypatch.setattr("sys.argv", ["peer-analyze", "predict", str(csv), *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(expected, line)


def test_the_command_says_what_the_law_says_and_warns_when_forced(csv, frame, tmp_path):
    budget = 2 * MAX_FACTOR * BUDGETS[-1]
    arguments = ["--budget", f"{budget:g}", "--variant", "dense", "--force", "--level", "0.9"]
    result = analyze("predict", str(csv), *arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith(f"warning: --budget {budget:g}: 60 times the largest")
    route = predict(frame, "dense", budget, level=0.9).best
    lines = re.findall(r"([NDL])\* = (\S+) \[(\S+), (\S+)\]", result.stdout)[:3]
    for (of, *numbers), name in zip(lines, "NDL", strict=True):
        estimate = getattr(route, of)
        assert of == name
        shown = [float(number) for number in numbers]
        assert shown == pytest.approx([estimate.value, estimate.low, estimate.high], rel=1e-5)
    assert "error of L*: " in result.stdout
    assert "% by leaving out one budget" in result.stdout


def test_the_size_of_a_prediction_is_one_that_can_be_trained():
    """The command line's size, as the training command composes it."""
    choice = runnable(load_runs(STUDY), "peer", "num_params_total", 7e5, 1e12)
    assert (choice.size, choice.trained) == ("d72_l2", False)
    program, option, study, variant, *size, budget = choice.command.split()
    assert (program, option, study) == ("peer-train", "--config-name", "isoflop_laptop")
    assert variant == "variant=peer"
    with initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        composed = compose("train", ["ffw=peer", *size, budget])
        decoder = run_from(composed).decoder
    assert (decoder.d_model, decoder.num_layers, composed.budget) == (72, 2, 1e12)


@pytest.mark.parametrize("size", ["d40_l2", "d48_l2"])
@pytest.mark.parametrize("axis", ["num_params_total", "num_params_active"])
def test_parameters_of_a_wider_size_are_those_it_has(size, axis):
    """From the smaller sizes of the committed study, d8 to d32, whose steps are a quarter of 32."""
    frame = load_runs(STUDY)
    smaller = frame.loc[~frame["size"].isin(["d40_l2", "d48_l2"])]
    for variant in ("dense", "peer"):
        counted = frame.loc[(frame["size"] == size) & (frame["variant"] == variant), axis].iloc[0]
        choice = runnable(smaller, variant, axis, counted, 1e12)
        assert choice.size == size
        assert choice.num_params == pytest.approx(counted, rel=0.01)


def test_a_trained_size_is_taken_where_one_is_close():
    choice = runnable(load_runs(STUDY), "dense", "num_params_total", 2.5e4, 1e11)
    assert choice.trained
    assert choice.how == "closest of 8 trained sizes"
    assert f"size={choice.size} budget=1e11" in choice.command


def test_sizes_without_a_shape_are_not_extrapolated(frame):
    choice = runnable(frame, "dense", "num_params_total", 1e12, 1e20)
    assert choice.trained
    assert "above all of them, and their names give no shape" in choice.how


@pytest.fixture
def saved(frame, tmp_path):
    found = predict(frame, "dense", 3e20)
    choice = runnable(frame, "dense", found.axis, found.best.N.value, 3e20)
    return found, choice, save(found, choice, frame, tmp_path / "saved", NOW)


def later(days=1, law=CHINCHILLA):
    time = (NOW + timedelta(days=days)).isoformat()
    return made(law, (3e20,), np.random.default_rng(1), finished=time)


def test_a_saved_prediction_is_checked_against_a_later_study(saved, frame, csv, tmp_path):
    found, _, path = saved
    values = json.loads(path.read_text())
    assert values["made_at"] == "2026-01-01T00:00:00+00:00"
    assert path.name == "20260101T000000Z-made-dense-3e20.json"
    assert values["routes"][0]["coefficients"] == found.best.coefficients
    checked = check(read(path), later())
    assert checked.inside
    assert checked.saved.loss == found.best.L.value
    truth = CHINCHILLA.loss(CHINCHILLA.best(3e20), 3e20)
    assert checked.measured == pytest.approx(truth, abs=2 * NOISE)
    assert checked.error == found.best.L.value / checked.measured - 1
    worse = later().assign(loss=lambda rows: rows["loss"] + 0.1)
    assert not check(read(path), worse).inside
    later_csv = tmp_path / "later.csv"
    write_csv(later(), later_csv)
    result = analyze("predict", str(later_csv), "--check", str(path), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "inside the 95 % interval; error" in result.stdout
    assert f"predicted L* = {found.best.L.value:.6g}" in result.stdout


def test_a_prediction_is_never_written_over(saved, frame):
    found, choice, path = saved
    before = path.read_bytes()
    with pytest.raises(AnalysisError, match="there already"):
        save(found, choice, frame, path.parent, NOW)
    assert path.read_bytes() == before


def test_runs_that_cannot_test_a_prediction_are_refused(saved, frame, tmp_path):
    path = saved[2]
    with pytest.raises(AnalysisError, match=r"12 of 12 runs .* finished before the prediction"):
        check(read(path), later(days=-1))
    with pytest.raises(AnalysisError, match="no usable run of dense at 3e"):
        check(read(path), frame)
    # At a budget of its own runs, renamed and dated later.
    found = predict(frame, "dense", BUDGETS[-1])
    choice = runnable(frame, "dense", found.axis, found.best.N.value, found.budget)
    own = save(found, choice, frame, tmp_path / "own", NOW)
    renamed = frame.assign(run_id="new", finished_at=(NOW + timedelta(days=1)).isoformat())
    with pytest.raises(AnalysisError, match=r"12 of 12 runs .* already part of"):
        check(read(own), renamed)


@pytest.mark.parametrize("damage", ["{", "[]", '{"kind": "x"}', "cut", "nan", "typed"])
def test_a_damaged_prediction_is_refused(saved, tmp_path, damage):
    text = saved[2].read_text()
    value = json.loads(text)["routes"][0]["L"]["value"]
    damaged = {
        "cut": text[:400],
        "nan": text.replace(repr(value), "null"),
        "typed": text.replace('"run_digests": [', '"run_digests": 3, "x": ['),
    }
    path = tmp_path / "bad.json"
    path.write_text(damaged.get(damage, damage))
    with pytest.raises(AnalysisError, match="not a saved prediction"):
        read(path)
