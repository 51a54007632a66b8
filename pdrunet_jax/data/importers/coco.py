"""Import COCO JSON, also as Roboflow, CVAT and Label Studio export it, as a dataset folder with index masks."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.importers import rle
from pdrunet_jax.data.importers.bitmaps import whole
from pdrunet_jax.data.importers.files import Images, number, problem, read_all, read_json, short, split_of, writable
from pdrunet_jax.data.importers.writer import Drawing, ImportOptions, write_dataset
from pdrunet_jax.data.labelme.read import MOST_POINTS, Shape
from pdrunet_jax.data.walk import some
from pdrunet_jax.runtime.errors import DataError, UserError

HELP = """\
Import COCO annotations (*.json with images, annotations and categories) as a dataset folder, also as Roboflow, CVAT \
and Label Studio export them.

SOURCE holds one or more JSON files and the images, in any subfolders. Images are found by file_name, or by the \
name of the file. Folders or JSON files named after train, val and test are kept as splits.

Polygons, run-length encoded masks and crowds are drawn, later annotations over earlier ones. Annotations with a box \
only are errors, unless --boxes fill or skip says what they are.

All problems of all files are reported at once; if there is one, nothing is written.

Example:
    python -m pdrunet_jax.data import-coco export data/legs --classes femur 1 tibia 2"""


@dataclass(frozen=True)
class ImportCoco(ImportOptions):
    """Import COCO JSON, also from Roboflow, CVAT and Label Studio, as a dataset folder."""

    boxes: Literal["error", "fill", "skip"] = "error"
    """Annotations with a box only: error, fill (draw the box) or skip."""


def import_coco(options: ImportCoco) -> list[str]:
    """Write the dataset folder `options.dst`, completely or not at all.

    Returns remarks for the user. Raises `UserError`, or `DataError` with the problems of all files.
    """
    options.check()
    images, problems, notes = options.find_images(), list[str](), list[str]()
    drawings, others, counts = [], [], Counter[str]()
    for name, content in read_all(options.source, ".json", read_json, options.encoding, problems):
        if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
            others.append(name)
            continue
        drawings += _File(name, content, images, options, counts, problems).drawings()
    if not drawings and not problems:
        raise UserError(f"{options.source}: no COCO file (*.json with images and annotations) in this folder or below")
    if counts.total():
        notes.append(", ".join(f"{count} {what}" for what, count in counts.items() if count))
    if others:
        notes.append(f"skipped, JSON but not COCO: {some(others)}")
    return write_dataset(options, drawings, images, notes, problems)


class _File:
    """One COCO file."""

    def __init__(
        self,
        name: str,
        content: dict[str, Any],
        images: Images,
        options: ImportCoco,
        counts: Counter[str],
        problems: list[str],
    ) -> None:
        self._name, self._content, self._images, self._options = name, content, images, options
        self._counts, self._problems = counts, problems
        stem = PurePosixPath(name).stem
        words = [word for word in stem.replace("-", "_").split("_") if split_of(f"{word}/x")]
        self._split = split_of(f"{words[0]}/x") if len(words) == 1 else None  # of instances_train2017.json

    def drawings(self) -> list[Drawing]:
        """The images of the file, with their shapes. Problems are added to those of the source."""
        categories = self._categories()
        by_image: dict[Any, list[Shape]] = defaultdict(list)
        known = {item.get("id") for item in self._items("images") if _is_id(item.get("id"))}
        points = 0
        for item in self._items("annotations"):
            where = f"{self._name}: annotation {short(item.get('id'))}"
            image, category = item.get("image_id"), item.get("category_id")
            if not _is_id(image) or image not in known:
                self._problems.append(f"{where}: image_id {short(image)} is not in images")
            elif not _is_id(category) or category not in categories:
                self._problems.append(f"{where}: category_id {short(category)} is not in categories")
            else:
                try:
                    by_image[image] += (shapes := self._shapes(item, categories[category]))
                    points += sum(len(shape.points) for shape in shapes)
                except ValueError as error:
                    self._problems.append(f"{where}: {error}")
        drawings, seen = [], set()
        for item in self._items("images"):
            identity = item.get("id")
            where = f"{self._name}: image {short(identity)}"
            try:
                if not _is_id(identity) or identity in seen:
                    raise problem(where, "its id is missing or not its own")
                seen.add(identity)
                if drawing := self._drawing(item, by_image[identity], where):
                    drawings.append(drawing)
            except DataError as error:
                self._problems += error.problems
        return drawings

    def _drawing(self, item: dict[str, Any], shapes: list[Shape], where: str) -> Drawing | None:
        stated = item.get("file_name")
        if not isinstance(stated, str) or not stated.strip():
            raise problem(where, "file_name is missing")
        total = sum(len(shape.points) for shape in shapes)
        if total > MOST_POINTS:
            raise problem(where, f"{total:,} points; at most {MOST_POINTS:,} are drawn")
        folder = str(PurePosixPath(self._name).parent)
        image = self._images.find(stated, folder, where, beside=False)
        if image is None:
            raise problem(where, f"{short(stated)} does not exist in the source; give its folder with --images")
        if not shapes:
            self._counts["images without an annotation are background"] += 1
        sides = [int(side) if (side := number(item.get(key))) else None for key in ("height", "width")]
        return Drawing(
            self._name,
            image,
            tuple(shape.label for shape in shapes),
            lambda: shapes,
            (sides[0], sides[1]),
            split=split_of(image) or self._split,
        )

    def _categories(self) -> dict[Any, str]:
        names = {}
        for item in self._items("categories"):
            label = item.get("name")
            if not _is_id(item.get("id")) or not isinstance(label, str) or not label.strip() or not writable(label):
                self._problems.append(
                    f"{self._name}: category {short(item.get('id'))} needs an id and a printable name"
                )
            elif item["id"] in names:
                self._problems.append(f"{self._name}: category {item['id']} is listed twice")
            else:
                names[item["id"]] = label.strip()
        return names

    def _items(self, key: str) -> list[dict[str, Any]]:
        values = self._content.get(key)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            line = f"{self._name}: {key} must be a list of objects"
            if line not in self._problems:
                self._problems.append(line)
            return []
        return values

    def _shapes(self, item: dict[str, Any], label: str) -> list[Shape]:
        """The shapes of an annotation. Raises `ValueError`."""
        segmentation = item.get("segmentation")
        self._counts["crowd regions are drawn like others"] += item.get("iscrowd") == 1
        if isinstance(segmentation, dict):
            sides = segmentation.get("size")
            if not isinstance(sides, list) or len(sides) != 2:
                raise ValueError("the size of its mask must be two numbers of pixels")
            size = rle.check_size(*sides)
            return [whole(label, size, partial(_decoded, segmentation.get("counts"), size))]
        if segmentation:
            if not isinstance(segmentation, list):
                raise ValueError("segmentation must be polygons or a mask")
            rings = segmentation if isinstance(segmentation[0], list) else [segmentation]
            return [Shape(label, "polygon", _ring(ring)) for ring in rings]
        box = item.get("bbox")
        if not box or self._options.boxes == "skip":
            self._counts["annotations without an area are skipped"] += 1
            return []
        if self._options.boxes == "error":
            raise ValueError(
                "a box without a segmentation; --boxes fill draws such boxes, --boxes skip leaves them out"
            )
        values = [number(value) for value in box] if isinstance(box, list) else []
        if len(values) != 4 or None in values:
            raise ValueError("bbox must be four finite numbers")
        left, top, width, height = (value or 0.0 for value in values)
        self._counts["boxes are drawn as regions"] += 1
        return [Shape(label, "rectangle", ((left, top), (left + max(width, 0), top + max(height, 0))))]


def _decoded(counts: Any, size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    try:
        return rle.coco_mask(counts, size)
    except ValueError as error:
        raise problem(name, str(error)) from None


def _ring(values: Any) -> tuple[tuple[float, float], ...]:
    numbers = [number(value) for value in values] if isinstance(values, list) else []
    if len(numbers) < 6 or len(numbers) % 2 or None in numbers:
        raise ValueError("a polygon must be at least three pairs of finite numbers")
    flat = [value or 0.0 for value in numbers]
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
