"""What anatomy knows and a network does not: a bone has one part and no holes. Applied to masks of class indices."""

from dataclasses import dataclass

import numpy as np

from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.runtime.errors import UserError

_TOUCHING = np.ones((3, 3), np.int8)
"""Pixels that touch by a corner belong to one part, as in `pdrunet_jax.data.contours`."""


@dataclass(frozen=True)
class Cleaning:
    """What is done to a mask, to each class by itself; the default is nothing.

    Raises `UserError` for numbers below 0.
    """

    largest: int = 0
    """Keep so many of the largest connected parts of each class; 0 keeps all."""
    min_area: int = 0
    """Remove connected parts of fewer pixels, counted at the image's own resolution."""
    fill_holes: bool = False
    """Fill background that a class encloses."""

    def __post_init__(self) -> None:
        for name, value in (("largest", self.largest), ("min-area", self.min_area)):
            if value < 0:
                raise UserError(f"--{name} {value}: give 0 or more")


def clean(mask: np.ndarray, rules: Cleaning) -> np.ndarray:
    """A mask (H, W) of class indices after `rules`, of the same type; the argument is left as it is.

    Small parts go first, and become background; holes are filled last, so that one is closed which a small part of
    another class has left. What another class fills is no hole. `IGNORE` is no class.
    """
    cleaned = mask.copy()
    classes = [index for index in np.unique(mask).tolist() if index not in (0, IGNORE)]
    if rules.largest or rules.min_area:
        for index in classes:
            cleaned[_small_parts(mask == index, rules)] = 0
    if rules.fill_holes:
        import scipy.ndimage

        for index in classes:
            enclosed = scipy.ndimage.binary_fill_holes(cleaned == index)
            cleaned[enclosed & (cleaned == 0)] = index
    return cleaned


def _small_parts(region: np.ndarray, rules: Cleaning) -> np.ndarray:
    """Those pixels of a boolean `region` (H, W) that do not stay."""
    import scipy.ndimage

    parts, count = scipy.ndimage.label(region, _TOUCHING)
    areas = np.bincount(parts.ravel(), minlength=count + 1)
    stays = areas >= rules.min_area
    if rules.largest:
        order = np.argsort(-areas[1:], kind="stable") + 1  # of two of one size the upper one stays
        stays[order[rules.largest :]] = False
    stays[0] = True  # what is not in the region does not change
    return np.asarray(~stays[parts])
