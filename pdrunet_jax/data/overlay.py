"""Draw masks over images with NumPy and Pillow, in colours that colour-blind readers can tell apart."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pdrunet_jax.data.layers import region, to_bits
from pdrunet_jax.data.lettering import write
from pdrunet_jax.data.masks import IGNORE, resize_mask
from pdrunet_jax.runtime.files import atomic_write

COLOURS = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (0, 114, 178), (213, 94, 0))
"""Colours of class 1, 2, ...: the palette of Okabe and Ito, ordered for contrast on grey; it repeats after seven."""
MISSED, EXTRA, CONFUSED = (230, 159, 0), (86, 180, 233), (204, 121, 167)
"""False negatives: orange; false positives: blue; a foreground class predicted as another: pink."""
IGNORED = (120, 120, 120)
"""Ignored pixels: grey."""

PANELS = ("image", "truth", "prediction", "difference")
LEGEND = (("missed", MISSED), ("extra", EXTRA), ("wrong class", CONFUSED))

GROUND = (18, 18, 18)
TEXT = (225, 225, 225)
"""Colours of a sheet and its lettering."""
_GAP, _LINE = 6, 22
_TALL, _WIDE = 4, 2
"""Longest side of a slender picture, in multiples of the usual longest side."""
_SIDE = 256
_LEAST = 84
"""Longest side of a panel on a sheet, and width of the narrowest column, which has its name above it."""


def grey_or_rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert (H, W, C) or (H, W) pixels in [0, 255] to (H, W, 3) uint8: grey for one channel, else the first three."""
    image = pixels[..., None] if pixels.ndim == 2 else pixels
    image = np.clip(np.round(image.astype(np.float32)), 0, 255).astype(np.uint8)
    return np.repeat(image[..., :1], 3, axis=-1) if image.shape[-1] < 3 else np.ascontiguousarray(image[..., :3])


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tint and outline every class in its colour; returns (H, W, 3) uint8.

    `pixels` is (H, W, C) or (H, W) in [0, 255]; `mask` holds (H, W) class indices, or (H, W, K) layers, whose colours
    blend where they overlap. Ignored pixels are grey.
    """
    picture = grey_or_rgb(pixels).astype(np.float32)
    # An outline of one pixel is lost when a large radiograph is scaled to a screen.
    width = max(1, round(min(mask.shape[:2]) / 300))
    parts = (
        [(int(index), mask == index) for index in np.unique(mask) if index]
        if mask.ndim == 2
        else [
            *((index, region(mask, index)) for index in range(1, mask.shape[-1] + 1)),
            (IGNORE, (mask == IGNORE).any(axis=-1)),
        ]
    )
    for index, inside in parts:
        colour = np.array(colour_of(index), np.float32)
        picture[inside] += 0.3 * (colour - picture[inside])
        picture[outline(inside, width)] = colour
    return np.round(picture).astype(np.uint8)


def write_lines(picture: Image.Image, lines: Sequence[tuple[str, tuple[int, int, int]]]) -> None:
    """Write lines of text, each with its colour, on a dark ground into the upper left corner of an RGB picture."""
    draw, size = ImageDraw.Draw(picture), max(9, min(picture.size) // 24)
    edge, line = size // 3, round(1.4 * size)
    for number, (text, colour) in enumerate(lines):
        place, most = (edge, number * line + edge // 2), picture.width - 2 * edge
        wide = write(draw, place, text, size, most, colour)
        draw.rectangle((0, number * line, wide + 2 * edge, (number + 1) * line), GROUND)
        write(draw, place, text, size, most, colour)


def difference(pixels: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Draw errors over the dimmed image: missed orange, extra blue, wrong class pink, ignored grey.

    Arguments and result as in `overlay`. Regions on which both agree get a thin white outline. Where classes overlap, a
    pixel is missed or extra if it is for any class, and of a wrong class if it is both.
    """
    picture = grey_or_rgb(pixels).astype(np.float32) * 0.6
    each = truth != IGNORE
    differs = each & (truth != prediction)
    found = [each & (truth > 0), differs & (truth > 0), differs & (prediction > 0)]
    if truth.ndim == 3:
        each, *found = (layers.any(axis=-1) for layers in (each, *found))
    present, missed, extra = found
    for part, colour in ((missed & ~extra, MISSED), (extra & ~missed, EXTRA), (missed & extra, CONFUSED)):
        picture[part] = 0.15 * picture[part] + 0.85 * np.array(colour, np.float32)
    picture[~each] = 0.5 * picture[~each] + 0.5 * np.array(IGNORED, np.float32)
    agreed = outline(present & ~missed & ~extra, 1)
    picture[agreed] = 0.4 * picture[agreed] + 0.6 * 255
    return np.round(picture).astype(np.uint8)


