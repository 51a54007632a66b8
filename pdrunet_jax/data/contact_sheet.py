"""Contact sheet of a dataset: masks over their images, to see at a glance whether they line up."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pdrunet_jax.data.dataset import Dataset, Inspection
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.masks import IGNORE, read_mask
from pdrunet_jax.data.overlay import GROUND, TEXT, colour_of, fitted, panels, png
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
b {{ display: inline-block; width: .8em; height: .8em; margin: 0 .4em 0 1em; }}</style>
<h1>{title}</h1>
<pre>{report}</pre>
<p>{legend}</p>
<img alt="images, each next to a copy with its mask" src="data:image/png;base64,{picture}">
</html>
"""


def write_check(folder: Path, inspection: Inspection, lines: Sequence[str], most: int) -> Path:
    """Write contact_sheet.png with at most `most` images, and check.html with the report's `lines` and the sheet.

    Returns the page's path. Raises `RunError` if the folder cannot be written.
    """
    dataset = inspection.dataset
    picture, page = folder / "contact_sheet.png", folder / "check.html"
    sheet = png(contact_sheet(inspection, most))
    classes = [*enumerate(dataset.class_names, start=1), *([(IGNORE, "ignored")] if dataset.coding.ignore else [])]
    text = _PAGE.format(
        title=html.escape(dataset.name),
        report=html.escape("\n".join(lines)),
        legend="".join(f'<b style="background: rgb{colour_of(i)}"></b>{html.escape(name)}' for i, name in classes),
        picture=base64.b64encode(sheet).decode(),
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(picture, sheet)
        atomic_write(page, text)
    return page


def contact_sheet(inspection: Inspection, most: int) -> Image.Image:
    """Draw at most `most` images, each next to a copy with its mask, ordered by their share of foreground.

    The choice is even along that order and includes the emptiest and the fullest mask.
    """
    dataset = inspection.dataset
    shares = [foreground_share(item.codes, dataset.coding) for item in inspection.scanned]
    order = sorted(range(len(shares)), key=lambda index: (shares[index], index))
    count = min(most, len(order))
    chosen = [order[round(place)] for place in np.linspace(0, len(order) - 1, count)]
    cells = [_cell(dataset, dataset.samples[index], inspection.scanned[index].codes) for index in chosen]
    columns = min(SHEET_COLUMNS, count)
    width, height = 2 * SIDE + _GAP, SIDE + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, -(-count // columns) * height + _GAP), GROUND)
    for place, cell in enumerate(cells):
        sheet.paste(cell, (_GAP + place % columns * width, _GAP + place // columns * height))
    return sheet


def _cell(dataset: Dataset, sample: Sample, codes: dict[int, int]) -> Image.Image:
    """The image without and with its mask, and two lines: its name; its split and class shares."""
    cell = Image.new("RGB", (2 * SIDE, SIDE + 2 * _LINE), GROUND)
    image, mask = read_image(sample.image), read_mask(sample.mask, dataset.coding)
    for place, panel in enumerate(panels(image, mask, mask, SIDE)[:2]):
        cell.paste(panel, (place * SIDE, 0))
    shares = zip(dataset.class_names, class_shares(codes, dataset.coding)[1:], strict=True)
    found = ", ".join(f"{name} {share:.1%}" for name, share in shares if share)
    words = f"{sample.split}: {found or 'empty'}"
    draw = ImageDraw.Draw(cell)
    font = ImageFont.load_default(12)
    for line, text in enumerate((sample.id, words)):
        draw.text((0, SIDE + 2 + line * _LINE), fitted(text, 2 * SIDE, font), TEXT, font)
    return cell
