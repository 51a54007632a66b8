"""Boundary distances between two masks (HD95, ASSD, surface Dice) and the relative area error, in NumPy and SciPy.

A boundary is a set of pixels. Distances are Euclidean between pixel centres, in mm if the spacing is known, else in
pixels. docs/metrics.md lists formulas and conventions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

PERCENTILE = 95
ROUNDING = 1e-9
"""Relative slack on the tolerance: three pixels of 0.1 mm are 0.30000000000000004 mm and still within 0.3 mm."""


@dataclass(frozen=True)
class Distances:
    """Boundary distances in mm, or in pixels without a spacing; NaN where undefined."""

    hd95: float
    """Larger of the 95th percentiles of the two directions."""
    assd: float
    """Mean over the boundary pixels of both masks, each pixel counting once."""
    nsd: float
    """Surface Dice: share of both masks' boundary pixels within the tolerance of the other boundary, in [0, 1]."""


def distances(prediction: Mask, truth: Mask, *, spacing: Sequence[float] | None = None, tolerance: float) -> Distances:
    """Compare the boundaries of two masks. The result is symmetric in the masks.

    If either mask is empty, `hd95` and `assd` are NaN. `nsd` is 0 if one mask is empty and NaN if both are.

    Set ignored pixels to background in both masks first. A mask cut there gets an edge along the cut; where both masks
    are cut, they share that edge, and its zero distances lower `hd95` and `assd` and raise `nsd`.

    Args:
        prediction: Booleans (H, W).
        truth: Booleans (H, W).
        spacing: Distance between rows and between columns in mm; None measures in pixels.
        tolerance: Largest distance, in mm or pixels, at which `nsd` counts a boundary pixel as correct.

    Raises:
        ValueError: The masks differ in shape, do not have two axes or are not boolean; `tolerance` is negative or not
            finite; `spacing` is not two positive finite numbers.
    """
    _check_masks(prediction, truth)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance is {tolerance}; it must be finite and not negative")
    sampling = (1.0, 1.0) if spacing is None else tuple(map(float, spacing))
    if len(sampling) != 2 or not all(math.isfinite(value) and value > 0 for value in sampling):
        raise ValueError(f"spacing is {sampling}; expected two positive numbers (row, column)")
    if not (prediction.any() and truth.any()):
        nsd = 0.0 if prediction.any() or truth.any() else math.nan
        return Distances(hd95=math.nan, assd=math.nan, nsd=nsd)

    import scipy.ndimage  # takes a quarter of a second; training needs it at its end alone

    (box,) = scipy.ndimage.find_objects((prediction | truth).astype(np.uint8))
    predicted, true = _boundary(prediction[box]), _boundary(truth[box])
    there, back = _directed(predicted, true, sampling), _directed(true, predicted, sampling)
    both = np.concatenate([there, back])
    return Distances(
        hd95=float(max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE))),
        # Adding two sums is commutative to the last bit; one sum over `both` is not.
        assd=float((there.sum() + back.sum()) / both.size),
        nsd=float(np.mean(both <= tolerance * (1 + ROUNDING))),
    )


def area_error(prediction: Mask, truth: Mask) -> float:
    """Signed relative area error (predicted - true) / true; NaN for an empty truth, -1 for an empty prediction.

    The masks are booleans (H, W); areas are in pixels, because the spacing cancels. Raises `ValueError` if they
    differ in shape, do not have two axes or are not boolean.
    """
    _check_masks(prediction, truth)
    area = int(np.count_nonzero(truth))
    return (int(np.count_nonzero(prediction)) - area) / area if area else math.nan


def _boundary(mask: Mask) -> Mask:
    """Pixels of a mask with a 4-neighbour outside it, or on the image border."""
    around = np.pad(mask, 1)
    inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask & ~inside


def _directed(start: Mask, goal: Mask, sampling: Sequence[float]) -> NDArray[np.float64]:
    """Distance from each pixel of `start` to the nearest pixel of `goal`; both are non-empty."""
    import scipy.ndimage

    # Few pixels need a distance: compute it from nearest-pixel indices and skip the full distance array.
    nearest = scipy.ndimage.distance_transform_edt(
        ~goal, sampling=sampling, return_distances=False, return_indices=True
    )
    here = np.nonzero(start)
    rows, columns = ((nearest[axis][here] - here[axis]) * sampling[axis] for axis in (0, 1))
    return np.sqrt(rows * rows + columns * columns)


def _check_masks(prediction: Mask, truth: Mask) -> None:
    found = [f"{mask.dtype} {mask.shape}" for mask in (prediction, truth)]
    if prediction.ndim != 2 or prediction.dtype != np.bool_ or found[0] != found[1]:
        raise ValueError(f"prediction is {found[0]}, truth {found[1]}; expected booleans (H, W) of one shape")
