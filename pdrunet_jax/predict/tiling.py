"""Tiled inference for images that do not fit in memory; same logits as the whole image, up to rounding.

A logit depends on no pixel farther away than the network's radius. Each tile is therefore computed with a halo of that
width, and the halo's own logits are discarded. At the image border there is no halo: the network pads with zeros there,
as it does for the whole image. Where a network halves the resolution, tiles begin at multiples of the largest square
that becomes one pixel: otherwise it would divide the image into other squares.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MULTIPLE = 32  # sides that are multiples of this are fastest (see `model/fast/phases.py`)


class Window(NamedTuple):
    """One axis of a tile: computed from pixels [start, stop), contributes logits [first, last)."""

    start: int
    stop: int
    first: int
    last: int


def windows(length: int, core: int, halo: int, multiple: int = 1) -> list[Window]:
    """Cover an axis of `length` pixels with windows of equal size that begin at multiples of `multiple`, a power of 2.

    Each pixel is covered exactly once. The size is `core + 2 * halo` rounded up to a `MULTIPLE`, or `length` if that is
    smaller. The last window is shifted inwards to end at the border, and larger where `multiple` does not divide the
    length.
    """
    halo = _round_up(halo, multiple)
    size = _round_up(core + 2 * halo, max(MULTIPLE, multiple))
    end = (length - size) // multiple * multiple
    if end <= 0:
        return [Window(0, length, 0, length)]
    starts = [*range(0, end, size - 2 * halo), end]
    stops = [start + size for start in starts[:-1]] + [length]
    # Each window contributes from the end of the previous one up to its own halo, or to the border.
    ends = [stop - halo for stop in stops[:-1]] + [length]
    return [Window(*window) for window in zip(starts, stops, [0, *ends[:-1]], ends, strict=True)]


def in_tiles(
    network: Callable[[np.ndarray], Any], images: np.ndarray, core: int, halo: int, multiple: int = 1
) -> np.ndarray:
    """Compute logits (N, H, W, K) tile by tile.

    `network` maps images (N, h, w, C) to logits (N, h, w, K). A tile contributes `core` pixels per side and is computed
    with `halo` more around them; from the network's radius on the result is exact up to rounding, less is faster and
    approximate. Tiles begin at multiples of `multiple`. All have one shape, except the last ones where `multiple` does
    not divide the image, so `network` is compiled once. Peak memory grows with the area of a tile
    (`core + 2 * halo` a side); only the logits grow with the image.

    Raises `ValueError` if `core` is below 1 or `halo` below 0.
    """
    if core < 1 or halo < 0:
        raise ValueError(f"core = {core}, halo = {halo}: they must be at least 1 and 0 pixels")
    height, width = images.shape[1:3]
    logits: np.ndarray | None = None
    for row in windows(height, core, halo, multiple):
        for column in windows(width, core, halo, multiple):
            tile = np.asarray(network(images[:, row.start : row.stop, column.start : column.stop]))
            if logits is None:
                logits = np.empty((*images.shape[:3], tile.shape[-1]), tile.dtype)
            logits[:, row.first : row.last, column.first : column.last] = tile[
                :,
                row.first - row.start : row.last - row.start,
                column.first - column.start : column.last - column.start,
            ]
    assert logits is not None  # every image has at least one window
    return logits


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
