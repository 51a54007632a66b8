"""Confidence intervals for means over images grouped by patient: a studentised bootstrap of whole patients."""

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2_000
CONFIDENCE = 0.95
FLOOR = 0.1  # lower limit of a resample's standard error, as a share of the sample's
_CELLS = 1 << 22  # patients times resamples held in memory at a time


def interval(
    values: np.ndarray, patients: Sequence[str], seed: int = 0, *, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values`, clipped to `bounds`; (NaN, NaN) for fewer than two patients.

    Images of one patient are correlated, so whole patients are drawn with replacement, one fewer than there are
    (Rao and Wu 1988, doi 10.1080/01621459.1988.10478591). A resample's mean is the sum of its scores divided by its
    number of images (ratio estimator, because patients have different numbers of images). Its distance from the overall
    mean is divided by the resample's own standard error (bootstrap-t: Hall 1988, doi 10.1214/aos/1176350933), which
    handles skewed scores and few patients, where a percentile interval is too narrow. The quantiles are scaled by the
    jackknife standard error of all patients. If nearly all scores are equal, a resample may have no spread; its
    standard error is at least `FLOOR` times the overall one, which keeps the interval finite.

    docs/metrics.md reports the measured coverage by number of patients.
    """
    names, member = np.unique(np.asarray(patients), return_inverse=True)
    count = len(names)
    if count < 2:
        return math.nan, math.nan

    # Jackknife standard error of the mean of all images.
    sizes = np.bincount(member, minlength=count)
    mean = float(np.mean(values))
    residuals = np.bincount(member, weights=values - mean, minlength=count)
    error = math.sqrt((count - 1) / count * float(np.sum((residuals / (sizes.sum() - sizes)) ** 2)))
    if error <= 1e-12 * abs(mean):
        return mean, mean

    # Studentised distances of the resampled means, a bounded number of resamples at a time.
    moments = np.stack([sizes, residuals, residuals**2, residuals * sizes, sizes**2], axis=1, dtype=np.float64)
    generator, part = np.random.default_rng(seed), max(1, _CELLS // count)
    parts = [min(part, RESAMPLES - start) for start in range(0, RESAMPLES, part)]
    distances = np.concatenate([_distances(generator, moments, resamples, FLOOR * error) for resamples in parts])

    tail = (1 - CONFIDENCE) / 2
    far_below, far_above = np.quantile(distances, [tail, 1 - tail])
    low, high = bounds
    return max(low, mean - float(far_above) * error), min(high, mean - float(far_below) * error)


def _distances(generator: np.random.Generator, moments: np.ndarray, resamples: int, least: float) -> np.ndarray:
    """Distances of `resamples` means from the overall mean, each in units of its own standard error."""
    count = len(moments)
    draws = count - 1
    drawn = generator.integers(count, size=(resamples, draws)) + count * np.arange(resamples)[:, None]
    times = np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count)
    images, total, squares, products, sizes = (times @ moments).T
    shift = total / images
    # Squared residuals about the resample's own mean, summed over its patients.
    spread = squares - 2 * shift * products + shift**2 * sizes
    error = np.sqrt(np.maximum(spread, 0) * draws / max(draws - 1, 1)) / images
    return np.asarray(shift / np.maximum(error, least))
