"""In-memory cache of resized images and masks as uint8, so that each file is decoded once."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pdrunet_jax.config import DataConfig

Resized = tuple[np.ndarray, np.ndarray]
"""An image (H, W, C) and its mask (H, W) or, if classes overlap, (H, W, K), all uint8."""


class Cache:
    """Resized samples of a dataset; takes memory only as it fills."""

    def __init__(self, count: int, size: tuple[int, int], channels: int, layers: tuple[int, ...] = ()) -> None:
        self.images = np.empty((count, *size, channels), np.uint8)
        self.masks = np.empty((count, *size, *layers), np.uint8)
        self._ready = np.zeros(count, np.bool_)

    def put(self, row: int, resized: Resized) -> None:
        """Keep the sample `row`. Threads may put the same sample twice: the pixels are the same."""
        self.images[row], self.masks[row] = resized
        self._ready[row] = True

    def hold(self, row: int, resized: Resized) -> None:
        """Like `put`, with mask values that `recode` has yet to turn into classes."""
        self.images[row], self.masks[row] = resized

    def recode(self, row: int, classes: np.ndarray) -> None:
        """Turn the held mask values of a sample into `classes` (256,), uint8 by value."""
        self.masks[row] = classes[self.masks[row]]
        self._ready[row] = True

    def take(self, rows: np.ndarray, read: Callable[[int], Resized]) -> Resized:
        """Images (N, H, W, C) and masks (N, H, W) of `rows`; missing ones are read with `read`."""
        for row in rows[~self._ready[rows]].tolist():
            self.put(row, read(row))
        return self.images[rows], self.masks[rows]


def keeps(config: DataConfig, count: int, channels: int, layers: int = 1) -> bool:
    """Whether to cache `count` samples: as `config.cache` says; "auto" does if they fit in a quarter of memory.

    Images have `channels` planes and masks `layers`.
    """
    height, width = config.height_width
    needed = count * height * width * (channels + layers)
    return config.cache == "memory" or (config.cache == "auto" and needed <= _memory() // 4)


def _memory() -> int:
    """Memory available to this process in bytes: the machine's, or its container's limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        total = 8 << 30
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    return min(total, int(limit)) if limit.isdigit() else total
