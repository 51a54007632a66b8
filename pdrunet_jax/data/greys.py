"""Grey levels of images: the scaling of deep ones to [0, 255], and what looks wrong."""

import numpy as np

LOW_CONTRAST = 16
"""Grey levels; an image with no more `contrast` shows next to nothing."""


def scale_by_range(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Scale finite numbers to float32 in [0, 255], from the darkest to the brightest; a constant image becomes 0.

    Pixels that are farther than 3 times the span of the 0.1 and 99.9 percentiles beyond them are dead or burnt out: on
    that side, the range ends at the percentile. Only pixels that are `valid` (bool, same shape) count.
    """
    counted = values if valid is None else values[valid]
    if not counted.size:
        return np.zeros(values.shape, np.float32)
    low, high = (float(value) for value in np.percentile(counted, (0.1, 99.9)))
    darkest, brightest = float(counted.min()), float(counted.max())
    reach = 3.0 * (high - low) or np.inf  # nearly all pixels have one value: the others must still show
    low = darkest if low - darkest <= reach else low
    high = brightest if brightest - high <= reach else high
    if low == high:
        return np.zeros(values.shape, np.float32)
    scaled = values.astype(np.float64)
    scaled -= low  # in place: large radiographs take enough memory as it is
    scaled *= 255.0 / (high - low)
    result: np.ndarray = np.clip(scaled, 0, 255, out=scaled).astype(np.float32)
    return result


def contrast(pixels: np.ndarray) -> int:
    """Grey levels between the darkest and brightest 0.5 % of pixels in [0, 255]."""
    rounded = pixels if pixels.dtype == np.uint8 else np.rint(pixels).astype(np.uint8)
    counts = np.cumsum(np.bincount(rounded.ravel(), minlength=256))
    low, high = np.searchsorted(counts, np.array([0.005, 0.995]) * counts[-1])
    return int(high - low)


def low_contrast(pixels: np.ndarray) -> str | None:
    """What is odd about an image (H, W, C) in [0, 255] that shows next to nothing; None for others."""
    if pixels.size and pixels.min() == pixels.max():
        return "every pixel has the same grey level"
    if contrast(pixels) <= LOW_CONTRAST:
        return f"99 % of the pixels lie within {LOW_CONTRAST} of 256 grey levels"
    return None
