"""The XML of LabelMe's online version, which CVAT exports as "LabelMe 3.0", as the content of a LabelMe file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.images import open_upright, read_bytes
from pdrunet_jax.data.importers.files import is_inside, problem


def xml_content(root: ElementTree.Element, folder: Path) -> dict[str, Any] | None:
    """The keys and shapes that a LabelMe JSON file has; None for other XML, such as that of Pascal VOC.

    Args:
        root: The <annotation>.
        folder: Folder of the file; the bitmaps of masks are in its subfolder Masks.
    """
    objects = root.findall("object")
    if root.tag != "annotation" or any(item.find("bndbox") is not None for item in objects):
        return None
    if root.find("filename") is None and not objects:
        return None
    place = (root.findtext("folder") or "").strip()
    name = (root.findtext("filename") or "").strip()
    height, width = (_number(root.findtext(f"imagesize/{key}")) for key in ("nrows", "ncols"))
    shapes = [
        _shape(item, folder, (height, width))
        for item in objects
        if (item.findtext("deleted") or "0").strip().lower() not in ("1", "true", "yes")
    ]
    return {
        "shapes": shapes,
        "imagePath": f"{place}/{name}" if place and name else name,
        "imageHeight": height,
        "imageWidth": width,
    }


def _shape(item: ElementTree.Element, folder: Path, size: tuple[Any, Any]) -> dict[str, Any]:
    shape: dict[str, Any] = {"label": (item.findtext("name") or "").strip()}
    if (file := (item.findtext("segm/mask") or "").strip()) and isinstance(size[0], int) and isinstance(size[1], int):
        corners = [[0, 0], [size[1] - 1, size[0] - 1]]
        return {**shape, "shape_type": "mask", "points": corners, "pixels": _bitmap(folder, file, size)}
    points = [[_number(pt.findtext("x")), _number(pt.findtext("y"))] for pt in item.iterfind("polygon/pt")]
    kind = "rectangle" if (item.findtext("type") or "").strip() == "bounding_box" and len(points) == 4 else "polygon"
    if len(points) < 3:
        kind = "point" if len(points) == 1 else "line"
    return {**shape, "shape_type": kind, "points": points}


def _bitmap(folder: Path, file: str, size: tuple[int, int]) -> Callable[[str], NDArray[np.bool_]]:
    def read(name: str) -> NDArray[np.bool_]:
        path = folder / "Masks" / file.replace("\\", "/")
        if "\0" in file or not is_inside(path, folder):
            raise problem(name, "its mask file leads out of the folder; refused")
        image = open_upright(read_bytes(path, name), name)
        if (image.height, image.width) != size:
            raise problem(name, f"its mask has {image.width}x{image.height} pixels, the image {size[1]}x{size[0]}")
        return np.asarray(image.convert("L")) > 0

    return read


def _number(text: str | None) -> Any:
    """A number, or the text itself, for the checks that JSON passes too."""
    text = (text or "").strip()
    try:
        value = float(text)
    except ValueError:
        return text or None
    return int(value) if value.is_integer() and abs(value) < 1e9 else value
