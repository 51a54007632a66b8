"""Images of a bone and an implant that lies partly on it: classes that overlap."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("bone", "implant")


def drawn(number: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W) and its layers (H, W, 2), both uint8: brighter where bone and implant overlap."""
    rng = np.random.default_rng(number)
    layers = np.zeros((side, side, 2), np.uint8)
    left, top = rng.integers(side // 8, side // 2), rng.integers(side // 8, side // 2)
    layers[2:-2, left : left + side // 4, 0] = 1
    layers[top : top + side // 4, side // 8 : -side // 8, 1] = 1
    image = 30 + 90 * layers[..., 0].astype(int) + 60 * layers[..., 1] + rng.integers(0, 20, (side, side))
    return image.astype(np.uint8), layers


def save_overlapping(root: Path, form: str, count: int = 12, side: int = 32) -> Path:
    """Write a dataset folder; `form` is "folders", "suffixes", "bits" or "colours"."""
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 0]], np.uint8)
    (root / "images").mkdir(parents=True)
    for number in range(count):
        image, layers = drawn(number, side)
        Image.fromarray(image).save(root / f"images/x{number}.png")
        bits = layers[..., 0] + 2 * layers[..., 1]
        files = {f"x{number}.png": colours[bits] if form == "colours" else bits}
        if form in ("folders", "suffixes"):
            names = [f"{name}/x{number}.png" if form == "folders" else f"x{number}_{name}.png" for name in CLASSES]
            files = {name: layers[..., place] * np.uint8(255) for place, name in enumerate(names)}
        for name, pixels in files.items():
            path = root / "masks" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    declared = {
        "folders": "",
        "suffixes": "classes = { bone = 255, implant = 255 }\n",
        "bits": 'classes = { bone = "bit 0", implant = "bit 1" }\n',
        "colours": 'classes = { bone = ["#ff0000", "#ffff00"], implant = ["#00ff00", "#ffff00"] }\n',
    }[form]
    (root / "dataset.toml").write_text(declared, encoding="utf-8")
    return root
