"""`peer-analyze report`: one page with everything on it, nothing executed, equal for equal runs."""

import base64
import hashlib
import re
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import pytest

from analysis import tables
from analysis.csv_runs import write_csv
from analysis.isoflop import fit_isoflop
from analysis.load import load_runs
from analysis.markup import element, prose
from analysis.svg_axes import Axes, axes_over
from compared import changed, study
from reported import EVIL_ID, EVIL_REASON, LAPTOP, write_page, write_study

SECTIONS = ["verdicts", "curves", "results", "costs", "evidence", "excluded", "card", "again"]
CARD = (
    "Runs", "Budgets", "Sizes", "D/N", "Parameter count convention", "FLOP convention", "Schedule",
    "Learning-rate rule", "Learning-rate evidence", "Batch rule", "Seeds", "Tokeniser", "Data hash",
    "Validation hash", "Unique training tokens", "Epochs", "Contamination", "Fit: isoFLOP curves",
    "Fit: power laws", "Intervals", "Residuals: isoFLOP curves", "Leaving out one budget: L(N, D)",
    "Environment: packages", "Environment lock", "Code (git commit)", "Command that writes this page",
    "sha256 of the record set",
)  # fmt: skip


class Parsed(HTMLParser):
    """Checks that elements nest; keeps attributes, and the texts of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.open += [] if tag == "meta" else [tag]

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def card_of(page):
    """The items of the card, as a reader sees them."""
    text = page[page.index("<dl>") : page.index("</dl>")]
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text)
    return {unescape(what): unescape(re.sub(r"<[^>]+>", "", known)) for what, known in found}


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return write_page(patch, LAPTOP, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study with runs that do not count, and its page."""
    folder = write_study(tmp_path_factory.mktemp("made"))
    with pytest.MonkeyPatch.context() as patch:
        return folder, write_page(patch, folder, folder / "analysis" / "report.html")


def test_the_page_is_whole(laptop):
    parsed = Parsed(laptop)
    ids = [value for tag, name, value in parsed.attributes if (tag, name) == ("section", "id")]
    assert ids == SECTIONS
    runs = load_runs(LAPTOP)
    drawn = [value for _, name, value in parsed.attributes if name == "data-run"]
    assert sorted(drawn) == sorted(runs["run_id"])
    assert laptop.count('class="panel"') == 3
    assert laptop.count("data-minimum=") == 11
    assert "Not shown: which variant is better; none of 27 claims passes the gate." in laptop
    assert "paired seeds (27)" in laptop
    assert "moe at 1.6e11: flat (6 sizes" in laptop


def test_its_numbers_are_those_of_the_other_verbs(laptop):
    frame = load_runs(LAPTOP)
    fit = fit_isoflop(frame)
    perplexities = tables.perplexity_table(fit, frame).to_numpy().ravel()
    texts = set(Parsed(laptop).texts)
    assert set(perplexities) <= texts
    assert {f"{law.exponent:+.4f}" for law in fit.laws} <= texts
    for row in ("+0.115 +- 0.054 ", "-0.058 +- 0.032 ", "1.49"):  # docs/compare.md
        assert row in texts


