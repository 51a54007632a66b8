"""Intervals of means over images whose patients are of unequal size: a studentised bootstrap of whole patients."""

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2_000
CONFIDENCE = 0.95
FLOOR = 0.1
"""Share of the sample's standard error that a resample's counts as at the least."""
_CELLS = 1 << 22
"""Patients times resamples that are held in memory at a time."""


def interval(
    values: np.ndarray,
    patients: Sequence[str],
    seed: int = 0,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `values`, inside `bounds`; (NaN, NaN) for fewer than two patients.

    Images of a patient resemble each other, so whole patients are drawn with replacement, one fewer than there are
    (Rao and Wu 1988, doi 10.1080/01621459.1988.10478591). A resample's mean is the sum of its patients' scores over the
    number of their images: the ratio estimator, patients being of unequal size. How far it lies from the mean of all is
    taken in units of the resample's own standard error (the bootstrap-t: Hall 1988, doi 10.1214/aos/1176350933), which
    makes room for skewed scores and for few patients, where a percentile interval is too narrow. The unit is then the
    jackknife's standard error of all patients. Where nearly all scores are equal, a resample may have no spread at all;
    its standard error counts as `FLOOR` times that of all patients at the least, or the interval could be endless.

    docs/metrics.md says how often these intervals cover the true mean, and from how many patients on.
    """
    names, member = np.unique(np.asarray(patients), return_inverse=True)
    count = len(names)
    if count < 2:
        return math.nan, math.nan
    sizes = np.bincount(member, minlength=count)
    mean = float(np.mean(values))
    residuals = np.bincount(member, weights=values - mean, minlength=count)
    error = math.sqrt((count - 1) / count * float(np.sum((residuals / (sizes.sum() - sizes)) ** 2)))
    if error <= 1e-12 * abs(mean):
        return mean, mean
    moments = np.stack([sizes, residuals, residuals**2, residuals * sizes, sizes**2], axis=1, dtype=np.float64)
    generator, part = np.random.default_rng(seed), max(1, _CELLS // count)
    distances = np.concatenate(
        [
            _distances(generator, moments, min(part, resamples - start), FLOOR * error)
            for start in range(0, resamples, part)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    far_below, far_above = np.quantile(distances, [tail, 1 - tail])
    low, high = bounds
    return max(low, mean - float(far_above) * error), min(high, mean - float(far_below) * error)


def _distances(generator: np.random.Generator, moments: np.ndarray, resamples: int, least: float) -> np.ndarray:
    """Of `resamples` means their distances from the mean of all, in units of their standard errors."""
    count = len(moments)
    draws = count - 1
    drawn = generator.integers(count, size=(resamples, draws)) + count * np.arange(resamples)[:, None]
    times = np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count)
    images, total, squares, products, sizes = (times @ moments).T
    shift = total / images
    # The squares of the resample's own residuals, those of its own mean, summed over its patients.
    spread = squares - 2 * shift * products + shift**2 * sizes
    error = np.sqrt(np.maximum(spread, 0) * draws / max(draws - 1, 1)) / images
    return np.asarray(shift / np.maximum(error, least))
