"""Images larger than memory, computed tile by tile, with the logits of the whole image up to rounding.

The network never changes the resolution, and a logit depends on no pixel farther than `RADIUS` from it. A tile is
therefore read with a halo of that width, whose own logits are thrown away. At the image's true border there is no halo:
there the network pads with zeros, as it does for the whole image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pdrunet_jax.model.network import BLOCKS

RADIUS = 2 * sum(BLOCKS.values())
"""Pixels, 316: each block has two 3x3 convolutions, each of which reaches as far as its dilation."""

MULTIPLE = 32
"""Sides that are multiples of this run fastest (`pdrunet_jax.phases`)."""


class Window(NamedTuple):
    """One axis of a tile: it is computed from pixels [start, stop), and keeps logits [first, last)."""

    start: int
    stop: int
    first: int
    last: int


def windows(length: int, core: int, halo: int) -> list[Window]:
    """Cover an axis of `length` pixels by windows of one size: nothing twice, nothing left out.

    The size is `core + 2 * halo`, rounded up to a `MULTIPLE`, or `length` if that is less. The last window is shifted
    inwards to end at the border, so that no window has another size.
    """
    size = -(-(core + 2 * halo) // MULTIPLE) * MULTIPLE
    if size >= length:
        return [Window(0, length, 0, length)]
    starts = [*range(0, length - size, size - 2 * halo), length - size]
    # Each begins where the one before ends: at the border, or where its own halo begins.
    ends = [start + size - halo for start in starts[:-1]] + [length]
    return [
        Window(start, start + size, first, last)
        for start, first, last in zip(starts, [0, *ends[:-1]], ends, strict=True)
    ]


def in_tiles(network: Callable[[np.ndarray], Any], images: np.ndarray, core: int, halo: int = RADIUS) -> np.ndarray:
    """Logits of images that are too large to be computed at once.

    All tiles have one shape, so that `network` is compiled once. Peak memory grows with the area of a tile, which is
    `core + 2 * halo` on a side, and only by the logits with that of the image.

    Args:
        network: from images (N, h, w, C) to logits (N, h, w, K).
        images: (N, H, W, C).
        core: pixels a side that a tile contributes.
        halo: pixels around it that are computed and thrown away. From `RADIUS` on the logits are those of the whole
            image, up to rounding; less is faster, and approximate.

    Returns:
        (N, H, W, K).

    Raises:
        ValueError: `core` is less than 1 or `halo` less than 0.
    """
    if core < 1 or halo < 0:
        raise ValueError(f"core = {core}, halo = {halo}: at least 1 and 0 pixels")
    height, width = images.shape[1:3]
    logits: np.ndarray | None = None
    for row in windows(height, core, halo):
        for column in windows(width, core, halo):
            tile = np.asarray(network(images[:, row.start : row.stop, column.start : column.stop]))
            if logits is None:
                logits = np.empty((*images.shape[:3], tile.shape[-1]), tile.dtype)
            logits[:, row.first : row.last, column.first : column.last] = tile[
                :,
                row.first - row.start : row.last - row.start,
                column.first - column.start : column.last - column.start,
            ]
    assert logits is not None  # an image has at least one window
    return logits
