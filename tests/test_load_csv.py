"""Anybody's CSV: what it says is used exactly, what it cannot say is refused with its line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from analysis.csv_runs import write_csv
from analysis.isoflop import fit_isoflop
from analysis.load import AnalysisError, excluded, load_runs, usable
from commands import command
from surfaces import known, runs

HEADER = "variant,budget,num_params_total,tokens,loss"
ROW = "dense,1e12,1000,5,3.25"


def csv_file(folder, *lines, header=HEADER):
    path = folder / "runs.csv"
    path.write_text("\n".join([header, *lines, ""]))
    return path


def reasons(path):
    return excluded(load_runs(path))["excluded"].tolist()


def test_the_needed_columns_are_enough(tmp_path):
    made = runs(known, noise=0.01, seeds=2)
    path = tmp_path / "runs.csv"
    made[HEADER.split(",")].to_csv(path, index=False)
    ours, theirs = fit_isoflop(made), fit_isoflop(load_runs(path))
    assert [p.loss for p in ours.profiles] == [p.loss for p in theirs.profiles]
    assert [p.num_sizes for p in theirs.profiles] == [6] * 6
    by_flops = csv_file(tmp_path, ROW, header=HEADER.replace("budget", "flops"))
    assert load_runs(by_flops)[["budget", "flops"]].values.tolist() == [[1e12, 1e12]]


@given(st.floats(5e-324, 1e60, exclude_max=True), st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=50, deadline=None)
def test_every_number_survives(tmp_path_factory, number, seed):
    path = tmp_path_factory.mktemp("numbers") / "runs.csv"
    csv_file(path.parent, f"a,{number!r},{number!r},{number!r},1.5,{seed}", header=f"{HEADER},seed")
    frame = load_runs(path)
    assert frame[["budget", "tokens", "seed"]].values.tolist() == [[number, number, seed]]
    write_csv(frame, path)
    assert_frame_equal(load_runs(path), frame, check_exact=True)


def test_missing_columns_are_named_at_once(tmp_path):
    with pytest.raises(AnalysisError) as error:
        load_runs(csv_file(tmp_path, "1,2", header="loss,colour"))
    assert "no column variant, budget or flops, num_params_total, tokens;" in str(error.value)
    assert "found: loss, colour" in str(error.value)


def test_unknown_columns_are_kept(tmp_path):
    path = csv_file(tmp_path, f"{ROW},=1+1", f"{ROW},", header=f"{HEADER},colour")
    frame = load_runs(path)
    assert frame["colour"].tolist() == ["=1+1", None]
    write_csv(frame, path)
    assert_frame_equal(load_runs(path), frame, check_exact=True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("dense,1e12,1000,5,nan", "line 3: impossible: loss='nan'"),
        ("dense,1e12,1000,5,inf", "line 3: impossible: loss='inf'"),
        ("dense,1e12,1000,5,-3", "line 3: impossible: loss='-3'"),
        ("dense,1e12,1000,5,700", "line 3: impossible: loss='700'"),
        ("dense,1e12,1000,0,3", "line 3: impossible: tokens='0'"),
        ("dense,1e400,1000,5,3", "line 3: impossible: budget='1e400', flops='1e400'"),
        ("dense,1e12,1e60,5,3", "line 3: impossible: num_params_total='1e60'"),
        ("dense,1e12,1_000,5,3", "line 3: impossible: num_params_total='1_000'"),
        ("dense,1e12,١٢,5,3", "line 3: impossible: num_params_total='١٢'"),
        ("dense,1e12,1000,=2+3,much", "line 3: impossible: tokens='=2+3', loss='much'"),
        ("dense,1e12,,,3", "line 3: no num_params_total, tokens"),
        (",1e12,1000,5,3", "line 3: no variant"),
        ("$\\frac{,1e12,1000,5,3", "line 3: impossible: variant='$\\\\frac{'"),
        ("=cmd|' /C calc'!A0,1e12,1000,5,3", "line 3: impossible: variant=\"=cmd|' /C calc'!A0\""),
        ("dense,1e12,1000,5", "line 3: 4 cells under 5 columns"),
        ("dense,1e12,1000,5,3,4", "line 3: 6 cells under 5 columns"),
    ],
)
def test_a_row_that_cannot_be_keeps_its_reason_and_line(tmp_path, row, reason):
    path = csv_file(tmp_path, ROW, row)
    assert reasons(path) == [reason]
    assert len(usable(load_runs(path))) == 1
    frame = load_runs(path)
    write_csv(frame, path)
    assert_frame_equal(load_runs(path), frame, check_exact=True)


def test_a_huge_integer_is_refused_in_a_short_reason(tmp_path):
    (reason,) = reasons(csv_file(tmp_path, f"dense,1e12,{'9' * 100_000},5,3"))
    assert reason.startswith("line 2: impossible: num_params_total='9999")
    assert len(reason) < 120


@pytest.mark.parametrize(
    ("header", "values", "reason"),
    [
        ("status,reason", "failed,no room", "line 2: failed: no room"),
        ("status,reason", "failed,", "line 2: failed"),
        ("excluded,seed", "outlier,", "outlier"),
        ("wall_seconds,seed", "-5,0", "line 2: impossible: wall_seconds='-5'"),
        ("seed,causal", "1.5,perhaps", "line 2: impossible: seed='1.5', causal='perhaps'"),
        ("finished_at,seed", "yesterday,0", "line 2: impossible: finished_at='yesterday'"),
    ],
)
def test_optional_columns_are_read_as_strictly(tmp_path, header, values, reason):
    path = csv_file(tmp_path, f"{ROW},{values}", header=f"{HEADER},{header}")
    assert reasons(path) == [reason]


def test_repeated_runs_are_named(tmp_path):
    header = f"{HEADER},seed,run_id"
    copies = csv_file(tmp_path, f"{ROW},0,a", f"{ROW},0,b", header=header)
    assert reasons(copies) == ["superseded by b"]
    differ = csv_file(tmp_path, f"{ROW},0,a", f"{ROW}5,0,b", f"{ROW},1,c", header=header)
    assert set(reasons(differ)) == {
        "2 runs of one variant, size, budget, seed (a, b; losses 3.25, 3.255), and finished_at "
        "does not say which is the last"
    }
    twice = csv_file(tmp_path, f"{ROW},0,a", f"{ROW}5,1,a", header=header)
    assert "2 runs of one run_id (a; losses 3.25, 3.255)" in reasons(twice)[0]
    dated = csv_file(
        tmp_path, f"{ROW},0,a,2026-01-02", f"{ROW}5,0,b,2026-01-01", header=f"{header},finished_at"
    )
    assert reasons(dated) == ["superseded by a"]
    without_seeds = csv_file(tmp_path, ROW, f"{ROW}5")
    assert reasons(without_seeds) == []


HOSTILE = {
    "empty": (b"", "empty"),
    "blank": (b"\n \n\t\n", "empty"),
    "header_only": (HEADER.encode(), "no row below the header"),
    "utf16": (f"{HEADER}\n{ROW}".encode("utf-16"), "not UTF-8"),
    "latin1": (f"{HEADER}\nd\xe9nse,1,1,1,1".encode("latin-1"), "not UTF-8"),
    "long_cell": (f"{HEADER}\n{'x' * 300_000},1,1,1,1".encode(), "line 2: no CSV (field larger"),
    "open_quote": (f'{HEADER}\n"dense,1,1,1,1\n{ROW}\n'.encode(), "no CSV (unexpected end"),
    "semicolons": (HEADER.replace(",", ";").encode(), "no column variant"),
    "twice": (f"{HEADER},loss\n{ROW},3".encode(), "column loss occurs twice"),
    "unnamed": (f"{HEADER},\n{ROW},3".encode(), "column 6 has no name"),
    "binary": (bytes(range(256)) * 10, "not UTF-8"),
    "no_row_usable": (
        f"{HEADER}\n\x00,1e12,1,1,1".encode(),
        "none of 1 runs is usable, the first because of line 2: impossible: variant=",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, name):
    from analysis import cli

    content, message = HOSTILE[name]
    (tmp_path / "runs.csv").write_bytes(content)
    monkeypatch.setattr("sys.argv", ["peer-analyze", "isoflop", str(tmp_path / "runs.csv")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert len(line) < 500


@given(content=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: f"{HEADER}\n{text}".encode("utf-8", "surrogatepass")))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_no_file_is_a_traceback(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "runs.csv"
    path.write_bytes(content)
    try:
        frame = load_runs(path)
    except AnalysisError:
        return
    write_csv(frame, path)
    assert_frame_equal(load_runs(path), frame, check_exact=True)


def test_a_byte_order_mark_and_crlf_are_what_spreadsheets_write(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes(f"\ufeff{HEADER}\r\n{ROW}\r\n".encode())
    assert usable(load_runs(path))["loss"].tolist() == [3.25]


def test_the_commands_work_on_a_csv(tmp_path):
    frame = runs(known, noise=0.01, seeds=2)
    frame.to_csv(tmp_path / "runs.csv", index=False)
    written = command("peer-analyze", "load", "runs.csv", "--csv", "again.csv", folder=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout.splitlines() == ["72 of 72 runs can be used: 36 dense, 36 peer"]
    fitted = command("peer-analyze", "isoflop", "again.csv", folder=tmp_path)
    assert fitted.returncode == 0, fitted.stderr
    assert (tmp_path / "again_analysis" / "isoflop.svg").is_file()
    nowhere = command("peer-analyze", "load", "again.csv", "--csv", "no/x.csv", folder=tmp_path)
    assert (nowhere.returncode, len(nowhere.stderr.splitlines())) == (2, 1)
