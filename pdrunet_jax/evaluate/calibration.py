"""How far predicted probabilities can be believed, and what each threshold would score.

Both are read from histograms of the probabilities at the input's own resolution, ignored pixels left out, so that no
image is kept. Of several classes each is held against the rest: its probability against whether the pixel is of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pdrunet_jax.data.masks import IGNORE

THRESHOLDS = tuple(number / 100 for number in range(1, 100))
"""0.01 to 0.99: those at which Dice is computed, exactly as `pdrunet_jax.inference.apply_threshold` would decide."""
_PER_BIN = 10
"""Histogram columns that make one bin of the reliability curve."""


@dataclass(frozen=True)
class Bin:
    """Pixels whose probability p is low < p <= high (0 counts as above 0)."""

    low: float
    high: float
    probability: float
    """Their mean probability."""
    frequency: float
    """The share of them that is of the class."""
    share: float
    """Their share of all pixels."""


@dataclass(frozen=True)
class Curves:
    """Calibration and threshold curve of one class."""

    pixels: int
    error: float
    """Expected calibration error: the mean over pixels of |probability - frequency| of their bin; NaN without any."""
    reliability: tuple[Bin, ...]
    """Ten bins of equal width, those without a pixel left out."""
    dice: tuple[float, ...]
    """The mean over images at each of `THRESHOLDS`; NaN where it is defined in no image."""

    @property
    def best(self) -> tuple[float, float]:
        """The threshold with the highest Dice, of several the one nearest 0.5, and that Dice.

        Raises `ValueError` where it is defined at none.
        """
        top = max(dice for dice in self.dice if not math.isnan(dice))
        ties = [at for at, dice in zip(THRESHOLDS, self.dice, strict=True) if dice >= top - 1e-12]
        return min(ties, key=lambda at: abs(at - 0.5)), top

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; None where there is nothing to compute from."""
        return {
            "pixels": self.pixels,
            "expected_calibration_error": None if math.isnan(self.error) else self.error,
            "reliability": [asdict(each) for each in self.reliability],
            "thresholds": list(THRESHOLDS),
            "dice": [None if math.isnan(dice) else dice for dice in self.dice],
        }


class Histogram:
    """What `Curves` need of any number of images, for one class.

    `empty` is the Dice of an image where the class is neither true nor predicted; NaN leaves it out.
    """

    def __init__(self, empty: float = 1.0) -> None:
        bins = len(THRESHOLDS) + 1
        self._empty = empty
        self._pixels, self._true = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
        self._sums, self._dice, self._images = np.zeros(bins), np.zeros(bins - 1), np.zeros(bins - 1)

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Count one image: the probability of the class, float32, and whether each pixel is of it, in one shape."""
        probability, truth = probability.ravel(), truth.ravel()
        # The thresholds that a pixel exceeds; in float32, as probabilities are compared with a threshold.
        columns = np.searchsorted(np.asarray(THRESHOLDS, np.float32), probability, side="left")
        bins = len(self._pixels)
        pixels, true = np.bincount(columns, minlength=bins), np.bincount(columns[truth], minlength=bins)
        predicted, hits = (counts[::-1].cumsum()[::-1][1:] for counts in (pixels, true))
        both = predicted + true.sum()
        self._pixels += pixels
        self._true += true
        self._sums += np.bincount(columns, weights=probability, minlength=bins)
        dice = np.where(both > 0, 2 * hits / np.maximum(both, 1), self._empty)
        self._dice += np.nan_to_num(dice)
        self._images += ~np.isnan(dice)

    def counts(self) -> list[list[float]]:
        """All that was counted, as JSON values."""
        return [array.tolist() for array in self._counts()]

    def add_counts(self, counts: Sequence[Sequence[float]]) -> None:
        """Count the images of another histogram, by its `counts`."""
        for own, other in zip(self._counts(), counts, strict=True):
            own += np.asarray(other, own.dtype)

    def _counts(self) -> tuple[np.ndarray, ...]:
        return self._pixels, self._true, self._sums, self._dice, self._images

    def curves(self) -> Curves:
        """Of all images so far."""
        pixels, true, sums = (
            counts.reshape(-1, _PER_BIN).sum(axis=1) for counts in (self._pixels, self._true, self._sums)
        )
        total, width = int(pixels.sum()), _PER_BIN / len(self._pixels)
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
        dice = np.where(self._images, self._dice / np.maximum(self._images, 1), math.nan)
        return Curves(total, error if total else math.nan, reliability, tuple(dice.tolist()))


class Histograms:
    """A `Histogram` of each of the foreground classes `names`."""

    def __init__(self, names: Sequence[str], empty: float = 1.0) -> None:
        self._of = {name: Histogram(empty) for name in names}

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Count one image.

        Args:
            probability: float32 (H, W) of the one class, or (H, W, K) with background first.
            truth: (H, W) class indices; `IGNORE` is left out.
        """
        counted = truth != IGNORE
        true = truth[counted]
        for index, histogram in enumerate(self._of.values(), 1):
            of_class = probability if probability.ndim == 2 else probability[..., index]
            histogram.add(of_class[counted], true == index)

    def counts(self) -> dict[str, list[list[float]]]:
        """As `Histogram.counts`, of each class."""
        return {name: histogram.counts() for name, histogram in self._of.items()}

    def add_counts(self, counts: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """As `Histogram.add_counts`, of each class."""
        for name, histogram in self._of.items():
            histogram.add_counts(counts[name])

    def curves(self) -> dict[str, Curves]:
        """The curves of each class by its name."""
        return {name: histogram.curves() for name, histogram in self._of.items()}
