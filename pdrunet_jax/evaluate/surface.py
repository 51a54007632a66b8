"""Distances between the boundaries of two masks, and the relative error of their areas. NumPy and SciPy only.

A boundary is a set of pixels, and its distances are Euclidean between centres of pixels, in the unit of the spacing.
docs/metrics.md has every formula and convention in one table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

PERCENTILE = 95
ROUNDING = 1e-9
"""Share of the tolerance by which a distance may exceed it and still be within."""


@dataclass(frozen=True)
class Distances:
    """How far apart two boundaries are, in mm if the spacing was given and else in pixels; NaN where undefined."""

    hd95: float
    """The larger of the 95th percentiles of the two directions."""
    assd: float
    """Mean over the boundary pixels of both masks, each pixel counting once."""
    nsd: float
    """Share in [0, 1] of the boundary pixels of both masks that lie within the tolerance of the other boundary."""
    hd: float
    """The largest distance of all: the Hausdorff distance."""


def boundary(mask: Mask) -> Mask:
    """The pixels of a mask that have one of their four neighbours outside it, or lie on the border of the image.

    Args:
        mask: Booleans (H, W).

    Returns:
        Booleans (H, W), a part of `mask`.

    Raises:
        ValueError: `mask` does not have two axes or is not boolean.
    """
    _check_mask("mask", mask)
    around = np.pad(mask, 1)
    inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask & ~inside


def distances(
    prediction: Mask,
    truth: Mask,
    *,
    spacing: Sequence[float] | None = None,
    tolerance: float,
    valid: Mask | None = None,
) -> Distances:
    """Compare the boundaries of two masks; exchanging the masks changes nothing.

    If one of the masks is empty or both are, no distance is defined and `hd95`, `assd` and `hd` are NaN. `nsd` is then
    0 for one empty mask, whose boundary the other misses altogether, and NaN for two.

    Pixels that are not valid are background in both masks. A mask that reaches into them therefore ends where they
    begin, and that edge is boundary. Where both masks do, they share the edge, and its distances of 0 lower `hd95` and
    `assd` and raise `nsd`.

    Args:
        prediction: Booleans (H, W).
        truth: Booleans (H, W).
        spacing: mm from one row to the next and from one column to the next; None counts in pixels.
        tolerance: The distance up to which a boundary pixel counts as right, in mm or pixels as above. A distance that
            exceeds it by no more than rounding counts too.
        valid: Booleans (H, W), False where pixels are to be ignored; None for nowhere.

    Raises:
        ValueError: The arrays differ in shape, do not have two axes or are not boolean; `tolerance` is negative or not
            finite; `spacing` is not two positive finite numbers.
    """
    _check_mask("prediction", prediction)
    _check_mask("truth", truth, prediction.shape)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance is {tolerance}; it must be finite and not negative")
    sampling = _sampling(spacing)
    if valid is not None:
        _check_mask("valid", valid, prediction.shape)
        prediction, truth = prediction & valid, truth & valid
    if not (prediction.any() and truth.any()):
        nsd = 0.0 if prediction.any() or truth.any() else math.nan
        return Distances(hd95=math.nan, assd=math.nan, nsd=nsd, hd=math.nan)

    box = _bounding_box(prediction | truth)
    predicted, true = boundary(prediction[box]), boundary(truth[box])
    there, back = _directed(predicted, true, sampling), _directed(true, predicted, sampling)
    both = np.concatenate([there, back])
    return Distances(
        hd95=float(max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE))),
        # Sums of the two directions first: adding them is commutative to the last bit, a sum over `both` is not.
        assd=float((there.sum() + back.sum()) / both.size),
        # Three pixels of 0.1 mm are 0.30000000000000004 mm in floating point, and not more than 0.3 mm.
        nsd=float(np.mean(both <= tolerance * (1 + ROUNDING))),
        hd=float(both.max()),
    )


def area_error(prediction: Mask, truth: Mask) -> float:
    """Signed relative error of the area, (predicted - true) / true: -1 for an empty prediction, 0 for the right area.

    Args:
        prediction: Booleans (H, W).
        truth: Booleans (H, W). The spacing cancels, so areas are counted in pixels.

    Returns:
        The error as a fraction of the true area; NaN where the truth is empty.

    Raises:
        ValueError: The arrays differ in shape, do not have two axes or are not boolean.
    """
    _check_mask("prediction", prediction)
    _check_mask("truth", truth, prediction.shape)
    area = int(np.count_nonzero(truth))
    return (int(np.count_nonzero(prediction)) - area) / area if area else math.nan


def _directed(start: Mask, goal: Mask, sampling: tuple[float, float]) -> NDArray[np.float64]:
    """From each pixel of `start` the distance to the nearest of `goal`; neither is empty."""
    # Distances are wanted at few pixels: taking them from the nearest pixels' indices spares an array of all.
    nearest = ndimage.distance_transform_edt(~goal, sampling=sampling, return_distances=False, return_indices=True)
    here = np.nonzero(start)
    rows, columns = ((nearest[axis][here] - here[axis]) * sampling[axis] for axis in (0, 1))
    return np.sqrt(rows * rows + columns * columns)


def _bounding_box(mask: Mask) -> tuple[slice, slice]:
    """The smallest rectangle that holds all of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _check_mask(name: str, mask: Mask, shape: tuple[int, ...] | None = None) -> None:
    if mask.ndim != 2:
        raise ValueError(f"{name} has the shape {mask.shape}; it must have two axes (H, W)")
    if mask.dtype != np.bool_:
        raise ValueError(f"{name} holds {mask.dtype}; it must be boolean, for example `classes == 1`")
    if shape is not None and mask.shape != shape:
        raise ValueError(f"{name} has the shape {mask.shape}, but the prediction has {shape}; they must be equal")


def _sampling(spacing: Sequence[float] | None) -> tuple[float, float]:
    if spacing is None:
        return 1.0, 1.0
    values = tuple(float(value) for value in spacing)
    if len(values) != 2 or not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"spacing is {values}; it must be two positive numbers (row, column)")
    return values[0], values[1]
