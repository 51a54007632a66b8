"""Confusion counts (tp, fp, fn, tn) and the overlap metrics computed from them.

The functions accept JAX arrays, inside or outside `jax.jit`, and NumPy arrays, and return the same kind. Use NumPy for
images of many sizes: JAX recompiles every operation for a new shape.
"""

import math
from typing import Any, NamedTuple

from pdrunet_jax.model.pixels import Array, _namespace


class Counts(NamedTuple):
    """Pixel counts per image and foreground class: four integer arrays of shape (N, K')."""

    tp: Any
    fp: Any
    fn: Any
    tn: Any


def confusion(prediction: Array, target: Array, valid: Array, classes: int) -> Counts:
    """Count true and false positives and negatives for every image and foreground class.

    Args:
        prediction: Class indices (N, H, W), or (N, H, W, K') of 0 and 1 if classes overlap.
        target: The same; the value is irrelevant where `valid` is False.
        valid: Booleans of the same shape; False excludes a pixel from all four counts.
        classes: Number of foreground classes K', with indices 1 to K'.
    """
    xp = _namespace(prediction)
    indices = xp.arange(1, classes + 1).reshape(1, 1, 1, classes)
    if prediction.ndim == 4:
        predicted, true, counted = prediction == 1, target == 1, valid
    else:
        predicted, true, counted = prediction[..., None] == indices, target[..., None] == indices, valid[..., None]

    def count(pixels: Array) -> Any:
        return xp.sum(pixels & counted, axis=(1, 2), dtype=xp.int32)

    return Counts(
        tp=count(predicted & true),
        fp=count(predicted & ~true),
        fn=count(~predicted & true),
        tn=count(~predicted & ~true),
    )


def dice(counts: Counts, empty: float = 1.0) -> Any:
    """Dice 2 tp / (2 tp + fp + fn), shape (N, K'); `empty` where truth and prediction are both empty.

    0 if only one of them is empty. If either has a pixel, this equals the public code's Dice at batch size 1.
    """
    return _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn, empty)


def iou(counts: Counts, empty: float = 1.0) -> Any:
    """Intersection over union tp / (tp + fp + fn), shape (N, K'); `empty` where truth and prediction are both empty."""
    return _ratio(counts.tp, counts.tp + counts.fp + counts.fn, empty)


def precision(counts: Counts, empty: float = math.nan) -> Any:
    """Precision tp / (tp + fp), shape (N, K'); `empty` where the prediction is empty."""
    return _ratio(counts.tp, counts.tp + counts.fp, empty)


def recall(counts: Counts, empty: float = math.nan) -> Any:
    """Recall (sensitivity) tp / (tp + fn), shape (N, K'); `empty` where the truth is empty."""
    return _ratio(counts.tp, counts.tp + counts.fn, empty)


def specificity(counts: Counts, empty: float = math.nan) -> Any:
    """Specificity tn / (tn + fp), shape (N, K'); `empty` where every pixel is foreground."""
    return _ratio(counts.tn, counts.tn + counts.fp, empty)


def _ratio(part: Array, whole: Array, empty: float) -> Any:
    xp = _namespace(part)
    defined = whole > 0
    # Divide by 1 where the quotient is discarded, to keep jax_debug_nans and NumPy's warnings quiet.
    return xp.where(defined, part / xp.where(defined, whole, 1), empty)
