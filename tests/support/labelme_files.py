"""LabelMe files, written as a person's LabelMe would."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def shape(label: str, points: list[Any], kind: str | None = "polygon", **extra: Any) -> dict[str, Any]:
    """A shape of version 5; `kind` None leaves shape_type out, as version 3 did."""
    common = {"label": label, "points": points, **extra}
    return common if kind is None else {**common, "group_id": None, "shape_type": kind, "flags": {}}


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    """The corners of a rectangle, as a polygon."""
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def png(pixels: np.ndarray) -> str:
    """A PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def annotate(
    path: Path, image_path: str, shapes: list[Any], size: tuple[int, int] | None = None, /, **extra: Any
) -> Path:
    """Write a LabelMe file; `size` is (height, width)."""
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image_path, "imageData": None}
    if size:
        content |= {"imageHeight": size[0], "imageWidth": size[1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, **extra}), encoding="utf-8")
    return path
