"""Tables of the page, which its script sorts by any column."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.markup import Content, Html, element, joined

NOT_RECORDED = "not recorded"
LEADING_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")

LONG = 60
"""Characters of a cell that may be broken over lines."""


@dataclass(frozen=True)
class Cell:
    """A cell that is sorted by a number, or by its text where there is none."""

    content: Content
    value: float | None = None


def number(value: float, form: str = "{:.4g}", missing: str = NOT_RECORDED) -> Cell:
    """A number; `missing` for NaN."""
    if not np.isfinite(value):
        return Cell(missing)
    return Cell(form.format(value), float(value))


def written(text: str) -> Cell:
    """A text, sorted by the number that it begins with, if it does."""
    found = LEADING_NUMBER.match(text)
    return Cell(text, float(found[0]) if found else None)


def table(header: Sequence[str], rows: Sequence[Sequence[Cell | str]], caption: str = "") -> Html:
    """A table; its first column names the row. Without rows: a paragraph that says so."""
    if not rows:
        return element("p", f"{caption}: none." if caption else "None.", class_="none")
    numeric = [any(_is_number(row[i]) for row in rows) for i in range(len(header))]
    names_row = [i == 0 for i in range(len(header))]
    head = element("tr", *map(_head, header, numeric))
    body = [element("tr", *map(_cell, row, numeric, names_row)) for row in rows]
    parts = [element("caption", caption)] if caption else []
    parts += [element("thead", head), element("tbody", joined(body, "\n"))]
    inner = element("table", *parts, class_="sortable")
    # Focusable, so that what is wider than the screen can be scrolled to by keyboard.
    return element(
        "div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption or header[0]
    )


def _is_number(cell: Cell | str) -> bool:
    return isinstance(cell, Cell) and cell.value is not None


def _head(title: str, numeric: bool) -> Html:
    # No <button>: Chromium does not print it again at the top of the next page.
    label = element("span", title, role="button", tabindex=0)
    return element("th", label, scope="col", aria_sort="none", class_="n" if numeric else None)


def _cell(cell: Cell | str, numeric: bool, names_row: bool) -> Html:
    cell = cell if isinstance(cell, Cell) else Cell(cell)
    value = None if cell.value is None else repr(float(cell.value))
    long = isinstance(cell.content, str) and len(cell.content) > LONG
    class_ = "long" if long else "n" if numeric else None
    if names_row:
        return element("th", cell.content, scope="row", data_v=value, class_=class_)
    return element("td", cell.content, data_v=value, class_=class_)


def frame_table(frame: pd.DataFrame, caption: str = "") -> Html:
    """A frame of texts with its index."""
    header = [str(frame.index.name or ""), *map(str, frame.columns)]
    values = zip(frame.index, frame.to_numpy(), strict=True)
    rows = [[str(name), *(written(str(text)) for text in row)] for name, row in values]
    return table(header, rows, caption)
