"""How an image is fitted to the size that the network works at: stretched, padded, or at a fixed scale in mm.

Padding is black: it looks like what augmentation draws outside the image, and like the zeros that the convolutions see
beyond the border. In masks it has the value `PADDING`, which counts in neither loss nor scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.images import resize_image
from pdrunet_jax.data.masks import PADDING, resize_mask
from pdrunet_jax.runtime.errors import UserError

Spacing = tuple[float, float]
"""Millimetres between the centres of neighbouring rows, and of neighbouring columns."""


class Box(NamedTuple):
    """The rectangle of the network's input that the image fills, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def crop(self, values: np.ndarray) -> np.ndarray:
        """The part inside the rectangle of (H, W, ...)."""
        return values[self.top : self.top + self.height, self.left : self.left + self.width]

    def place(self, values: np.ndarray, size: tuple[int, int], around: int) -> np.ndarray:
        """An array of `size` (height, width) with `values` (h, w, ...) in the rectangle and `around` outside."""
        if values.shape[:2] == size:
            return values
        placed = np.full((*size, *values.shape[2:]), around, values.dtype)
        self.crop(placed)[...] = values
        return placed


@dataclass(frozen=True)
class Fit:
    """Size of the network's input, and how images are brought to it."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    mode: Literal["stretch", "pad"] = "stretch"
    """As `data.fit`."""
    spacing: float | None = None
    """As `data.spacing`: mm per pixel of the network's input."""

    @classmethod
    def of(cls, config: DataConfig) -> Self:
        """The fit that `config` sets."""
        return cls(config.height_width, config.fit, config.spacing)

    def box(self, shape: Sequence[int], spacing: Spacing | None = None) -> Box:
        """Where an image of `shape` (height, width, ...) lies in the network's input: in the middle.

        `spacing` is the image's own. Raises `UserError`, which does not name the image, if `self.spacing` is set and
        the image has no spacing or is too large.
        """
        height, width = self.size
        rows, columns = shape[:2]
        if self.mode == "stretch":
            return Box(0, 0, height, width)
        if self.spacing is not None:
            if spacing is None:
                raise UserError(
                    "its pixel spacing is unknown, and data.spacing needs it: give spacing in dataset.toml or in a "
                    "column of the manifest, or --spacing to predict"
                )
            inner = round(rows * spacing[0] / self.spacing) or 1, round(columns * spacing[1] / self.spacing) or 1
            if inner[0] > height or inner[1] > width:
                raise UserError(
                    f"at {self.spacing:g} mm per pixel (data.spacing) it has {inner[0]} x {inner[1]} pixels, more than "
                    f"the {height} x {width} that the network works at; give a larger size"
                )
        elif height * columns <= width * rows:
            inner = height, _scaled(columns, height, rows)
        else:
            inner = _scaled(rows, width, columns), width
        return Box((height - inner[0]) // 2, (width - inner[1]) // 2, *inner)

    def image(self, pixels: np.ndarray, spacing: Spacing | None = None) -> np.ndarray:
        """Fit (H, W, C) pixels in [0, 255], uint8 or float32: (height, width, C) uint8. Raises as `box`."""
        box = self.box(pixels.shape, spacing)
        return box.place(resize_image(pixels, (box.height, box.width)), self.size, 0)

    def mask(self, classes: np.ndarray, spacing: Spacing | None = None) -> np.ndarray:
        """Fit (H, W) uint8 class indices, by nearest neighbour. Raises as `box`."""
        box = self.box(classes.shape, spacing)
        return box.place(resize_mask(classes, (box.height, box.width)), self.size, PADDING)


def _scaled(side: int, numerator: int, denominator: int) -> int:
    """`side` times a fraction, rounded half up, at least 1; in integers, as in exported graphs."""
    return max(1, (2 * side * numerator + denominator) // (2 * denominator))
