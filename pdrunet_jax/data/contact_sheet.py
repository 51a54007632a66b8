"""Masks drawn over their images, many on one page, so that a person sees in one look whether they line up."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pdrunet_jax.data import overlay as pictures
from pdrunet_jax.data.dataset import Dataset, Inspection
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.masks import read_mask
from pdrunet_jax.data.scan import class_shares, foreground_share
from pdrunet_jax.data.split import Sample
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, writing

SHEET_COLUMNS = 4
SIDE = 180
"""Pixels of the longest side of an image on the sheet."""

_GAP, _LINE = 6, 18
_CHARACTERS = 2 * SIDE // 7
"""That fit a line below an image."""
_GROUND, _TEXT = (18, 18, 18), (225, 225, 225)

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ background: #121212; color: #e1e1e1; font: 15px/1.5 sans-serif; margin: 2em; }}
pre {{ font-size: 14px; white-space: pre-wrap; }} img {{ max-width: 100%; }}
b {{ display: inline-block; width: .8em; height: .8em; margin: 0 .4em 0 1em; }}</style>
<h1>{title}</h1>
<pre>{report}</pre>
<p>{legend}</p>
<img alt="images, each beside itself with its mask" src="data:image/png;base64,{picture}">
</html>
"""


def write_check(folder: Path, inspection: Inspection, lines: Sequence[str], most: int) -> Path:
    """Write contact_sheet.png with at most `most` images, and check.html, which holds it below the report's `lines`.

    Returns the page's path. Raises `RunError` if the folder cannot be written.
    """
    dataset = inspection.dataset
    picture, page = folder / "contact_sheet.png", folder / "check.html"
    sheet = _png(contact_sheet(inspection, most))
    text = _PAGE.format(
        title=html.escape(dataset.name),
        report=html.escape("\n".join(lines)),
        legend="".join(
            f'<b style="background: rgb{colour}"></b>{html.escape(name)}' for name, colour in _legend(dataset)
        ),
        picture=base64.b64encode(sheet).decode(),
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(picture, sheet)
        atomic_write(page, text)
    return page


def contact_sheet(inspection: Inspection, most: int) -> Image.Image:
    """At most `most` images, each beside itself with its mask, in the order of their share of foreground.

    They are chosen evenly along that share, so that the emptiest and the fullest mask are among them.
    """
    dataset = inspection.dataset
    shares = [foreground_share(item.codes, dataset.coding) for item in inspection.scanned]
    order = sorted(range(len(shares)), key=lambda index: (shares[index], index))
    count = min(most, len(order))
    chosen = [order[round(place)] for place in np.linspace(0, len(order) - 1, count)]
    cells = [_cell(dataset, dataset.samples[index], inspection.scanned[index].codes) for index in chosen]
    columns = min(SHEET_COLUMNS, count)
    width, height = 2 * SIDE + _GAP, SIDE + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, -(-count // columns) * height + _GAP), _GROUND)
    for place, cell in enumerate(cells):
        sheet.paste(cell, (_GAP + place % columns * width, _GAP + place // columns * height))
    return sheet


def _cell(dataset: Dataset, sample: Sample, codes: dict[int, int]) -> Image.Image:
    """The image, the same with its mask, and two lines: its name, and split and shares of the classes."""
    cell = Image.new("RGB", (2 * SIDE, SIDE + 2 * _LINE), _GROUND)
    if sample.mask is None:
        raise UserError(f"{sample.id} has no mask")
    image, mask = read_image(sample.image), read_mask(sample.mask, dataset.coding)
    for place, panel in enumerate(pictures.panels(image, mask, mask, SIDE)[:2]):
        cell.paste(panel, (place * SIDE, 0))
    shares = zip(dataset.class_names, class_shares(codes, dataset.coding)[1:], strict=True)
    found = ", ".join(f"{name} {share:.1%}" for name, share in shares if share)
    words = f"{sample.split}: {found or 'empty'}"
    draw = ImageDraw.Draw(cell)
    font = ImageFont.load_default(12)
    for line, text in enumerate((sample.id, words)):
        draw.text((0, SIDE + 2 + line * _LINE), _shortened(text), _TEXT, font)
    return cell


def _shortened(text: str) -> str:
    """The end of a path says most."""
    return text if len(text) <= _CHARACTERS else f"...{text[3 - _CHARACTERS :]}"


def _legend(dataset: Dataset) -> list[tuple[str, tuple[int, int, int]]]:
    named = [(name, pictures.colour_of(index)) for index, name in enumerate(dataset.class_names, start=1)]
    return [*named, ("ignored", pictures.IGNORED)] if dataset.coding.ignore else named


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
