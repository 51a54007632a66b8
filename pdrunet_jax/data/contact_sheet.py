"""Contact sheet of a dataset: masks over their images, to see at a glance whether they line up."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from pdrunet_jax.data.dataset import Dataset, Inspection
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.layers import read_truth
from pdrunet_jax.data.lettering import write
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.data.overlay import GROUND, TEXT, colour_of, panels, png
from pdrunet_jax.data.scan import class_shares, foreground_share
from pdrunet_jax.data.split import Sample
from pdrunet_jax.runtime.files import atomic_write, writing

SHEET_COLUMNS = 4
SIDE = 180
"""Longest side of an image on the sheet, in pixels."""

_GAP, _LINE = 6, 18

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ background: #121212; color: #e1e1e1; font: 15px/1.5 sans-serif; margin: 2em; }}
pre {{ font-size: 14px; white-space: pre-wrap; }} img {{ max-width: 100%; }}
main {{ display: flex; flex-wrap: wrap; gap: 1em; align-items: start; }}
figure {{ margin: 0; width: 360px; max-width: 100%; overflow-wrap: anywhere; }}
b {{ display: inline-block; width: .8em; height: .8em; margin: 0 .4em 0 1em; }}</style>
<h1>{title}</h1>
<pre>{report}</pre>
<p>{legend}</p>
<main>
{figures}
</main>
</html>
"""
_FIGURE = """<figure><img alt="image next to a copy with its mask" src="data:image/png;base64,{picture}">
<figcaption>{name}<br>{words}</figcaption></figure>"""


class Cell(NamedTuple):
    """A picture on the sheet: an image without and with its mask."""

    picture: Image.Image
    name: str
    words: str
    """Its split and the shares of its classes."""


def write_check(folder: Path, inspection: Inspection, lines: Sequence[str], most: int) -> Path:
    """Write contact_sheet.png with at most `most` images, and check.html with the report's `lines` and the sheet.

    Returns the page's path. Raises `RunError` if the folder cannot be written.
    """
    dataset = inspection.dataset
    picture, page = folder / "contact_sheet.png", folder / "check.html"
    cells = choose_cells(inspection, most)
    sheet = png(contact_sheet(cells))
    classes = [*enumerate(dataset.class_names, start=1), *([(IGNORE, "ignored")] if dataset.coding.ignore else [])]
    text = _PAGE.format(
        title=html.escape(dataset.name),
        report=html.escape("\n".join(lines)),
        legend="".join(f'<b style="background: rgb{colour_of(i)}"></b>{html.escape(name)}' for i, name in classes),
        figures="\n".join(map(_figure, cells)),
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(picture, sheet)
        atomic_write(page, text)
    return page


def choose_cells(inspection: Inspection, most: int) -> list[Cell]:
    """Draw at most `most` images, each next to a copy with its mask, ordered by their share of foreground.

    The choice is even along that order and includes the emptiest and the fullest mask.
    """
    dataset = inspection.dataset
    shares = [foreground_share(item.codes, dataset.coding) for item in inspection.scanned]
    order = sorted(range(len(shares)), key=lambda index: (shares[index], index))
    chosen = [order[round(place)] for place in np.linspace(0, len(order) - 1, min(most, len(order)))]
    return [
        _cell(number, dataset, dataset.samples[index], inspection.scanned[index].codes)
        for number, index in enumerate(chosen, start=1)
    ]


def contact_sheet(cells: Sequence[Cell]) -> Image.Image:
    """Arrange the cells in rows, with two lines below each."""
    columns = min(SHEET_COLUMNS, len(cells))
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    heights = [max(cell.picture.height for cell in row) + 2 * _LINE + _GAP for row in rows]
    width = 2 * SIDE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, sum(heights) + _GAP), GROUND)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for place, cell in enumerate(row):
            left = _GAP + place * width
            sheet.paste(cell.picture, (left, top))
            for line, text in enumerate((cell.name, cell.words)):
                write(draw, (left, top + cell.picture.height + 2 + line * _LINE), text, 12, 2 * SIDE, TEXT)
        top += height
    return sheet


def _cell(number: int, dataset: Dataset, sample: Sample, codes: dict[int, int]) -> Cell:
    """A cell named by its number, which finds it on the page, and the image's path."""
    image, mask = read_image(sample.image), read_truth(sample, dataset.coding)
    bare, drawn = panels(image, mask, mask, SIDE)[:2]
    below = bare.width > SIDE  # a slender image that lies
    picture = Image.new("RGB", (2 * SIDE, bare.height * 2 if below else max(SIDE, bare.height)), GROUND)
    picture.paste(bare, (0, 0))
    picture.paste(drawn, (0, bare.height) if below else (SIDE, 0))
    shares = zip(dataset.class_names, class_shares(codes, dataset.coding)[1:], strict=True)
    found = ", ".join(f"{name} {share:.1%}" for name, share in shares if share)
    return Cell(picture, f"{number}  {sample.id}", f"{sample.split}: {found or 'empty'}")


def _figure(cell: Cell) -> str:
    picture = base64.b64encode(png(cell.picture)).decode()
    return _FIGURE.format(picture=picture, name=html.escape(cell.name), words=html.escape(cell.words))
