"""`peer-analyze diagnose`: its numbers are those of the fits, and every law has a held-out error."""

import numpy as np
import pandas as pd
import pytest

from analysis.cli import main
from analysis.csv_runs import write_csv
from analysis.diagnose_command import as_text, diagnose_study
from analysis.isoflop import fit_isoflop
from analysis.parametric import fit_loss_surface
from drawn_surfaces import CHINCHILLA
from test_predict import BUDGETS, made


@pytest.fixture(scope="module")
def frame():
    return made(CHINCHILLA, BUDGETS, np.random.default_rng(0))


def test_every_law_is_there_with_its_held_out_error_and_its_digits(frame, tmp_path, monkeypatch):
    write_csv(frame, tmp_path / "runs.csv")
    arguments = ["diagnose", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["peer-analyze", *arguments])
    main()
    table = pd.read_csv(tmp_path / "out" / "diagnose.csv", dtype=str)
    values = table.set_index(["law", "quantity"])["value"]
    laws = [*(f"{of}*(C), approach 2" for of in "NDL"), "L(N, D), approach 3"]
    assert list(dict.fromkeys(table["law"])) == laws
    for law in laws:
        for quantity in (
            "leave-one-budget-out error",
            "error at the largest budget from the others",
        ):
            assert abs(float(values[law, quantity])) < 0.2
    surface = fit_loss_surface(frame["num_params_total"], frame["tokens"], frame["loss"])
    for name in ("A", "B", "E", "alpha", "beta"):
        assert float(values[laws[3], name]) == getattr(surface, name)
    for law in fit_isoflop(frame).laws:
        name = f"{law.of}*(C), approach 2"
        assert float(values[name, "exponent"]) == law.exponent
        assert float(values[name, "leave-one-budget-out error"]) == law.left_out_error
    assert values[laws[3], "certificate"] == "holds"
    assert values[laws[3], "approaches"] == "agree"
    text = (tmp_path / "out" / "diagnose.md").read_text()
    assert f"- A: {surface.A!r}" in text


def test_two_budgets_are_not_enough_to_hold_one_out(frame):
    table = diagnose_study(frame.loc[frame["budget"] <= BUDGETS[1]], "num_params_total")
    assert (table["quantity"] == "held-out error").sum() == 4
    assert as_text(table).count("needs >= 3 budgets") >= 4


def test_the_held_out_error_of_the_largest_budget_is_that_of_a_fit_to_the_rest(frame):
    (law,) = (law for law in fit_isoflop(frame).laws if law.of == "L")
    (rest,) = (
        law for law in fit_isoflop(frame.loc[frame["budget"] < BUDGETS[-1]]).laws if law.of == "L"
    )
    predicted = np.exp(rest.log_coefficient + rest.exponent * np.log(BUDGETS[-1]))
    measured = fit_isoflop(frame).optima("dense")[-1].loss
    assert law.largest_error == pytest.approx(predicted / measured - 1, rel=1e-6)
