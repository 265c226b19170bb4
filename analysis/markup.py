"""HTML and SVG in which every text is escaped, because only `Html` is taken as markup."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

CODE = re.compile(r"`([^`]+)`")
VOID = frozenset({"meta", "use", "circle", "path", "line", "polyline"})
"""Elements that are written without an end tag; those of SVG close themselves."""


@dataclass(frozen=True)
class Html:
    """Markup that may stand in the page as it is."""

    markup: str


Content = Html | str
"""A `str` is a text from anywhere: it is escaped."""


def element(tag: str, *children: Content, **attributes: object) -> Html:
    """An element; an attribute `class_` is `class`, `data_run` is `data-run`; None and False are
    left out, True has no value.
    """
    opened = " ".join([tag, *_attributes(attributes)])
    if tag in VOID:
        return Html(f"<{opened}/>")
    return Html(f"<{opened}>{joined(children).markup}</{tag}>")


def _attributes(attributes: dict[str, object]) -> Iterable[str]:
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            yield name
        elif value is not None and value is not False:
            yield f'{name}="{escape(str(value))}"'


def joined(parts: Iterable[Content], between: str = "") -> Html:
    """One after the other."""
    return Html(between.join(p.markup if isinstance(p, Html) else escape(p) for p in parts))


def prose(text: str) -> Html:
    """A text in which `...` is code."""
    pieces = CODE.split(text)
    return joined(element("code", p) if i % 2 else p for i, p in enumerate(pieces))


def paragraph(text: Content, class_: str | None = None) -> Html:
    """A paragraph; a text may hold `code`."""
    return element("p", prose(text) if isinstance(text, str) else text, class_=class_)


def bullets(lines: Sequence[str]) -> Html:
    """A list; texts may hold `code`."""
    return element("ul", *(element("li", prose(line)) for line in lines))


def section(name: str, title: str, *parts: Content) -> Html:
    """A part of the page with a heading that can be linked to."""
    return element("section", element("h2", title), *parts, id=name)


def folded(summary: Content, *parts: Content, open_: bool = False) -> Html:
    """What a reader may unfold; print has it unfolded."""
    return element("details", element("summary", summary), *parts, open_=open_)
