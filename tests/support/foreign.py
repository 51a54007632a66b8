"""Exports of other tools, written as these write them."""

import base64
import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdrunet_jax.data.labelme.contours import outlines
from tests.support.small_data import save

Masks = Mapping[str, np.ndarray]
"""(H, W) class indices of each image, by its name without extension; `NAMES` are the classes."""

NAMES = ("femur", "tibia")


def runs(flat: np.ndarray) -> list[int]:
    """Lengths of the runs of 0 and 1 in turn."""
    ends = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(np.int8), [2]])))
    return np.diff(np.concatenate([[0], ends])).tolist()


def compressed(counts: list[int]) -> str:
    """Run lengths as pycocotools writes them."""
    text = []
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + (bits | 32 if more else bits)))
            if not more:
                break
    return "".join(text)


def polygons(region: np.ndarray) -> list[list[float]]:
    """Outlines of a region as x, y, x, y, ..."""
    return [(ring + 0.5).ravel().tolist() for ring in outlines(region, 0.0)]


def coco(path: Path, masks: Masks, kind: str) -> Path:
    """COCO JSON with "polygon", "counts" (plain) or "compressed" masks."""
    annotations = []
    for image, mask in enumerate(masks.values(), start=1):
        for category in sorted(set(np.unique(mask).tolist()) - {0}):
            counts = runs((mask == category).T.ravel())
            shape: Any = {"size": list(mask.shape), "counts": counts if kind == "counts" else compressed(counts)}
            if kind == "polygon":
                shape = polygons(mask == category)
            crowd = int(kind == "counts")
            annotations.append({"id": len(annotations), "image_id": image, "category_id": category, "iscrowd": crowd})
            annotations[-1]["segmentation"] = shape
    images = [
        {"id": image, "file_name": f"{name}.png", "height": mask.shape[0], "width": mask.shape[1]}
        for image, (name, mask) in enumerate(masks.items(), start=1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, start=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def brush(region: np.ndarray) -> list[int]:
    """A region as Label Studio's run lengths of RGBA bytes: words of 8 bits, lengths of 3, 4, 8 or 16 bits."""
    values = np.repeat(np.where(region, 255, 0).astype(np.uint8).ravel(), 4)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1, [len(values)]])
    bits = [f"{len(values):032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in (3, 4, 8, 16))]
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for at in range(start, end, 1 << 16):
            length = min(1 << 16, end - at) - 1
            choice = next(i for i, size in enumerate((3, 4, 8, 16)) if length < 1 << size)
            if length == 3:  # different values, spelled out
                bits.append(f"0{choice:02b}{length:0{(3, 4, 8, 16)[choice]}b}" + f"{values[at]:08b}" * 4)
            else:
                bits.append(f"1{choice:02b}{length:0{(3, 4, 8, 16)[choice]}b}{values[at]:08b}")
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


def region(kind: str, label: str, size: tuple[int, int], value: dict[str, Any]) -> dict[str, Any]:
    """A region of Label Studio; `kind` is such as "brushlabels"."""
    sides = {"original_height": size[0], "original_width": size[1], "image_rotation": 0}
    return {"id": "r", "type": kind, "from_name": "tag", **sides, "value": {**value, kind: [label]}}


def label_studio(path: Path, masks: Masks, kind: str) -> Path:
    """Label Studio's JSON with "brush" or "polygon" regions, or its "min" form with brushes."""
    tasks: list[dict[str, Any]] = []
    for number, (name, mask) in enumerate(masks.items(), start=1):
        height, width = mask.shape
        size = height, width
        regions = []
        for index, label in enumerate(NAMES, start=1):
            part = mask == index
            if kind == "polygon":
                for ring in polygons(part):
                    points = [[x / width * 100, y / height * 100] for x, y in zip(ring[::2], ring[1::2], strict=True)]
                    regions.append(region("polygonlabels", label, size, {"points": points}))
            elif part.any():
                regions.append(region("brushlabels", label, size, {"format": "rle", "rle": brush(part)}))
        image = f"/data/upload/1/0a1b2c3d-{name}.png"
        if kind == "min":
            tag = [{**item["value"], "original_height": height, "original_width": width} for item in regions]
            tasks.append({"image": image, "id": number, "tag": tag, "annotator": 1, "annotation_id": number})
        else:
            done = [{"id": number, "was_cancelled": False, "result": regions}]
            tasks.append({"id": number, "annotations": done, "data": {"image": image}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tasks))
    return path


def voc(root: Path, masks: Masks, *, labelmap: bool, splits: Mapping[str, list[str]] | None = None) -> Path:
    """SegmentationClass with CVAT's labelmap.txt, or with palette indices."""
    colours = np.array([[0, 0, 0], [250, 50, 83], [51, 221, 255]], np.uint8)
    for name, mask in masks.items():
        if labelmap:
            save(colours[mask], root / "SegmentationClass" / f"{name}.png")
        else:
            picture = Image.fromarray(mask)
            picture.putpalette(colours.ravel().tolist())
            save(picture, root / "SegmentationClass" / f"{name}.png")
    if labelmap:
        lines = ["# label:color_rgb:parts:actions", "background:0,0,0::"]
        lines += [f"{name}:{','.join(map(str, colours[i]))}::" for i, name in enumerate(NAMES, start=1)]
        (root / "labelmap.txt").write_text("\n".join(lines))
    for split, members in (splits or {}).items():
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(members))
    return root


def cvat(path: Path, masks: Masks) -> Path:
    """CVAT's own XML: the first class as bitmaps of its bounds, the second as polygons over it."""
    lines = ["<annotations><version>1.1</version>"]
    for number, (name, mask) in enumerate(masks.items()):
        lines.append(f'<image id="{number}" name="{name}.png" width="{mask.shape[1]}" height="{mask.shape[0]}">')
        for ring in polygons(mask == 2):
            points = ";".join(f"{x:.2f},{y:.2f}" for x, y in zip(ring[::2], ring[1::2], strict=True))
            lines.append(f'<polygon label="{NAMES[1]}" points="{points}" z_order="1"/>')
        rows, columns = np.nonzero(mask == 1)
        if len(rows):
            part = (mask == 1)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            sides = f'left="{columns.min()}" top="{rows.min()}" width="{part.shape[1]}" height="{part.shape[0]}"'
            text = ", ".join(map(str, runs(part.ravel())))
            lines.append(f'<mask label="{NAMES[0]}" rle="{text}" {sides} z_order="0"/>')
        lines.append("</image>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join([*lines, "</annotations>"]))
    return path


def supervisely(folder: Path, masks: Masks) -> Path:
    """Supervisely's ann/NAME.png.json with bitmaps."""
    for name, mask in masks.items():
        objects = []
        for index in (1, 2):
            rows, columns = np.nonzero(mask == index)
            if not len(rows):
                continue
            part = (mask == index)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            file = io.BytesIO()
            rgba = np.zeros((*part.shape, 4), np.uint8)
            rgba[part] = 255
            Image.fromarray(rgba).save(file, "PNG")
            data = base64.b64encode(zlib.compress(file.getvalue())).decode()
            bitmap = {"data": data, "origin": [int(columns.min()), int(rows.min())]}
            objects.append({"classTitle": NAMES[index - 1], "geometryType": "bitmap", "bitmap": bitmap})
        size = {"height": mask.shape[0], "width": mask.shape[1]}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png.json").write_text(json.dumps({"size": size, "objects": objects}))
    return folder
