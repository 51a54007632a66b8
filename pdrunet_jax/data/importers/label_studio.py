"""Import Label Studio's exports, JSON or a PNG for each label, as a dataset folder with index masks."""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.importers import rle
from pdrunet_jax.data.importers.bitmaps import bitmap_shape, decode_bitmap, whole
from pdrunet_jax.data.importers.files import Images, number, problem, read_all, read_json, short, writable
from pdrunet_jax.data.importers.writer import Drawing, ImportOptions, write_dataset
from pdrunet_jax.data.labelme.read import MOST_POINTS, Shape, decode_base64
from pdrunet_jax.data.walk import files_below, some
from pdrunet_jax.runtime.errors import DataError, UserError

HELP = """\
Import an export of Label Studio as a dataset folder: "JSON" or "JSON-MIN" with brushes, bitmasks, polygons, \
rectangles and ellipses, or "Brush labels to PNG" (task-1-annotation-2-by-3-tag-Femur-0.png).

SOURCE holds the export and the images, in any subfolders. Images are found by the names of the uploaded files. \
PNG files do not name their images: put the JSON export of the same project beside them, which is then all that is \
read, or give --pair-in-order.

Later regions are drawn over earlier ones. All problems are reported at once; if there is one, nothing is written.

Example:
    python -m pdrunet_jax.data import-label-studio export data/legs --images xrays --classes Femur 1 Tibia 2"""

_PNG = re.compile(r"task-(\d+)-annotation-(\d+)(?:-by-[^-]+)?-[^-]+-(.+)-\d+\.png")
_ELLIPSE = np.linspace(0, 2 * np.pi, 180, endpoint=False)


@dataclass(frozen=True)
class ImportLabelStudio(ImportOptions):
    """Import Label Studio's JSON or PNG exports as a dataset folder."""

    several: Literal["error", "last"] = "error"
    """Tasks with several annotations: an error, or the last annotation."""
    pair_in_order: bool = False
    """PNG export without JSON: take the tasks, in the order of their numbers, for the images, in the order of their
    names."""


def import_label_studio(options: ImportLabelStudio) -> list[str]:
    """Write the dataset folder `options.dst`, completely or not at all.

    Returns remarks for the user. Raises `UserError`, or `DataError` with the problems of all files.
    """
    options.check()
    images = options.find_images(is_mask=lambda name: _PNG.fullmatch(PurePosixPath(name).name) is not None)
    problems, notes, skipped = list[str](), list[str](), Counter[str]()
    drawings, others = [], []
    for name, tasks in read_all(options.source, ".json", read_json, options.encoding, problems):
        if not _is_export(tasks):
            others.append(name)
            continue
        for position, task in enumerate(tasks, start=1):
            try:
                if drawing := _task(
                    task, f"{name}: task {short(task.get('id', position))}", name, images, options, skipped
                ):
                    drawings.append(drawing)
            except DataError as error:
                problems += error.problems
    bitmaps = [path for path in files_below(options.source) if _PNG.fullmatch(path.name)]
    if bitmaps and not drawings and not problems:
        drawings = _paired(bitmaps, images, options, notes)
    elif bitmaps:
        notes.append(f"{len(bitmaps)} PNG masks were not needed: the JSON export has the same regions")
    if not drawings and not problems:
        raise UserError(
            f"{options.source}: no export of Label Studio (*.json, or task-*-annotation-*.png) in it or below"
        )
    if skipped:
        notes.append(f"skipped: {', '.join(f'{count} {what}' for what, count in skipped.most_common())}")
    if others:
        notes.append(f"skipped, JSON but not of Label Studio: {some(others)}")
    return write_dataset(options, drawings, images, notes, problems)


def _is_export(tasks: Any) -> bool:
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        return False
    return all("data" in task or "annotation_id" in task or "annotator" in task for task in tasks)


