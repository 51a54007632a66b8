"""Import CVAT's own XML ("CVAT for images 1.1") as a dataset folder with index masks."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.importers import rle
from pdrunet_jax.data.importers.files import (
    Images,
    problem,
    read_all,
    read_xml,
    short,
    split_of,
    without_area,
    writable,
)
from pdrunet_jax.data.importers.writer import Drawing, ImportOptions, write_dataset
from pdrunet_jax.data.labelme.read import MOST_POINTS, Shape
from pdrunet_jax.data.walk import some
from pdrunet_jax.runtime.errors import DataError, UserError

HELP = """\
Import annotations in CVAT's own format ("CVAT for images 1.1": annotations.xml) as a dataset folder.

Polygons, masks, rectangles and ellipses are drawn in the order of their z_order; polylines, points and cuboids have \
no area and are skipped. Subsets train, val and test are kept as splits. Of CVAT's other exports, COCO is read by \
import-coco, "Segmentation mask" and "Pascal VOC" by import-voc, "LabelMe 3.0" by import-labelme.

All problems are reported at once; if there is one, nothing is written.

Example:
    python -m pdrunet_jax.data import-cvat export data/legs --images xrays --classes femur 1 tibia 2"""

_KINDS = ("polygon", "mask", "box", "ellipse")
_NO_AREA = ("polyline", "points", "cuboid", "tag", "skeleton")
_ELLIPSE = np.linspace(0, 2 * np.pi, 180, endpoint=False)


@dataclass(frozen=True)
class ImportCvat(ImportOptions):
    """Import CVAT's own XML as a dataset folder."""


def import_cvat(options: ImportCvat) -> list[str]:
    """Write the dataset folder `options.dst`, completely or not at all.

    Returns remarks for the user. Raises `UserError`, or `DataError` with the problems of all files.
    """
    options.check()
    source, images = options.source, options.find_images()
    problems, drawings, others, skipped = list[str](), list[Drawing](), [], Counter[str]()
    for name, root in read_all(source, ".xml", read_xml, options.encoding, problems):
        if root.tag != "annotations" or root.find("image") is None:
            others.append(name)
            continue
        for item in root.iterfind("image"):
            try:
                drawings.append(_drawing(item, name, images, skipped))
            except DataError as error:
                problems += error.problems
    if not drawings and not problems:
        raise UserError(f"{source}: no annotations of CVAT (*.xml with <annotations> and <image>) in it or below")
    notes = without_area(skipped)
    if others:
        notes.append(f"skipped, XML but not CVAT's own: {some(others)}")
    return write_dataset(options, drawings, images, notes, problems)


def _drawing(item: ElementTree.Element, name: str, images: Images, skipped: Counter[str]) -> Drawing:
    stated = item.get("name") or ""
    where = f"{name}: image {short(stated)}"
    image = images.find(stated, str(PurePosixPath(name).parent), where, beside=False)
    if image is None:
        raise problem(where, "it does not exist in the source; give its folder with --images")
    shapes, wrong = list[tuple[float, Shape]](), list[str]()
    for position, child in enumerate(item, start=1):
        try:
            size = rle.check_size(int(_value(item, "height")), int(_value(item, "width")))
            if child.tag in _NO_AREA:
                skipped[child.tag] += 1
            elif child.tag in _KINDS:
                order = _value(child, "z_order") if "z_order" in child.attrib else 0.0
                shapes.append((order, _shape(child, size)))
        except ValueError as error:
            wrong.append(f"{where}: {child.tag} {position}: {error}")
    ordered = [shape for _, shape in sorted(shapes, key=lambda pair: pair[0])]
    if (total := sum(len(shape.points) for shape in ordered)) > MOST_POINTS:
        wrong.append(f"{where}: {total:,} points; at most {MOST_POINTS:,} are drawn")
    if wrong:
        raise DataError("unreadable annotation", wrong)
    labels = tuple(shape.label for shape in ordered)
    return Drawing(name, image, labels, lambda: ordered, split=split_of(f"{item.get('subset') or ''}/x"))


def _shape(child: ElementTree.Element, size: tuple[int, int]) -> Shape:
    """The shape of an element with an area. Raises `ValueError`."""
    label = (child.get("label") or "").strip()
    if not label or not writable(label):
        raise ValueError("its label must be printable text")
    if child.tag == "mask":
        x, y, width, height = (int(_value(child, key)) for key in ("left", "top", "width", "height"))
        patch = rle.check_size(height, width)
        corners = ((float(x), float(y)), (x + width - 1.0, y + height - 1.0))
        return Shape(label, "mask", corners, pixels=partial(_decoded, child.get("rle") or "", patch), size=size)
    if child.tag == "polygon":
        points = [pair.split(",") for pair in (child.get("points") or "").split(";")]
        if len(points) < 3 or any(len(point) != 2 for point in points):
            raise ValueError("a polygon needs at least three points")
        return Shape(label, "polygon", tuple((_finite(x), _finite(y)) for x, y in points), size=size)
    degrees = _value(child, "rotation") if "rotation" in child.attrib else 0.0
    if child.tag == "box":
        left, top, right, bottom = (_value(child, key) for key in ("xtl", "ytl", "xbr", "ybr"))
        centre, half = ((left + right) / 2, (top + bottom) / 2), (abs(right - left) / 2, abs(bottom - top) / 2)
        offsets = [(-half[0], -half[1]), (half[0], -half[1]), half, (-half[0], half[1])]
    else:
        centre, half = (_value(child, "cx"), _value(child, "cy")), (_value(child, "rx"), _value(child, "ry"))
        offsets = [(half[0] * math.cos(angle), half[1] * math.sin(angle)) for angle in _ELLIPSE.tolist()]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    outline = tuple((centre[0] + u * cosine - v * sine, centre[1] + u * sine + v * cosine) for u, v in offsets)
    return Shape(label, "polygon", outline, size=size)


def _decoded(text: str, size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    """CVAT's run lengths of 0 and 1 in turn, row by row."""
    try:
        return rle.row_mask([int(part) for part in text.split(",")] if len(text) < 1 << 26 else None, size)
    except ValueError as error:
        raise problem(name, f"its rle is damaged ({error})") from None


def _value(item: ElementTree.Element, key: str) -> float:
    if (text := item.get(key)) is None:
        raise ValueError(f"{key} is missing")
    return _finite(text)


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) < 1e9:
        raise ValueError(f"{short(text)} is not a finite number")
    return value
