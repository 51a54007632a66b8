"""Read a LabelMe file, check it, and rasterise its shapes exactly as LabelMe does."""

import base64
import binascii
import io
import json
import math
import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pdrunet_jax.data.images import open_upright, read_bytes
from pdrunet_jax.runtime.errors import DataError

IGNORE_LABEL = "__ignore__"
"""LabelMe's own label for regions to ignore."""

_AREAS = {
    "polygon": range(3, 1 << 62),
    "rectangle": (2, 4),
    "circle": (2,),
    "mask": (2,),
    "oriented_rectangle": (4,),
    "rotation": (4,),
}
"""Kinds of shapes with an area, and the number of points that each may have."""

_NO_AREA = ("line", "linestrip", "point", "points")

_MOST_BYTES = 256 << 20
_MOST_POINTS = 200_000  # per file: more are not drawn by hand, and take minutes to rasterise
_BOX_SHARE = 0.9  # a rectangle around this share of the same label's bounds is its box: people draw boxes too tight


@dataclass(frozen=True)
class Shape:
    """A drawn shape."""

    label: str
    kind: str
    points: tuple[tuple[float, float], ...]
    """(x, y) in pixels from the upper left corner."""
    mask: str | None = None
    """Base64 of the PNG of a `mask` shape."""

    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        if self.kind == "circle":
            (x, y), radius = self.points[0], math.dist(*self.points)
            return x - radius, y - radius, x + radius, y + radius
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Annotation:
    """Content of a LabelMe file; no path is followed and nothing is decoded yet."""

    name: str
    """Name of the file in messages."""
    image_path: str
    shapes: tuple[Shape, ...]
    """In drawing order."""
    skipped: tuple[str, ...] = ()
    """Kinds of the shapes without an area."""
    size: tuple[int | None, int | None] = (None, None)
    """Height and width of the image, if stated."""
    image_data: str | None = None
    """Base64 of the embedded image file."""

    def check_size(self, height: int, width: int, what: str) -> None:
        """Raise `DataError` unless the file was drawn on an image of this size; `what` names the image."""
        stated = tuple(theirs or ours for theirs, ours in zip(self.size, (height, width), strict=True))
        if stated != (height, width):
            raise _wrong(self.name, f"drawn on {stated[1]}x{stated[0]} pixels, but {what} has {width}x{height}")

    def embedded(self) -> tuple[bytes, tuple[int, int]]:
        """The embedded image file and its (height, width). Raises `DataError` if damaged or of another size."""
        data = _decode_base64(self.image_data or "", self.name, "imageData")
        image = open_upright(data, f"{self.name}: imageData")
        self.check_size(image.height, image.width, "its imageData")
        return data, (image.height, image.width)