def _task(
    task: dict[str, Any], where: str, name: str, images: Images, options: ImportLabelStudio, skipped: Counter[str]
) -> Drawing | None:
    regions = _regions(task, where, options, skipped)
    if regions is None:
        return None
    shapes: list[Shape] = []
    others = {item.get("id"): _label(item) for item in regions if _label(item)}  # of labels apart from their brush
    for region in regions:
        if shape := _shape(region, where, others, skipped):
            shapes.append(shape)
    if (total := sum(len(shape.points) for shape in shapes)) > MOST_POINTS:
        raise problem(where, f"{total:,} points; at most {MOST_POINTS:,} are drawn")
    image = _image(task, where, str(PurePosixPath(name).parent), images)
    return Drawing(where, image, tuple(shape.label for shape in shapes), lambda: shapes)


def _regions(
    task: dict[str, Any], where: str, options: ImportLabelStudio, skipped: Counter[str]
) -> list[dict[str, Any]] | None:
    """The regions of the task's annotation; None without one."""
    if "data" not in task:  # JSON-MIN: regions are in the keys named after their control tags
        lists = [value for value in task.values() if isinstance(value, list)]
        return [
            {"value": item, **{key: item.get(key) for key in ("original_width", "original_height")}}
            for items in lists
            for item in items
            if isinstance(item, dict)
        ]
    annotations = task.get("annotations", task.get("completions"))
    if not isinstance(annotations, list) or not all(isinstance(item, dict) for item in annotations):
        raise problem(where, "annotations must be a list; export as JSON, not as a snapshot")
    done = [item for item in annotations if not item.get("was_cancelled")]
    if not done:
        skipped["tasks without an annotation"] += 1
        return None
    if len(done) > 1 and options.several == "error":
        raise problem(where, f"{len(done)} annotations; leave one, or give --several last")
    result = done[-1].get("result")
    if not isinstance(result, list) or not all(isinstance(item, dict) for item in result):
        raise problem(where, "result must be a list of regions")
    return result


def _image(task: dict[str, Any], where: str, folder: str, images: Images) -> str:
    content = task.get("data", task)
    values = [task.get("file_upload"), *(content.values() if isinstance(content, dict) else ())]
    paths = [value for value in values if isinstance(value, str) and "." in value and writable(value)]
    for path in paths:
        if PurePosixPath(path).name and (image := images.find(path, folder, where, beside=False)):
            return image
    words = short(paths[0]) if paths else "its image"
    raise problem(where, f"{words} does not exist in the source; give the folder of the images with --images")


def _label(region: dict[str, Any]) -> str | None:
    """The label of a region; None without exactly one."""
    value = region.get("value")
    if not isinstance(value, dict):
        return None
    for key, labels in value.items():
        if key.endswith("labels") and isinstance(labels, list) and len(labels) == 1 and isinstance(labels[0], str):
            return labels[0].strip() if labels[0].strip() and writable(labels[0]) else None
    return None


def _shape(region: dict[str, Any], where: str, others: dict[Any, str | None], skipped: Counter[str]) -> Shape | None:
    """The shape of a region; None for regions without an area. Raises `DataError`."""
    value, kind = region.get("value"), region.get("type")
    if not isinstance(value, dict):
        raise problem(where, "a region without a value")
    brush, bitmask = "rle" in value, "imageDataURL" in value
    areas = brush or bitmask or "points" in value or "radiusX" in value or {"x", "width", "height"} <= value.keys()
    if not areas:
        if not {"labels", "choices", "text"} & value.keys():
            skipped[f"{kind if isinstance(kind, str) else 'region'} without an area"] += 1
        return None
    identity = region.get("id")
    label = _label(region) or (others.get(identity) if isinstance(identity, str) else None)
    where = f"{where}: region {short(identity)}"
    if label is None:
        raise problem(where, "it needs exactly one label")
    if region.get("image_rotation"):
        raise problem(where, "drawn on a rotated image; rotate it back in Label Studio")
    try:
        size = rle.check_size(region.get("original_height"), region.get("original_width"))
        if brush:
            return whole(label, size, partial(_brush, value["rle"], size))
        if bitmask:
            return whole(label, size, partial(_bitmask, value["imageDataURL"], size))
        return Shape(label, "polygon", _outline(value, size), size=size)
    except ValueError as error:
        raise problem(where, str(error)) from None


