"""Pieces of HTML that every section of a report is made of. All text is escaped here: names are another's input."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

Cell = str | float | None
"""Text as it is, or a number with three decimals; None and NaN are n/a."""

LONGEST_SIDE = 512
"""Pixels of an embedded picture: more would make the page of a large radiograph heavy."""

_NO_PICTURE = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def html_table(head: Sequence[str], rows: Iterable[Sequence[Cell]], text: int, *, sortable: bool = False) -> str:
    """A table whose first `text` columns hold words and the others numbers.

    Of a `sortable` one, which the page's script brings into the order of any column, numbers keep their digits for it.
    """

    def kind(column: int) -> str:
        return "" if column < text else ' class="number"'

    def cell(value: Cell, column: int) -> str:
        if isinstance(value, str):
            return f"<td{kind(column)}>{escape(value)}</td>"
        exact = f' data-value="{value:.6g}"' if sortable and value is not None and value == value else ""
        return f"<td{kind(column)}{exact}>{score(value)}</td>"

    names = (f'<th scope="col"{kind(column)}>{escape(name)}</th>' for column, name in enumerate(head))
    top = f"<thead><tr>{''.join(names)}</tr></thead>" if head else ""
    lines = (f"<tr>{''.join(cell(value, column) for column, value in enumerate(row))}</tr>" for row in rows)
    sorts = ' class="sortable"' if sortable else ""
    return f'<div class="wide"><table{sorts}>{top}<tbody>{"".join(lines)}</tbody></table></div>'


def pairs(values: Mapping[str, Any], caption: str = "") -> str:
    """Names and values, a row each."""

    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        if isinstance(value, dict):
            return ", ".join(f"{key} = {shown(item)}" for key, item in value.items()) or "none"
        return str(value)

    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(shown(value))}</td></tr>' for key, value in values.items()
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<tbody>{rows}</tbody></table>"


def figures(numbers: Iterable[tuple[str, str]]) -> str:
    """The few numbers at the top, each with what it is."""
    return "".join(
        f'<div class="figure"><b>{escape(number)}</b><span>{escape(what)}</span></div>' for number, what in numbers
    )


def note(text: str) -> str:
    """A quiet paragraph."""
    return f'<p class="quiet">{escape(text)}</p>'


def legend(colours: Iterable[tuple[str, tuple[int, int, int]]]) -> str:
    """What each colour means."""
    return " ".join(
        f'<span class="key"><i style="background: rgb{colour}"></i>{escape(name)}</span>' for name, colour in colours
    )


def score(value: float | None) -> str:
    """A number with three decimals."""
    return "n/a" if value is None or value != value else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference with three decimals."""
    return "n/a" if value is None or value != value else f"{value:+.3f}"


def bounds(statistic: Mapping[str, Any]) -> str:
    """The interval of a statistic in summary.json."""
    return f"{score(statistic['low'])} to {score(statistic['high'])}"


def embedded(path: Path) -> str:
    """The picture as a data URL, as JPEG, of which a page holds many; a transparent pixel where the file is gone."""
    file = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            # At full resolution of colour, or thin coloured outlines would fade.
            picture.convert("RGB").save(file, "JPEG", quality=88, subsampling=0, optimize=True)
    except (OSError, UnidentifiedImageError):
        return _NO_PICTURE
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
