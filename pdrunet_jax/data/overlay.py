"""Draw masks over images with NumPy and Pillow, in colours that colour-blind readers can tell apart."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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


def grey_or_rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert (H, W, C) or (H, W) pixels in [0, 255] to (H, W, 3) uint8: grey for one channel, else the first three."""
    image = pixels[..., None] if pixels.ndim == 2 else pixels
    image = np.clip(np.round(image.astype(np.float32)), 0, 255).astype(np.uint8)
    return np.repeat(image[..., :1], 3, axis=-1) if image.shape[-1] < 3 else np.ascontiguousarray(image[..., :3])


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tint and outline every class in its colour; returns (H, W, 3) uint8.

    `pixels` is (H, W, C) or (H, W) in [0, 255]; `mask` holds (H, W) class indices, ignored pixels are grey.
    """
    picture = grey_or_rgb(pixels).astype(np.float32)
    # An outline of one pixel is lost when a large radiograph is scaled to a screen.
    width = max(1, round(min(mask.shape) / 300))
    for index in np.unique(mask):
        if index == 0:
            continue
        region = mask == index
        colour = np.array(colour_of(int(index)), np.float32)
        picture[region] += 0.3 * (colour - picture[region])
        picture[outline(region, width)] = colour
    return np.round(picture).astype(np.uint8)


def difference(pixels: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Draw errors over the dimmed image: missed orange, extra blue, wrong class pink, ignored grey.

    Arguments and result as in `overlay`. Regions on which both agree get a thin white outline.
    """
    picture = grey_or_rgb(pixels).astype(np.float32) * 0.6
    counted = truth != IGNORE
    for region, colour in (
        (counted & (truth > 0) & (prediction == 0), MISSED),
        (counted & (truth == 0) & (prediction > 0), EXTRA),
        (counted & (truth > 0) & (prediction > 0) & (truth != prediction), CONFUSED),
    ):
        picture[region] = 0.15 * picture[region] + 0.85 * np.array(colour, np.float32)
    picture[~counted] = 0.5 * picture[~counted] + 0.5 * np.array(IGNORED, np.float32)
    agreed = outline(counted & (truth > 0) & (truth == prediction), 1)
    picture[agreed] = 0.4 * picture[agreed] + 0.6 * 255
    return np.round(picture).astype(np.uint8)


def panels(pixels: np.ndarray, truth: np.ndarray, prediction: np.ndarray, side: int = 256) -> list[Image.Image]:
    """Draw the four `PANELS` of one case, with a longest side of `side` pixels.

    Image and masks (by nearest neighbour) are scaled before drawing, so that outlines keep their width.
    """
    height, width = truth.shape
    scale = side / max(height, width)
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
    """Draw a sheet with one case per row (image, truth, prediction, difference) and a legend below.

    Args:
        images: (H, W, C) or (H, W) in [0, 255], each of any size.
        truths: (H, W) class indices, of the image's size.
        predictions: (H, W) class indices, of the image's size.
        captions: One line above each row.
    """
    # The widest panel and the heights of all rows give the size.
    cases = zip(images, truths, predictions, captions, strict=True)
    rows = [(caption, panels(image, truth, prediction)) for image, truth, prediction, caption in cases]
    column = max(row[0].width for _, row in rows)
    width = _GAP + len(PANELS) * (column + _GAP)
    height = 2 * _LINE + sum(_LINE + row[0].height + _GAP for _, row in rows)
    sheet = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    # Column titles, then the cases.
    for number, name in enumerate(PANELS):
        draw.text((_GAP + number * (column + _GAP), 3), name, TEXT, font)
    top = _LINE
    for caption, row in rows:
        draw.text((_GAP, top + 3), fitted(caption, width - 2 * _GAP, font), TEXT, font)
        top += _LINE
        for number, panel in enumerate(row):
            sheet.paste(panel, (_GAP + number * (column + _GAP), top))
        top += row[0].height + _GAP
    # Legend.
    left = _GAP
    for name, colour in LEGEND:
        draw.rectangle((left, top + 4, left + 12, top + 16), fill=colour)
        draw.text((left + 18, top + 2), name, TEXT, font)
        left += 34 + int(font.getlength(name))
    return sheet


def index_mask(mask: np.ndarray, classes: int) -> Image.Image:
    """Make a palette image of class indices (H, W): NumPy reads indices, a viewer shows colours.

    A single foreground class is white on black: converted to grey, it becomes 255.
    """
    image = Image.fromarray(mask.astype(np.uint8))
    colours = [(255, 255, 255)] if classes == 1 else [colour_of(index) for index in range(1, classes + 1)]
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


def fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten `text` to `width` pixels at its beginning: the end of a path says most."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"
