"""Rasterise shapes exactly as LabelMe does, within a bounded time."""

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pdrunet_jax.data.images import open_upright
from pdrunet_jax.data.labelme.read import Shape, decode_base64
from pdrunet_jax.runtime.errors import DataError

_BOX_SHARE = 0.9  # a rectangle around this share of the same label's bounds is its box: people draw boxes too tight
_MOST_CROSSINGS = 100_000_000  # of outlines and rows, per file: some seconds of drawing; a hand draws a few thousand
_MOST_AREA = 4_000_000_000  # pixels in the bounds of all shapes of a file: 200 that are as large as a radiograph


def without_boxes(shapes: Sequence[Shape]) -> list[Shape]:
    """Drop rectangles drawn around another shape with the same label."""
    regions = defaultdict(list)
    for shape in shapes:
        if shape.kind != "rectangle":
            regions[shape.label].append(shape.bounds())
    bounds = {label: np.array(sorted(values, key=lambda each: each[0] + each[2])) for label, values in regions.items()}
    return [
        shape
        for shape in shapes
        if shape.kind != "rectangle" or shape.label not in bounds or not _is_box(shape, bounds[shape.label])
    ]


def rasterise(
    shapes: Sequence[Shape], index_of: Mapping[str, int], size: tuple[int, int], name: str
) -> NDArray[np.uint8]:
    """Draw shapes, later over earlier ones, as (H, W) uint8 with the value `index_of` each label; 0 elsewhere.

    The pixels equal those of LabelMe's own export. Raises `DataError` with every shape that cannot be drawn.
    """
    return rasterise_counted(shapes, index_of, size, name)[0]


def rasterise_counted(
    shapes: Sequence[Shape], index_of: Mapping[str, int], size: tuple[int, int], name: str
) -> tuple[NDArray[np.uint8], int]:
    """Like `rasterise`; also counts the pixels that one class takes from another."""
    height, width = size
    _check_work(shapes, size, name)
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    problems = []
    several = len({index_of[shape.label] for shape in shapes} - {0}) > 1
    overlap = 0
    for number, shape in enumerate(shapes, start=1):
        index = index_of[shape.label]
        left, top, right, bottom = shape.bounds()
        if shape.size not in (None, size):
            stated = "x".join(map(str, reversed(shape.size or ())))
            problems.append(
                f"{name}: shape {number} ({shape.label}) was drawn on {stated} pixels, not {width}x{height}"
            )
            continue
        if left < -width or top < -height or right > 2 * width or bottom > 2 * height:
            far = f"reaches to ({left:.6g}, {top:.6g}) and ({right:.6g}, {bottom:.6g})"
            problems.append(f"{name}: shape {number} ({shape.label}) {far}, far outside the {width}x{height} image")
            continue
        box = (
            max(0, math.floor(left) - 1),
            max(0, math.floor(top) - 1),
            min(width, math.ceil(right) + 2),
            min(height, math.ceil(bottom) + 2),
        )
        watch = several and index and box[0] < box[2] and box[1] < box[3]
        before = image.crop(box) if watch else None
        try:
            _draw(image, draw, shape, index, f"{name}: shape {number} ({shape.label})")
        except DataError as error:
            problems += error.problems
        if before is not None:
            old, new = np.asarray(before), np.asarray(image.crop(box))
            overlap += int(np.count_nonzero((old != new) & (old != 0)))
    if problems:
        raise DataError("unreadable annotation", problems)
    return np.array(image), overlap


def _check_work(shapes: Sequence[Shape], size: tuple[int, int], name: str) -> None:
    """Raise `DataError` if drawing would take minutes."""
    height, width = size
    bounds = np.array([shape.bounds() for shape in shapes]).reshape(-1, 4)
    bounds = np.clip(bounds, (-width, -height) * 2, (2 * width, 2 * height) * 2)  # what is farther is refused below
    area = float(((bounds[:, 2] - bounds[:, 0] + 1) * (bounds[:, 3] - bounds[:, 1] + 1)).sum())
    if area > _MOST_AREA or sum(crossings(shape.points) for shape in shapes) > _MOST_CROSSINGS:
        reason = f"the outlines of its {len(shapes)} shapes are too long, or their areas too large, to be drawn by hand"
        raise DataError("unreadable annotation", [f"{name}: {reason}"])


def _draw(image: Image.Image, draw: ImageDraw.ImageDraw, shape: Shape, index: int, name: str) -> None:
    left, top, right, bottom = shape.bounds()
    if shape.pixels is not None:
        patch = Image.fromarray(shape.pixels(name))
        image.paste(index, (round(left), round(top)), patch)
    elif shape.kind == "mask":
        _draw_mask(image, shape, index, name)
    elif shape.kind == "rectangle":
        draw.rectangle((left, top, right, bottom), fill=index)
    elif shape.kind == "circle":
        draw.ellipse((left, top, right, bottom), fill=index)
    else:
        draw.polygon(shape.points, fill=index)


def _draw_mask(image: Image.Image, shape: Shape, index: int, name: str) -> None:
    data = decode_base64(shape.mask or "", name, "mask")
    left, top, right, bottom = (math.floor(value + 0.5) for value in shape.bounds())
    width, height = right - left + 1, bottom - top + 1
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as header:  # the size, before anything is decoded
            stored = header.size
    except Exception:  # Pillow's readers raise nearly every type on damaged files
        raise DataError("unreadable annotation", [f"{name}: its mask is not a PNG"]) from None
    if abs(stored[0] - width) > 1 or abs(stored[1] - height) > 1:  # corners may have been rounded apart
        reason = f"its mask has {stored[0]}x{stored[1]} pixels, but its corners leave {width}x{height}"
        raise DataError("unreadable annotation", [f"{name}: {reason}"])
    patch = np.asarray(open_upright(data, f"{name}: its mask").convert("L")) > 0
    image.paste(index, (left, top), Image.fromarray(patch))


def crossings(points: Sequence[tuple[float, float]]) -> float:
    """Rows that the outline of a polygon crosses: what drawing it costs. 0 for simple ones."""
    if len(points) < 5:
        return 0.0
    rows = np.array(points)[:, 1]
    return float(np.abs(rows - np.roll(rows, 1)).sum()) + len(rows)


def _is_box(shape: Shape, others: np.ndarray) -> bool:
    """Whether a rectangle holds `_BOX_SHARE` of one of `others`, (N, 4) bounds in the order of their centres."""
    left, top, right, bottom = shape.bounds()
    # It then holds their centres too.
    first, last = np.searchsorted(others[:, 0] + others[:, 2], (2 * left, 2 * right + 1e-9))
    others = others[first : last + 1]
    areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    width = np.minimum(right, others[:, 2]) - np.maximum(left, others[:, 0])
    height = np.minimum(bottom, others[:, 3]) - np.maximum(top, others[:, 1])
    held = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    return bool(((held >= _BOX_SHARE * areas) & (areas > 0)).any())