def panels(pixels: np.ndarray, truth: np.ndarray, prediction: np.ndarray, side: int = _SIDE) -> list[Image.Image]:
    """Draw the four `PANELS` of one case, with a longest side of `side` pixels; slender images are larger.

    Image and masks (by nearest neighbour) are scaled before drawing, so that outlines keep their width.
    """
    height, width = truth.shape[:2]
    # The short side gets at least `side` / 2.5, unless the long one would be too long for a sheet.
    most = side * (_TALL if height > width else _WIDE)
    scale = max(side / max(height, width), min(side / 2.5 / min(height, width), most / max(height, width)))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = np.asarray(Image.fromarray(grey_or_rgb(pixels)).resize(size, Image.Resampling.BILINEAR))
    true, predicted = (resize_mask(mask.astype(np.uint8), size[::-1]) for mask in (truth, prediction))
    drawn = (image, overlay(image, true), overlay(image, predicted), difference(image, true, predicted))
    return [Image.fromarray(picture) for picture in drawn]


def sample_sheet(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    captions: Sequence[str],
) -> Image.Image:
    """Draw cases (image, truth, prediction, difference) below each other, slender ones side by side, and a legend.

    Args:
        images: (H, W, C) or (H, W) in [0, 255], each of any size.
        truths: (H, W) class indices, of the image's size.
        predictions: (H, W) class indices, of the image's size.
        captions: One line above each case.
    """
    # The widest panel gives the columns, the highest case of each row its height.
    parts = zip(images, truths, predictions, captions, strict=True)
    cases = [(caption, panels(image, truth, prediction)) for image, truth, prediction, caption in parts]
    column = max(_LEAST, *(drawn[0].width for _, drawn in cases)) + _GAP
    wide = len(PANELS) * column
    across = min(len(cases), max(1, len(PANELS) * (_SIDE + _GAP) // wide))
    rows = [cases[first : first + across] for first in range(0, len(cases), across)]
    heights = [_LINE + max(drawn[0].height for _, drawn in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (_GAP + across * wide, 2 * _LINE + sum(heights)), GROUND)
    draw = ImageDraw.Draw(sheet)
    # Column titles, then the cases.
    for number in range(across * len(PANELS)):
        write(draw, (_GAP + number * column, 3), PANELS[number % len(PANELS)], 14, column, TEXT)
    top = _LINE
    for row, height in zip(rows, heights, strict=True):
        for place, (caption, drawn) in enumerate(row):
            left = _GAP + place * wide
            write(draw, (left, top + 3), caption, 14, wide - _GAP, TEXT)
            for number, panel in enumerate(drawn):
                sheet.paste(panel, (left + number * column, top + _LINE))
        top += height
    # Legend.
    left = _GAP
    for name, colour in LEGEND:
        draw.rectangle((left, top + 4, left + 12, top + 16), fill=colour)
        left += 34 + write(draw, (left + 18, top + 2), name, 14, sheet.width, TEXT)
    return sheet


def index_mask(mask: np.ndarray, classes: int) -> Image.Image:
    """Make a palette image of class indices (H, W): NumPy reads indices, a viewer shows colours.

    A single foreground class is white on black: converted to grey, it becomes 255. From layers (H, W, K), NumPy reads
    bits (bit i is class i + 1), and a viewer shows the mean of the colours.
    """
    image = Image.fromarray(to_bits(mask).astype(np.uint8))
    colours = [(255, 255, 255)] if classes == 1 else [colour_of(index) for index in range(1, classes + 1)]
    if mask.ndim == 3:
        every = np.array(colours)
        sets = (every[[bits >> place & 1 == 1 for place in range(classes)]] for bits in range(1, 1 << classes))
        colours = [tuple(each.mean(axis=0).astype(int).tolist()) for each in sets]
    image.putpalette([value for colour in [(0, 0, 0), *colours] for value in colour])
    return image


def colour_of(index: int) -> tuple[int, int, int]:
    """The colour of class `index`, 1 or more, or of `IGNORE`."""
    return IGNORED if index == IGNORE else COLOURS[(index - 1) % len(COLOURS)]


def outline(region: np.ndarray, width: int) -> np.ndarray:
    """The inner boundary of a boolean region (H, W), `width` pixels wide; the image's edge is not a boundary."""
    inside = region
    for _ in range(width):
        padded = np.pad(inside, 1, mode="edge")
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(region & ~inside)


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically. Raises `OSError`."""
    atomic_write(path, png(image))


def png(image: Image.Image) -> bytes:
    """Content of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
