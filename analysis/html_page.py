"""The page of a study: one file that loads nothing, equal for equal runs."""

import base64
import hashlib
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from analysis.html_costs import costs_section
from analysis.html_curves import curves_section, look_styles
from analysis.html_evidence import evidence_section, excluded_section
from analysis.html_results import refusals, results_section
from analysis.html_table import NOT_RECORDED
from analysis.html_verdicts import answer, verdicts_section
from analysis.load import routed_name, usable
from analysis.markup import Html, element, joined, paragraph, prose, section
from analysis.report_card import card
from analysis.schema import UNNAMED
from analysis.study_report import StudyReport

PACKAGES = ("peer-scaling", "numpy", "pandas", "scipy")
"""That the numbers of the page depend on."""
PARTS = (
    ("verdicts", "Verdicts"),
    ("curves", "Curves"),
    ("results", "Tables"),
    ("costs", "Costs"),
    ("evidence", "Learning rates and seeds"),
    ("excluded", "Excluded runs"),
    ("card", "Reproducibility card"),
    ("again", "How to regenerate"),
)


def page(report: StudyReport) -> str:
    """The whole of it, as HTML."""
    style = (files("analysis") / "web" / "page.css").read_text(encoding="utf-8") + look_styles()
    script = (files("analysis") / "web" / "page.js").read_text(encoding="utf-8")
    title = f"isoFLOP study {report.study.name}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )
    tip = element("div", id="tip", role="status", hidden=True)
    body = element("body", _main(report, title), tip, element("script", Html(script)))
    return f"<!doctype html>\n{element('html', head, body, lang='en').markup}\n"


def _policy(script: str) -> str:
    """Nothing is loaded, and no script runs but this one (W3C, Content Security Policy 3)."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _main(report: StudyReport, title: str) -> Html:
    parts = [
        element("header", element("h1", title), answer(report), _about(report), _contents()),
        verdicts_section(report),
        curves_section(report, refusals(report)),
        results_section(report),
        costs_section(report),
        evidence_section(report),
        excluded_section(report),
        _card(report),
        _again(report),
    ]
    return element("main", joined(parts, "\n"))


def _about(report: StudyReport) -> Html:
    rows = usable(report.frame)
    names = ", ".join(routed_name(variant, report.frame) for variant in report.fit.variants)
    text = (
        f"{len(rows)} of {len(report.frame)} runs are used: {names} at "
        f"{len(report.fit.budgets)} budgets, {rows['seed'].nunique()} seeds."
    )
    return paragraph(text, "quiet")


def _contents() -> Html:
    links = [element("li", element("a", title, href=f"#{name}")) for name, title in PARTS]
    return element("nav", element("ul", *links), aria_label="Contents")


def _card(report: StudyReport) -> Html:
    items = [e for what, known in card(report) for e in _item(what, known)]
    return section("card", "Reproducibility card", element("dl", *items))


def _item(what: str, known: str) -> tuple[Html, Html]:
    return element("dt", what), element("dd", prose(known))


def _again(report: StudyReport) -> Html:
    study = report.study.name
    known = [f"{name} {_version(name)}" for name in PACKAGES]
    parts = [
        paragraph(f"This page: `{report.command}`, with {', '.join(known)}."),
        paragraph("The same runs and versions give the same page, byte for byte."),
    ]
    if study != UNNAMED and report.records.used:
        parts.append(
            paragraph(f"The runs: `peer-train --config-name {study}`; what is done stays.")
        )
    return section("again", "How to regenerate", *parts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_RECORDED
