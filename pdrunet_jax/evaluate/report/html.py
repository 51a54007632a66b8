"""HTML building blocks of a report. They escape all text, because names come from users' files."""

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from pdrunet_jax.evaluate.scores import format_score

Cell = str | float | None
"""Text, or a number shown with three decimals; None and NaN are n/a."""
Section = tuple[str, str, str]
"""Id, heading and HTML content."""

LONGEST_SIDE = 512  # largest width of an embedded picture, in pixels; limits the size of the page
_NO_PICTURE = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def render_page(
    title: str, subtitle: Iterable[str], numbers: Iterable[tuple[str, str]], sections: Iterable[Section]
) -> str:
    """A self-contained page: title, key `numbers` (value and description), sections, the script that sorts tables."""
    templates = resources.files("pdrunet_jax.evaluate.report").joinpath("templates")
    script = templates.joinpath("sort.js").read_text(encoding="utf-8")
    return Template(templates.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(" · ".join(part for part in subtitle if part)),
        figures="".join(
            f'<div class="figure"><b>{escape(number)}</b><span>{escape(what)}</span></div>' for number, what in numbers
        ),
        sections="\n".join(
            f'<section id="{name}"><h2>{escape(heading)}</h2>{content}</section>' for name, heading, content in sections
        ),
        script=script,
        # The policy allows this script alone, whatever a displayed name contains, and no request.
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def html_table(head: Sequence[str], rows: Iterable[Sequence[Cell]], words: int, *, sortable: bool = False) -> str:
    """A table whose first `words` columns are text and the others numbers.

    In a `sortable` one, the page's script sorts by any column, using the exact values of numbers.
    """

    def kind(column: int) -> str:
        return "" if column < words else ' class="number"'

    def cell(value: Cell, column: int) -> str:
        if isinstance(value, str):
            return f"<td{kind(column)}>{escape(value)}</td>"
        exact = f' data-value="{value:.6g}"' if sortable and value is not None and value == value else ""
        return f"<td{kind(column)}{exact}>{format_score(value)}</td>"

    names = (f'<th scope="col"{kind(column)}>{escape(name)}</th>' for column, name in enumerate(head))
    top = f"<thead><tr>{''.join(names)}</tr></thead>" if head else ""
    lines = (f"<tr>{''.join(cell(value, column) for column, value in enumerate(row))}</tr>" for row in rows)
    sorts = ' class="sortable"' if sortable else ""
    return f'<div class="wide"><table{sorts}>{top}<tbody>{"".join(lines)}</tbody></table></div>'


def settings(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of names and values in columns, one per group, with the group's name as caption."""

    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        if isinstance(value, dict):
            return ", ".join(f"{key} = {shown(item)}" for key, item in value.items()) or "none"
        return str(value)

    tables = []
    for caption, values in groups.items():
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        rows = (
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(shown(value))}</td></tr>'
            for key, value in values.items()
        )
        tables.append(f"<table>{title}<tbody>{''.join(rows)}</tbody></table>" if values else "")
    return f'<div class="sections">{"".join(tables)}</div>'


def note(text: str) -> str:
    """A paragraph in small type."""
    return f'<p class="quiet">{escape(text)}</p>'


def legend(title: str, colours: Iterable[tuple[str, tuple[int, int, int]]]) -> str:
    """A colour key."""
    keys = " ".join(
        f'<span class="key"><i style="background: rgb{colour}"></i>{escape(name)}</span>' for name, colour in colours
    )
    return f'<p class="quiet">{escape(title)}{keys}</p>'


def embedded(path: Path) -> str:
    """A picture as a data URL, recompressed as JPEG to keep the page small; a transparent pixel if it is missing."""
    file = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.thumbnail((LONGEST_SIDE, 2 * LONGEST_SIDE))  # slender pictures may be tall
            # No chroma subsampling, or thin coloured outlines would fade.
            picture.convert("RGB").save(file, "JPEG", quality=88, subsampling=0, optimize=True)
    except OSError:
        return _NO_PICTURE
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