def test_nothing_is_loaded_and_one_script_runs(laptop):
    assert "http:" not in laptop
    assert "https:" not in laptop
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', laptop)
    rules = unescape(policy[1]).split("; ")
    assert rules[:2] == ["default-src 'none'", "style-src 'unsafe-inline'"]
    (script,) = re.findall(r"<script>(.*?)</script>", laptop, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in rules
    assert not re.search(r"<(link|img|iframe|object|base|form)\b", laptop)
    assert not [name for _, name, _ in Parsed(laptop).attributes if name.startswith("on")]


def test_texts_of_records_are_texts(made):
    _, page = made
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert escape(EVIL_ID) in page
    assert f"invalid: {escape(EVIL_REASON)}" in page
    assert EVIL_ID in [value for _, name, value in Parsed(page).attributes if name == "data-run"]


def test_every_run_that_does_not_count_is_there_with_its_reason(made):
    _, page = made
    text = page[page.index('id="excluded"') : page.index('id="card"')]
    rows = re.findall(r"<tr><th scope=\"row\"[^>]*>(.*?)</th>.*?>([^<>]*)</td></tr>", text)
    reasons = {unescape(run): unescape(why) for run, why in rows}
    assert set(reasons) == {EVIL_ID, "diverged-run", "torn", "run074"}
    assert reasons["diverged-run"] == "diverged: nan"
    assert "not readable as JSON" in reasons["torn"]
    assert reasons["run074"] == "no record yet: not begun"
    assert "Excluded: 4 of 76 runs. Counted, but in no fit of a curve: 0." in text
    assert "Without a loss, a size or a panel, and listed below: 3." in page
    hollow = re.findall(r'<g [^>]*class="point run k\d hollow"[^>]*>', page)
    (transform,) = re.findall(r'transform="translate\(([\d.]+) ([\d.]+)\)"', "".join(hollow))
    assert float(transform[1]) == pytest.approx(28.0)  # its loss of 50 is at the upper frame


def test_the_card_has_every_item_and_says_what_is_not_recorded(laptop, made):
    card = card_of(laptop)
    assert set(CARD) <= set(card)
    assert "done 144, diverged 0, failed 0" in card["Runs"]
    assert card["Learning-rate rule"] == "min(0.02, 0.4 / width); rates used: 0.00833 to 0.02"
    assert card["Batch rule"].startswith("4 sequences of 128 tokens a step")
    assert card["FLOP convention"].startswith("budgets are met by matmul (docs/flops.md); ")
    assert card["Contamination"] == "not checked"
    assert card["Corpus"] == "5.19M training tokens (tokens over epochs)"
    assert card["Unique training tokens"] == "57.9k to 1.18M"  # less than an epoch each
    assert card["Code (git commit)"] == "ed28ee9975684b7699cdd08b5897a2260bb7475a"
    assert card["Command that writes this page"] == f"peer-analyze report {LAPTOP}"
    assert "dense: leave-one-budget-out error 4.34 %" in card["Leaving out one budget: L(N, D)"]
    other = card_of(made[1])
    assert list(other) == list(card)
    assert other["Runs"].startswith("planned 75, done 72, diverged 1, failed 0")
    for name in ("Schedule", "Tokeniser", "Environment: packages", "Code (git commit)"):
        assert other[name] == "not recorded"


def test_the_hash_is_what_sha256sum_says(made):
    folder, page = made
    listed = (
        "find . -name record.json -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    )
    found = subprocess.run(
        listed, shell=True, cwd=folder, capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[0] in card_of(page)["sha256 of the record set"]
    assert "for 75 records" in card_of(page)["sha256 of the record set"]


def test_equal_runs_give_equal_bytes(made, tmp_path, monkeypatch):
    folder, page = made
    assert write_page(monkeypatch, folder, tmp_path / "deep" / "again.html") == page


def test_500_runs_stay_below_5_MB_and_a_claim_that_holds_is_on_top(tmp_path, monkeypatch):
    frame, tried = study(seeds=12)
    assert len(frame) > 500
    write_csv(tried, tmp_path / "runs.csv")
    page = write_page(
        monkeypatch, tmp_path / "runs.csv", tmp_path / "report.html", "--study", "made"
    )
    assert page.count("data-run=") == len(frame)
    assert len(page.encode()) < 5e6
    assert "Shown: at equal FLOPs peer beats dense at 1e18, 4e18, 1.6e19; at equal" in page
    assert '<p class="answer shown">' in page
    assert page.count(">inside</td>") == 2 * 3 * 7
    card = card_of(page)
    assert card["Code (git commit)"] == "not recorded"
    assert card["sha256 of the record set"].endswith(": of the CSV file")


def test_one_variant_has_a_page_that_says_so(tmp_path, monkeypatch):
    frame, _ = study(seeds=1, variants=("alone",))
    write_csv(
        changed(frame, "loss", float("nan"), variant="alone", size="x4.0"), tmp_path / "r.csv"
    )
    page = write_page(monkeypatch, tmp_path / "r.csv", tmp_path / "report.html")
    Parsed(page)
    assert "Not shown: there is one variant, alone, and nothing to compare it with." in page
    assert "Excluded: 3 of 21 runs." in page
    assert card_of(page)["Leaving out one budget: L(N, D)"].startswith("not computed")


def test_a_run_that_the_others_contradict_is_ringed_and_listed(tmp_path, monkeypatch):
    frame, _ = study(seeds=3)
    far = frame.index[(frame["size"] == "x0.4") & (frame["seed"] == 2)][0]
    frame.loc[far, "loss"] += 0.5
    write_csv(frame, tmp_path / "runs.csv")
    page = write_page(monkeypatch, tmp_path / "runs.csv", tmp_path / "report.html")
    assert page.count('<circle class="ring"') == 1
    assert "Excluded: 0 of 126 runs. Counted, but in no fit of a curve: 1." in page
    row = page[page.rindex(f'">{frame.loc[far, "run_id"]}</th>') :]
    assert row[: row.index("</tr>")].endswith(
        "<td>in no fit: outlier: contradicted by the other sizes</td>"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "x"], "error: --baseline x: no such variant; choose one of dense"),
        (["--study", "x"], "no run of study x"),
        (["--out", LAPTOP], f"error: --out {LAPTOP}: "),
    ],
)
def test_what_a_user_got_wrong_is_one_line(options, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        write_page(monkeypatch, LAPTOP, tmp_path / "report.html", *options)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_markup_escapes_every_text():
    made = element(
        "a", "<b>&", element("i", "x"), class_="k", data_run='"<', hidden=True, href=None
    )
    assert made.markup == '<a class="k" data-run="&quot;&lt;" hidden>&lt;b&gt;&amp;<i>x</i></a>'
    assert prose("a `<b>` c").markup == "a <code>&lt;b&gt;</code> c"


def test_axes_have_round_ticks_within_them():
    axes = axes_over([2e4, 8e5], [3.0, 3.4])
    assert axes.ticks_x() == [2e4, 5e4, 1e5, 2e5, 5e5]
    assert axes.ticks_y() == [3.0, 3.1, 3.2, 3.3, 3.4]
    assert axes.x(1e9) == axes.x(1e12) == 440.0 - 58.0
    narrow = Axes(0.0, 1e-3, 3.0, 3.1)
    assert len(narrow.ticks_x()) <= 1
    assert len(Axes(0.0, 40.0, 3.0, 3.1).ticks_x()) <= 6
