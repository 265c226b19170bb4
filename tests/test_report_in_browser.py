"""The page of a study in a real browser: it renders, answers the pointer and the keyboard, prints."""

import os
import shutil
import unicodedata
from io import BytesIO

import pytest

from reported import EVIL_ID, write_page, write_study

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright"
)
pypdf = pytest.importorskip("pypdf", reason="no pypdf: pip install pypdf")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the path: scripts/install_chromium.sh"
)
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("made"))
    path = folder / "analysis" / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        write_page(patch, folder, path)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    # A sandbox of its own needs a user other than root, and /dev/shm more than a container has.
    flags = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page; after the test, nothing was said on the console, thrown or loaded."""
    contexts, problems, requests = [], [], []

    def opened(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []
    assert requests == [address] * len(contexts)


def point(page, run):
    return page.locator(f'.point[data-run="{run}"]')


def point_at(page, run):
    """Moves the pointer to the middle of a point, whatever lies on it."""
    own = point(page, run)
    own.scroll_into_view_if_needed()
    box = own.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def shown(page):
    return page.locator("#tip").inner_text() if page.locator("#tip").is_visible() else None


def test_it_renders_and_nothing_of_a_record_is_run(open_page):
    page = open_page()
    assert page.title() == "isoFLOP study made"
    assert page.locator(".panel").count() == 3
    assert page.locator(".point.run").count() == 73
    assert (
        page.get_by_role("cell", name=EVIL_ID)
        .or_(page.get_by_role("rowheader", name=EVIL_ID))
        .count()
        == 1
    )
    for panel in page.locator(".panel").all():
        box = panel.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 190


def test_the_pointer_shows_the_run_behind_a_point(open_page):
    page = open_page()
    run = "peer-1e+12-0.25-0"
    assert shown(page) is None
    point_at(page, run)
    lines = shown(page).splitlines()
    assert lines[0] == run
    assert lines[1] == "peer, size x0.25, seed 0, 1e12 FLOPs"
    assert "parameters: 25k total, 25k active" in lines
    assert "learning rate: 0.01" in lines
    assert lines[-2].startswith("folder: run")
    assert lines[-1] == "also here: peer-1e+12-0.25-1"  # its other seed, half a pixel off
    page.mouse.move(1, 1)
    assert shown(page) is None
    point_at(page, EVIL_ID)
    assert shown(page).splitlines()[0] == EVIL_ID
    assert "excluded: invalid" in shown(page)


def test_the_keyboard_goes_from_point_to_point(open_page):
    page = open_page()
    panel = page.locator(".panel").nth(1)
    runs = [own.get_attribute("data-run") for own in panel.locator(".point.run").all()]
    panel.locator('.point[tabindex="0"]').focus()
    assert shown(page).startswith(f"{runs[0]}\n")
    page.keyboard.press("ArrowRight")
    assert shown(page).startswith(f"{runs[1]}\n")
    page.keyboard.press("End")
    assert shown(page).startswith("minimum of peer at 4e12 FLOPs\n")
    page.keyboard.press("Tab")
    assert page.locator(".panel").nth(2).locator(":focus").count() == 1
    page.keyboard.press("Escape")
    assert shown(page) is None


def column(table, index):
    cells = table.locator(f"tbody tr > :nth-child({index + 1})").all()
    return [(cell.get_attribute("data-v"), cell.inner_text()) for cell in cells]


@pytest.mark.parametrize("press", [lambda head: head.click(), lambda head: head.press("Enter")])
def test_tables_are_sorted_by_number(open_page, press):
    page = open_page()
    table = page.locator("#results table").first
    heads = table.locator("thead th")
    index = [own.inner_text() for own in heads.all()].index("budget")
    head = heads.nth(index)
    before = [float(value) for value, _ in column(table, index)]
    press(head.get_by_role("button"))
    assert head.get_attribute("aria-sort") == "ascending"
    after = column(table, index)
    assert [float(value) for value, _ in after] == sorted(before)
    labels = [label for _, label in after]
    assert labels != sorted(labels)  # as texts, 1.6e13 comes before 4e12
    press(head.get_by_role("button"))
    assert head.get_attribute("aria-sort") == "descending"
    falling = [float(value) for value, _ in column(table, index)]
    assert falling == sorted(before, reverse=True) != before
    states = [own.get_attribute("aria-sort") for own in heads.all()]
    assert states.count("none") == heads.count() - 1


def test_a_phone_scrolls_downwards_alone(open_page):
    page = open_page(**PHONE)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > 360).length"
    )
    assert wide > 0
    point(page, "peer-1e+12-0.25-0").tap(force=True)
    assert shown(page).startswith("peer-1e+12-0.25-0\n")
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def test_a_dark_screen_gets_a_dark_page(open_page):
    found = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        script = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        found[scheme] = max(page.evaluate(script)[:3])
    assert found["dark"] < 60 < 200 < found["light"]


def test_its_print_is_whole(open_page):
    page = open_page(color_scheme="dark")
    reader = pypdf.PdfReader(BytesIO(page.pdf(prefer_css_page_size=True)))
    assert len(reader.pages) > 3
    texts = [own.extract_text() for own in reader.pages]
    assert "Verdicts" in texts[0]
    assert "How to regenerate" in texts[-1]
    everything = "".join(unicodedata.normalize("NFKC", "".join(texts)).split())  # fl is one letter
    for folded in ("flops_6n_total", "settingstriedbeyondthefirstofacell", "moresharedseed"):
        assert folded in everything
    assert "sha256oftherecordset" in everything


def test_a_table_that_goes_on_has_its_headers_on_every_page(open_page):
    page = open_page()
    page.evaluate(
        """() => {
            const body = document.querySelector("#verdicts tbody");
            for (let i = 0; i < 60; i += 1) body.append(body.rows[0].cloneNode(true));
        }"""
    )
    reader = pypdf.PdfReader(BytesIO(page.pdf(prefer_css_page_size=True)))
    texts = [unicodedata.normalize("NFKC", own.extract_text()) for own in reader.pages[:3]]
    rows = [text.count("peer - dense") for text in texts]
    heads = [text.count("missing at equal FLOPs") for text in texts]
    assert sum(rows) == 63
    assert sum(count > 0 for count in rows) > 1
    assert heads == [int(count > 0) for count in rows]
