"""Mask files of other tools as shapes: a bitmap with one class, or an index mask with several."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.images import open_upright, read_bytes
from pdrunet_jax.data.importers.files import is_inside, problem
from pdrunet_jax.data.labelme.read import Shape
from pdrunet_jax.data.masks import DEFAULT_THRESHOLD, MaskCoding, decode_codes

SOFT_VALUES = 16  # masks with at least this many greys have smoothed edges; with fewer, each grey means something
_SOFT_SHARE = 0.02


def read_bitmap(path: Path, name: str, root: Path) -> NDArray[np.bool_]:
    """Read a mask of one class below `root` as (H, W). Raises `DataError` that says `name`."""
    if not is_inside(path, root):
        raise problem(name, "a link that leads out of the folder; refused")
    return decode_bitmap(read_bytes(path, name), name)


def decode_bitmap(data: bytes, name: str) -> NDArray[np.bool_]:
    """Decode a mask of one class as (H, W): its alpha, if it has one, or else its grey values.

    Soft edges have more than two values; those from `DEFAULT_THRESHOLD` upwards count. Raises `DataError`.
    """
    image = open_upright(data, name)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image)
    elif "A" in image.getbands() or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        values = alpha if alpha.min() < 255 else np.asarray(image.convert("L"))
    elif image.mode == "P":
        values = np.asarray(image)
    else:
        values = np.asarray(image.convert("L"))
    highest = values.max()
    if not np.isin(values, (0, highest)).all():
        if image.mode == "P" or len(np.unique(values)) < SOFT_VALUES:
            raise problem(name, "a mask of several classes, where one of a single class is expected")
        if ((values > 0.1 * highest) & (values < 0.9 * highest)).mean() > _SOFT_SHARE or highest < DEFAULT_THRESHOLD:
            raise problem(name, "grey values all over: an image, or a mask saved with losses; save masks as PNG")
        return np.asarray(values >= DEFAULT_THRESHOLD)
    return np.asarray(values > 0)


def whole(label: str, size: tuple[int, int], pixels: Callable[[str], NDArray[np.bool_]]) -> Shape:
    """A shape with the pixels of a mask as large as the image, (height, width)."""
    return Shape(label, "mask", ((0.0, 0.0), (size[1] - 1.0, size[0] - 1.0)), pixels=pixels, size=size)


def bitmap_shape(path: Path, name: str, root: Path, label: str) -> Shape:
    """The shape in a mask file of one class. Raises `DataError`."""
    mask = read_bitmap(path, name, root)
    return whole(label, (mask.shape[0], mask.shape[1]), lambda _: mask)


def read_codes(path: Path, name: str, root: Path, coding: MaskCoding) -> np.ndarray:
    """Read a mask file below `root` as (H, W) codes (see `pdrunet_jax.data.masks`). Raises `DataError`."""
    if not is_inside(path, root):
        raise problem(name, "a link that leads out of the folder; refused")
    return decode_codes(read_bytes(path, name), name, coding)


def code_shapes(codes: np.ndarray, label_of: Mapping[int, str]) -> list[Shape]:
    """One shape for each code of `label_of` in (H, W) `codes`."""
    size = codes.shape[0], codes.shape[1]
    present = set(np.unique(codes).tolist())

    def pixels(code: int, _: str) -> NDArray[np.bool_]:
        return np.asarray(codes == code)

    return [whole(label, size, partial(pixels, code)) for code, label in label_of.items() if code in present]
