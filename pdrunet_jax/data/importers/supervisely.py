"""Import a Supervisely project as a dataset folder with index masks."""

import io
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pdrunet_jax.data.importers import rle
from pdrunet_jax.data.importers.bitmaps import decode_bitmap, whole
from pdrunet_jax.data.importers.files import Images, number, problem, read_all, read_json, short, without_area, writable
from pdrunet_jax.data.importers.writer import Drawing, ImportOptions, write_dataset
from pdrunet_jax.data.labelme.raster import crossings
from pdrunet_jax.data.labelme.read import MOST_POINTS, Shape, decode_base64
from pdrunet_jax.data.walk import some
from pdrunet_jax.runtime.errors import DataError, UserError

HELP = """\
Import a Supervisely project as a dataset folder: PROJECT/DATASET/img/NAME.png with ann/NAME.png.json.

Polygons with their holes, bitmaps and rectangles are drawn, later objects over earlier ones; lines and points have no \
area and are skipped. Datasets named train, val and test are kept as splits. Exported masks (masks_machine/NAME.png) \
are read by import-masks.

All problems are reported at once; if there is one, nothing is written.

Example:
    python -m pdrunet_jax.data import-supervisely project data/legs --classes femur 1 tibia 2"""

Ring = tuple[tuple[float, float], ...]
"""Corners, (x, y) in pixels."""

_MOST_BYTES = 64 << 20  # of one unpacked bitmap
_MOST_CROSSINGS = 1_000_000  # of rows and the outline of a polygon with holes
_OWN = ("meta.json", "obj_class_to_machine_color.json")  # the project's own files
_NO_AREA = ("point", "line", "polyline", "graph", "cuboid", "any")


@dataclass(frozen=True)
class ImportSupervisely(ImportOptions):
    """Import a Supervisely project as a dataset folder."""


def import_supervisely(options: ImportSupervisely) -> list[str]:
    """Write the dataset folder `options.dst`, completely or not at all.

    Returns remarks for the user. Raises `UserError`, or `DataError` with the problems of all files.
    """
    options.check()
    source, images = options.source, options.find_images(is_mask=_is_mask)
    problems, drawings, others, skipped = list[str](), [], [], Counter[str]()
    for name, content in read_all(source, ".json", read_json, options.encoding, problems):
        if not isinstance(content, dict) or "objects" not in content:
            others += [name] if PurePosixPath(name).name not in _OWN else []
            continue
        try:
            drawings.append(_drawing(content, name, images, skipped))
        except DataError as error:
            problems += error.problems
    if not drawings and not problems:
        raise UserError(f"{source}: no Supervisely annotation (ann/*.json with objects) in this folder or below")
    notes = without_area(skipped)
    if others:
        notes.append(f"skipped, JSON but not of Supervisely: {some(others)}")
    return write_dataset(options, drawings, images, notes, problems)


def _is_mask(name: str) -> bool:
    return any(part.startswith("masks") for part in PurePosixPath(name).parts[:-1])


def _drawing(content: dict[str, Any], name: str, images: Images, skipped: Counter[str]) -> Drawing:
    path = PurePosixPath(name)
    stated = path.name[: -len(".json")]
    image = images.find(stated, str(path.parent), name)
    if image is None:
        raise problem(name, f"its image {stated} does not exist beside it or in img/")
    if image in images.moved:
        images.moved.remove(image)  # img/ and ann/ are the format's own
    size, objects = content.get("size"), content["objects"]
    if not isinstance(size, dict) or not isinstance(objects, list):
        raise problem(name, "size and objects must be an object and a list")
    shapes, wrong = [], []
    for position, item in enumerate(objects, start=1):
        try:
            sides = rle.check_size(size.get("height"), size.get("width"))
            if shape := _shape(item, sides, f"{name}: object {position}", skipped):
                shapes.append(shape)
        except ValueError as error:
            wrong.append(f"{name}: object {position}: {error}")
        except DataError as error:
            wrong += error.problems
    if (total := sum(len(shape.points) for shape in shapes)) > MOST_POINTS:
        wrong.append(f"{name}: {total:,} points; at most {MOST_POINTS:,} are drawn")
    if wrong:
        raise DataError("unreadable annotation", wrong)
    return Drawing(name, image, tuple(shape.label for shape in shapes), lambda: shapes)