def read_annotation(path: Path, name: str) -> Annotation | None:
    """Parse a LabelMe file, version 3 or later; None for other JSON. Raises `DataError` with every problem."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _wrong(name, error.strerror or str(error)) from None
    if size > _MOST_BYTES:
        raise _wrong(name, f"{size >> 20} MiB; at most {_MOST_BYTES >> 20} are read")
    try:
        content = json.loads(read_bytes(path, name).decode("utf-8-sig"))
    except RecursionError:
        raise _wrong(name, "nested too deeply to be a LabelMe file") from None
    except ValueError as error:  # JSON, UTF-8, or a number of thousands of digits
        raise _wrong(name, f"not valid JSON ({error})") from None
    if not isinstance(content, dict) or not content.keys() & {"shapes", "imagePath"}:
        return None
    problems: list[str] = []
    shapes = _read_shapes(content.get("shapes"), problems)
    height, width = (_side(content.get(key), key, problems) for key in ("imageHeight", "imageWidth"))
    image_path = content.get("imagePath")
    if not isinstance(image_path, str) or not image_path.strip():
        problems.append("imagePath is missing")
    image_data = content.get("imageData")
    if problems:
        raise DataError("unreadable annotation", [f"{name}: {problem}" for problem in problems])
    drawable = tuple(shape for shape in shapes if shape.kind in _AREAS)
    skipped = tuple(shape.kind for shape in shapes if shape.kind in _NO_AREA)
    embedded = image_data if isinstance(image_data, str) and image_data else None
    return Annotation(name, str(image_path), drawable, skipped, (height, width), embedded)


def image_location(annotation: Annotation, folder: Path, root: Path) -> str:
    """Resolve `imagePath` from the annotation's `folder` to a POSIX path below `root`, without opening anything.

    Raises `DataError` if it leads out of `root`.
    """
    path, base = annotation.image_path, os.path.abspath(root)
    target = os.path.normpath(os.path.join(os.path.abspath(folder), path.replace("\\", "/")))
    inside = os.path.commonpath([base, target]) == base != target
    if not inside or PureWindowsPath(path).drive or _unwritable(path):
        raise _wrong(annotation.name, f"imagePath {path!r} leads out of the annotations' folder; refused")
    return posixpath.join(*Path(target).relative_to(base).parts)


def without_boxes(shapes: Sequence[Shape]) -> list[Shape]:
    """Drop rectangles drawn around another shape with the same label."""
    regions = [shape for shape in shapes if shape.kind != "rectangle"]
    return [
        shape
        for shape in shapes
        if shape.kind != "rectangle"
        or not any(other.label == shape.label and _held(other, shape) >= _BOX_SHARE for other in regions)
    ]


def rasterise(
    shapes: Sequence[Shape], index_of: Mapping[str, int], size: tuple[int, int], name: str
) -> NDArray[np.uint8]:
    """Draw shapes, later over earlier ones, as (H, W) uint8 with the value `index_of` each label; 0 elsewhere.

    The pixels equal those of LabelMe's own export. Raises `DataError` with every shape that cannot be drawn.
    """
    height, width = size
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    problems = []
    for number, shape in enumerate(shapes, start=1):
        index = index_of[shape.label]
        left, top, right, bottom = shape.bounds()
        if left < -width or top < -height or right > 2 * width or bottom > 2 * height:
            far = f"reaches to ({left:.6g}, {top:.6g}) and ({right:.6g}, {bottom:.6g})"
            problems.append(f"{name}: shape {number} ({shape.label}) {far}, far outside the {width}x{height} image")
        elif shape.kind == "mask":
            try:
                _draw_mask(image, shape, index, f"{name}: shape {number} ({shape.label})")
            except DataError as error:
                problems += error.problems
        elif shape.kind == "rectangle":
            draw.rectangle((left, top, right, bottom), fill=index)
        elif shape.kind == "circle":
            draw.ellipse((left, top, right, bottom), fill=index)
        else:
            draw.polygon(shape.points, fill=index)
    if problems:
        raise DataError("unreadable annotation", problems)
    return np.array(image)


def _read_shapes(values: Any, problems: list[str]) -> list[Shape]:
    """All shapes, with and without an area."""
    if not isinstance(values, list):
        problems.append(f"shapes {'is missing' if values is None else 'must be a list'}")
        return []
    shapes = []
    for number, value in enumerate(values, start=1):
        try:
            shapes.append(_read_shape(value))
        except ValueError as error:
            problems.append(f"shape {number}: {error}")
    total = sum(len(shape.points) for shape in shapes)
    if total > _MOST_POINTS:
        problems.append(f"{total:,} points; at most {_MOST_POINTS:,} are drawn")
    return shapes


def _read_shape(value: Any) -> Shape:
    """Check one entry of `shapes`. Raises `ValueError`."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    label = value.get("label")
    if not isinstance(label, str) or not label.strip() or _unwritable(label.strip()):
        raise ValueError(f"label {_short(label)} must be printable text")
    kind = value.get("shape_type") or "polygon"  # version 3 has no others
    if kind not in _NO_AREA and (not isinstance(kind, str) or kind not in _AREAS):
        raise ValueError(f"shape_type {_short(kind)} is unknown")
    points = value.get("points")
    if not isinstance(points, list) or not all(_is_point(point) for point in points):
        raise ValueError(f"({label.strip()}) points must be a list of pairs of finite numbers")
    if kind in _AREAS and len(points) not in _AREAS[kind]:
        raise ValueError(f"({label.strip()}) a {kind} of {len(points)} points")
    mask = value.get("mask") if kind == "mask" else None
    if kind == "mask" and not isinstance(mask, str):
        raise ValueError("a mask shape without mask data")
    return Shape(label.strip(), kind, tuple((float(x), float(y)) for x, y in points), mask)


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value)
        and all(abs(number) < 1e9 for number in value)  # excludes NaN and infinity
    )


def _side(value: Any, key: str, problems: list[str]) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9 or value != int(value):
        problems.append(f"{key} = {_short(value)} must be a number of pixels")
        return None
    return int(value)


def _held(inner: Shape, outer: Shape) -> float:
    """Share of `inner`'s bounds inside `outer`'s."""
    left, top, right, bottom = inner.bounds()
    other = outer.bounds()
    width = max(0.0, min(right, other[2]) - max(left, other[0]))
    height = max(0.0, min(bottom, other[3]) - max(top, other[1]))
    area = (right - left) * (bottom - top)
    return width * height / area if area > 0 else 0.0


def _draw_mask(image: Image.Image, shape: Shape, index: int, name: str) -> None:
    data = _decode_base64(shape.mask or "", name, "mask")
    left, top, right, bottom = (math.floor(value + 0.5) for value in shape.bounds())
    width, height = right - left + 1, bottom - top + 1
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as header:  # the size, before anything is decoded
            stored = header.size
    except Exception:  # Pillow's readers raise nearly every type on damaged files
        raise _wrong(name, "its mask is not a PNG") from None
    if abs(stored[0] - width) > 1 or abs(stored[1] - height) > 1:  # corners may have been rounded apart
        raise _wrong(name, f"its mask has {stored[0]}x{stored[1]} pixels, but its corners leave {width}x{height}")
    patch = np.asarray(open_upright(data, f"{name}: its mask").convert("L")) > 0
    image.paste(index, (left, top), Image.fromarray(patch))


def _decode_base64(text: str, name: str, what: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _wrong(name, f"{what} is not valid base64") from None


def _unwritable(text: str) -> bool:
    """Whether there are control characters or surrogates, which files and logs cannot hold."""
    return re.search("[\x00-\x1f\x7f\ud800-\udfff]", text) is not None


def _short(value: Any) -> str:
    text = f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)
    return text if len(text) < 60 else f"{text[:50]}..."


def _wrong(name: str, problem: str) -> DataError:
    return DataError("unreadable annotation", [f"{name}: {problem}"])