def _brush(data: Any, size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    try:
        return rle.label_studio_mask(data, size)
    except ValueError as error:
        raise problem(name, str(error)) from None


def _bitmask(url: Any, size: tuple[int, int], name: str) -> NDArray[np.bool_]:
    if not isinstance(url, str) or not url.startswith("data:image/png;base64,"):
        raise problem(name, "its bitmask is not a PNG")
    mask = decode_bitmap(decode_base64(url.partition(",")[2], name, "its bitmask"), name)
    if mask.shape != size:
        raise problem(name, f"its bitmask has {mask.shape[1]}x{mask.shape[0]} pixels, the image {size[1]}x{size[0]}")
    return mask


def _outline(value: dict[str, Any], size: tuple[int, int]) -> tuple[tuple[float, float], ...]:
    """The corners, in pixels, of a polygon, rectangle or ellipse in percent. Raises `ValueError`."""
    height, width = size
    if "points" in value:
        pairs = value["points"]
        if not isinstance(pairs, list) or len(pairs) < 3:
            raise ValueError("a polygon needs at least three points")
        points = [[number(item) for item in pair] if isinstance(pair, list) else [] for pair in pairs]
        if any(len(point) != 2 or None in point for point in points):
            raise ValueError("points must be pairs of finite numbers")
        return tuple(((x or 0) * width / 100, (y or 0) * height / 100) for x, y in points)
    keys = ("x", "y", "radiusX", "radiusY") if "radiusX" in value else ("x", "y", "width", "height")
    numbers = [number(value.get(key)) for key in (*keys, "rotation")]
    if None in numbers[:4]:
        raise ValueError(f"{', '.join(keys)} must be finite numbers")
    x, y, across, down, degrees = (item or 0.0 for item in numbers)
    x, y, across, down = x * width / 100, y * height / 100, across * width / 100, down * height / 100
    if "radiusX" in value:
        offsets = [(across * math.cos(angle), down * math.sin(angle)) for angle in _ELLIPSE.tolist()]
    else:
        offsets = [(0.0, 0.0), (across, 0.0), (across, down), (0.0, down)]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return tuple((x + u * cosine - v * sine, y + u * sine + v * cosine) for u, v in offsets)


def _paired(bitmaps: list[Path], images: Images, options: ImportLabelStudio, notes: list[str]) -> list[Drawing]:
    """The images with the PNG masks of tasks that are in the same order."""
    source = options.source
    tasks: dict[int, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in bitmaps:
        if match := _PNG.fullmatch(path.name):
            tasks[int(match[1][:18])][int(match[2][:18])].append(path)
    order = sorted(tasks)
    if not options.pair_in_order:
        raise UserError(
            f"{source}: PNG masks of {len(tasks)} tasks, which do not say what their images are. Export the project as "
            "JSON too and put it beside them, or, if the tasks were created in the order of the images' names, give "
            "--pair-in-order"
        )
    if len(order) != len(images.names):
        raise UserError(f"{source}: masks of {len(order)} tasks, but {len(images.names)} images: they cannot be paired")
    problems, drawings = [], []
    for task, image in zip(order, images.names, strict=True):
        if len(tasks[task]) > 1 and options.several == "error":
            problems.append(f"task {task}: {len(tasks[task])} annotations; leave one, or give --several last")
        chosen = tasks[task][max(tasks[task])]
        labels = [match[3] for path in chosen if (match := _PNG.fullmatch(path.name))]
        load = partial(_bitmaps, chosen, labels, source)
        drawings.append(Drawing(f"task {task}", image, tuple(labels), load))
    if problems:
        raise DataError(f"{source}: {len(problems)} problems", problems)
    pairs = [f"{task} = {image}" for task, image in zip(order, images.names, strict=True)]
    notes.append(f"tasks were paired with images in order: {some(pairs)}")
    return drawings


def _bitmaps(paths: list[Path], labels: list[str], source: Path) -> list[Shape]:
    return [
        bitmap_shape(path, path.relative_to(source).as_posix(), source, label)
        for path, label in zip(paths, labels, strict=True)
    ]