def _shape(item: Any, size: tuple[int, int], where: str, skipped: Counter[str]) -> Shape | None:
    """The shape of an object; None without an area. Raises `ValueError` or `DataError`."""
    if not isinstance(item, dict):
        raise ValueError("must be an object")
    label, kind = item.get("classTitle"), item.get("geometryType")
    if not isinstance(label, str) or not label.strip() or not writable(label):
        raise ValueError(f"classTitle {short(label)} must be printable text")
    if kind in _NO_AREA:
        skipped[str(kind)] += 1
        return None
    if kind == "bitmap":
        return _bitmap(item.get("bitmap"), label.strip(), size, where)
    points = item.get("points")
    if kind not in ("polygon", "rectangle") or not isinstance(points, dict):
        raise ValueError(f"geometryType {short(kind)} is unknown, or its points are missing")
    exterior = _ring(points.get("exterior"))
    if kind == "rectangle":
        if len(exterior) != 2:
            raise ValueError("a rectangle needs two corners")
        return Shape(label.strip(), "rectangle", exterior, size=size)
    holes = points.get("interior") or []
    if len(exterior) < 3 or not isinstance(holes, list):
        raise ValueError("a polygon needs at least three points")
    rings = [_ring(ring) for ring in holes]
    if not rings:
        return Shape(label.strip(), "polygon", exterior, size=size)
    if sum(map(crossings, (exterior, *rings))) > _MOST_CROSSINGS:
        raise ValueError("its outline is too long to be drawn by hand")
    return whole(label.strip(), size, partial(_with_holes, exterior, rings, size))


def _with_holes(
    exterior: tuple[tuple[float, float], ...],
    holes: list[tuple[tuple[float, float], ...]],
    size: tuple[int, int],
    _: str,
) -> NDArray[np.bool_]:
    image = Image.new("1", (size[1], size[0]))
    draw = ImageDraw.Draw(image)
    draw.polygon(exterior, fill=1)
    for hole in (hole for hole in holes if len(hole) > 2):
        draw.polygon(hole, fill=0)
    return np.array(image)


def _bitmap(value: Any, label: str, size: tuple[int, int], where: str) -> Shape:
    origin = value.get("origin") if isinstance(value, dict) else None
    text = value.get("data") if isinstance(value, dict) else None
    if not isinstance(text, str) or not isinstance(origin, list) or [type(item) for item in origin] != [int, int]:
        raise ValueError("a bitmap needs data and an origin of two whole numbers")
    packed = decode_base64(text, where, "its bitmap")
    width, height = _png_size(_unpacked(packed, where, 64), where)
    corners = (float(origin[0]), float(origin[1])), (origin[0] + width - 1.0, origin[1] + height - 1.0)
    if max(map(abs, (*corners[0], *corners[1]))) > 1e9:
        raise ValueError("its bitmap lies far outside the image")

    def pixels(name: str) -> NDArray[np.bool_]:
        return decode_bitmap(_unpacked(packed, name, _MOST_BYTES), name)

    return Shape(label, "mask", corners, pixels=pixels, size=size)


def _unpacked(packed: bytes, name: str, most: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, most)
    except zlib.error:
        raise problem(name, "its bitmap is not compressed by zlib") from None


def _png_size(start: bytes, name: str) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(start), formats=("PNG",)) as image:
            return image.size
    except Exception:  # Pillow's readers raise nearly every type on damaged files
        raise problem(name, "its bitmap is not a PNG") from None


def _ring(values: Any) -> Ring:
    pairs = values if isinstance(values, list) else [None]
    points = [tuple(number(item) for item in pair) if isinstance(pair, list) else () for pair in pairs]
    if any(len(point) != 2 or None in point for point in points):
        raise ValueError("points must be pairs of finite numbers")
    return tuple((point[0] or 0.0, point[1] or 0.0) for point in points)
