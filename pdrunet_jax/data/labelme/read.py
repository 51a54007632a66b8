"""Read a LabelMe file and check it."""

import base64
import binascii
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.images import open_upright
from pdrunet_jax.data.importers.files import number, read_json, read_xml, short, writable
from pdrunet_jax.data.importers.files import problem as _wrong
from pdrunet_jax.data.labelme.xml import xml_content
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

MOST_POINTS = 200_000  # per file: more are not drawn by hand, and take minutes to rasterise


@dataclass(frozen=True)
class Shape:
    """A drawn shape."""

    label: str
    kind: str
    points: tuple[tuple[float, float], ...]
    """(x, y) in pixels from the upper left corner."""
    mask: str | None = None
    """Base64 of the PNG of a `mask` shape."""
    pixels: Callable[[str], NDArray[np.bool_]] | None = None
    """For shapes of other tools: decodes the pixels between two points, the corners; raises `DataError` with the name
    given."""
    size: tuple[int, int] | None = None
    """Height and width of the image that it was drawn on, if known."""

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
        data = decode_base64(self.image_data or "", self.name, "imageData")
        image = open_upright(data, f"{self.name}: imageData")
        self.check_size(image.height, image.width, "its imageData")
        return data, (image.height, image.width)


def read_annotation(path: Path, name: str, encoding: str = "utf-8") -> Annotation | None:
    """Parse a LabelMe file, version 3 or later, or the XML that CVAT exports as LabelMe 3.0; None for other files.

    `encoding` is that of files that are not UTF-8. Raises `DataError` with every problem.
    """
    if path.suffix.lower() == ".xml":
        content = xml_content(read_xml(path, name, encoding), path.parent)
    else:
        content = read_json(path, name, encoding)
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


def decode_base64(text: str, name: str, what: str) -> bytes:
    """Decode `text`. Raises `DataError` that says `name` and `what` it is."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _wrong(name, f"{what} is not valid base64") from None


def _read_shapes(values: Any, problems: list[str]) -> list[Shape]:
    """All shapes, with and without an area."""
    if not isinstance(values, list):
        problems.append(f"shapes {'is missing' if values is None else 'must be a list'}")
        return []
    shapes = []
    for position, value in enumerate(values, start=1):
        try:
            shapes.append(_read_shape(value))
        except ValueError as error:
            problems.append(f"shape {position}: {error}")
    total = sum(len(shape.points) for shape in shapes)
    if total > MOST_POINTS:
        problems.append(f"{total:,} points; at most {MOST_POINTS:,} are drawn")
    return shapes


def _read_shape(value: Any) -> Shape:
    """Check one entry of `shapes`. Raises `ValueError`."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    label = value.get("label")
    if not isinstance(label, str) or not label.strip() or not writable(label.strip()):
        raise ValueError(f"label {short(label)} must be printable text")
    kind = value.get("shape_type") or "polygon"  # version 3 has no others
    if kind not in _NO_AREA and (not isinstance(kind, str) or kind not in _AREAS):
        raise ValueError(f"shape_type {short(kind)} is unknown")
    points = value.get("points")
    if not isinstance(points, list) or not all(_is_point(point) for point in points):
        raise ValueError(f"({label.strip()}) points must be a list of pairs of finite numbers")
    if kind in _AREAS and len(points) not in _AREAS[kind]:
        raise ValueError(f"({label.strip()}) a {kind} of {len(points)} points")
    mask = value.get("mask") if kind == "mask" else None
    if kind == "mask" and not isinstance(mask, str) and "pixels" not in value:
        raise ValueError("a mask shape without mask data")
    corners = tuple((float(x), float(y)) for x, y in points)
    return Shape(label.strip(), kind, corners, mask, value.get("pixels") if callable(value.get("pixels")) else None)


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(number(item) is not None for item in value)


def _side(value: Any, key: str, problems: list[str]) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9 or value != int(value):
        problems.append(f"{key} = {short(value)} must be a number of pixels")
        return None
    return int(value)
