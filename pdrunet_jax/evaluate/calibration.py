"""Calibration and threshold curves, accumulated over images as histograms of the predicted probability.

Probabilities are at the input's own resolution; ignored pixels are excluded. With several classes, each is compared
with the rest: its probability against whether the pixel belongs to it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pdrunet_jax.data.layers import counted, region

THRESHOLDS = tuple(number / 100 for number in range(1, 100))
"""Thresholds of the Dice curve, 0.01 to 0.99; the decisions equal `predict.threshold.apply_threshold`'s."""
_COLUMNS = len(THRESHOLDS) + 1
_PER_BIN = 10  # histogram columns in one bin of the reliability curve


@dataclass(frozen=True)
class Bin:
    """Pixels whose probability p is in (low, high]; p = 0 is in the first bin."""

    low: float
    high: float
    probability: float
    """Mean probability."""
    frequency: float
    """Share of these pixels that belong to the class."""
    share: float
    """Share of all pixels."""


@dataclass(frozen=True)
class Curves:
    """Calibration and threshold curve of one class."""

    pixels: int
    error: float
    """Expected calibration error: mean over pixels of |probability - frequency| of their bin; NaN without pixels."""
    reliability: tuple[Bin, ...]
    """Ten bins of equal width, without empty ones."""
    dice: tuple[float, ...]
    """Mean Dice over images at each of `THRESHOLDS`; NaN where no image defines it."""

    @property
    def best(self) -> tuple[float, float]:
        """Threshold with the highest Dice (of ties the nearest to 0.5), and that Dice.

        Raises `ValueError` if Dice is undefined at every threshold.
        """
        top = max(dice for dice in self.dice if not math.isnan(dice))
        ties = [at for at, dice in zip(THRESHOLDS, self.dice, strict=True) if dice >= top - 1e-12]
        return min(ties, key=lambda at: abs(at - 0.5)), top

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with None for NaN."""
        return {
            "pixels": self.pixels,
            "expected_calibration_error": None if math.isnan(self.error) else self.error,
            "reliability": [asdict(each) for each in self.reliability],
            "thresholds": list(THRESHOLDS),
            "dice": [None if math.isnan(dice) else dice for dice in self.dice],
        }


class Histograms:
    """Accumulates the counts for the `Curves` of each foreground class.

    Attributes:
        counts: (class, quantity, column) float64; the quantities are pixels, pixels of the class, sum of probabilities,
            sum of Dice, and images with a defined Dice. Add the arrays of two histograms to merge them.
    """

    def __init__(self, names: Sequence[str], empty: float = 1.0) -> None:
        """Start empty, for the classes `names`.

        `empty` is the Dice of an image whose truth and prediction are both empty; NaN excludes it.
        """
        self._names, self._empty = tuple(names), empty
        self.counts = np.zeros((len(self._names), 5, _COLUMNS))

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Add one image.

        Args:
            probability: float32 (H, W) of the only class, or (H, W, K) with background first, without it if classes
                overlap.
            truth: Class indices (H, W), or layers (H, W, K) if classes overlap; `IGNORE` is excluded.
        """
        for index, counts in enumerate(self.counts, 1):
            inside, channel = counted(truth, index), index - 1 if truth.ndim == 3 else index
            of_class = (probability if probability.ndim == 2 else probability[..., channel])[inside]
            is_class = region(truth, index)[inside]
            # Column = number of thresholds that the pixel exceeds, in float32 as `apply_threshold` compares them.
            columns = np.searchsorted(np.asarray(THRESHOLDS, np.float32), of_class, side="left")
            pixels, true = (np.bincount(part, minlength=_COLUMNS) for part in (columns, columns[is_class]))
            predicted, hits = (part[::-1].cumsum()[::-1][1:] for part in (pixels, true))
            both = predicted + true.sum()
            dice = np.where(both > 0, 2 * hits / np.maximum(both, 1), self._empty)
            counts[0] += pixels
            counts[1] += true
            counts[2] += np.bincount(columns, weights=of_class, minlength=_COLUMNS)
            counts[3, 1:] += np.nan_to_num(dice)
            counts[4, 1:] += ~np.isnan(dice)

    def curves(self) -> dict[str, Curves]:
        """Curves of each class over the images added so far."""
        return {name: _curves(counts) for name, counts in zip(self._names, self.counts, strict=True)}


def _curves(counts: np.ndarray) -> Curves:
    pixels, true, sums = counts[:3].reshape(3, -1, _PER_BIN).sum(axis=2)
    total, width = int(pixels.sum()), _PER_BIN / _COLUMNS
    reliability = tuple(
        Bin(
            low=round(number * width, 10),
            high=round((number + 1) * width, 10),
            probability=float(sums[number] / pixels[number]),
            frequency=float(true[number] / pixels[number]),
            share=float(pixels[number] / total),
        )
        for number in np.flatnonzero(pixels).tolist()
    )
    error = sum(each.share * abs(each.probability - each.frequency) for each in reliability)
    dice, images = counts[3:, 1:]
    means = np.where(images, dice / np.maximum(images, 1), math.nan)
    return Curves(total, error if total else math.nan, reliability, tuple(means.tolist()))
