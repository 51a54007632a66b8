"""Mask cleaning: keep the largest components, remove small ones, fill holes."""

from dataclasses import dataclass

import numpy as np

from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.runtime.errors import UserError

_EIGHT_CONNECTED = np.ones((3, 3), np.int8)  # diagonal neighbours are connected, as in `data/labelme/contours.py`


@dataclass(frozen=True)
class Cleaning:
    """Cleaning rules, applied to each class separately; by default none. Negative numbers raise `UserError`."""

    largest: int = 0
    """Keep only the N largest connected components of each class; 0 keeps all."""
    min_area: int = 0
    """Remove connected components smaller than this many pixels at the image's own resolution."""
    fill_holes: bool = False
    """Fill background enclosed by a class."""

    def __post_init__(self) -> None:
        for name, value in (("largest", self.largest), ("min-area", self.min_area)):
            if value < 0:
                raise UserError(f"--{name} {value}: give 0 or more")


def clean(mask: np.ndarray, rules: Cleaning) -> np.ndarray:
    """Apply `rules` to a mask (H, W) of class indices, or to each layer of (H, W, K); returns a new array.

    Small components become background first, so that the holes they leave in another class are then filled. A region
    of another class is not a hole. `IGNORE` is not a class.
    """
    if mask.ndim == 3:
        return np.stack([clean(layer, rules) for layer in np.moveaxis(mask, -1, 0)], axis=-1)
    cleaned = mask.copy()
    if rules == Cleaning():
        return cleaned
    import scipy.ndimage  # takes about a second; most predictions need no cleaning

    classes = [index for index in np.unique(mask).tolist() if index not in (0, IGNORE)]
    if rules.largest or rules.min_area:
        for index in classes:
            components, count = scipy.ndimage.label(mask == index, _EIGHT_CONNECTED)
            areas = np.bincount(components.ravel(), minlength=count + 1)
            kept = areas >= rules.min_area
            if rules.largest:
                order = np.argsort(-areas[1:], kind="stable") + 1  # of components of equal size, the upper is kept
                kept[order[rules.largest :]] = False
            kept[0] = True  # pixels outside the class do not change
            cleaned[~kept[components]] = 0
    if rules.fill_holes:
        for index in classes:
            enclosed = scipy.ndimage.binary_fill_holes(cleaned == index)
            cleaned[enclosed & (cleaned == 0)] = index
    return cleaned
