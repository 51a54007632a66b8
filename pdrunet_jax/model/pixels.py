"""Pixels in and out of the network: scaled grey values, probabilities, classes. Importing it does not load JAX."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

if TYPE_CHECKING:
    import jax

Array: TypeAlias = "jax.Array | np.ndarray"


def probabilities(logits: Array, *, multilabel: bool = False) -> Any:
    """Convert logits (N, H, W, K) to probabilities of the same shape.

    The sigmoid for K = 1 or overlapping classes (`multilabel`), otherwise the softmax over K.
    """
    xp = _namespace(logits)
    if multilabel or logits.shape[-1] == 1:
        return 0.5 * (xp.tanh(0.5 * logits) + 1.0)  # the sigmoid, in a form that no logit makes overflow
    exponential = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return exponential / xp.sum(exponential, axis=-1, keepdims=True)


def predict_classes(logits: Array, *, multilabel: bool = False) -> Any:
    """Convert logits (N, H, W, K) to class indices (N, H, W), int32, or to 0 and 1 (N, H, W, K) with `multilabel`.

    K = 1: 1 where the probability is above 0.5, i.e. the logit above 0. Otherwise the most likely of the K classes, of
    which 0 is background; the lower index wins a tie.
    """
    xp = _namespace(logits)
    if multilabel:
        return (logits > 0).astype(xp.int32)
    if logits.shape[-1] == 1:
        return (logits[..., 0] > 0).astype(xp.int32)
    return xp.argmax(logits, axis=-1).astype(xp.int32)


def foreground_classes(outputs: int, *, multilabel: bool = False) -> int:
    """Number of classes without background of a network with this many outputs; all of them if classes overlap."""
    return outputs if multilabel else max(outputs - 1, 1)


def class_names(foreground: int, names: Sequence[str] | None) -> list[str]:
    """Names of the `foreground` classes of a network: `names` if there are as many, numbers otherwise."""
    if names and len(names) == foreground:
        return list(names)
    return ["foreground"] if foreground == 1 else [f"class_{index}" for index in range(1, foreground + 1)]


def average_logits(logits: Sequence[np.ndarray], *, multilabel: bool = False) -> np.ndarray:
    """Logits whose probabilities are the means of the probabilities of several `logits`, each (N, H, W, K).

    The same as `model.ensemble.average_logits`, in NumPy.
    """
    if len(logits) == 1:
        return logits[0]
    stacked = np.stack(logits)
    finite = np.isfinite(stacked).all(axis=0)
    stacked = np.where(finite, stacked, 0)
    if multilabel or stacked.shape[-1] == 1:  # log(p / (1 - p)), where the number of members cancels out
        positive, negative = (-np.logaddexp(0, -sign * stacked) for sign in (1, -1))
        mean = np.logaddexp.reduce(positive, axis=0) - np.logaddexp.reduce(negative, axis=0)
    else:  # log p, up to a constant
        total = np.logaddexp.reduce(stacked, axis=-1, keepdims=True)
        mean = np.logaddexp.reduce(stacked - total, axis=0) - np.float32(np.log(len(logits)))
    return np.where(finite, mean, np.nan).astype(stacked.dtype)


def _namespace(array: Array) -> Any:
    """`numpy` or `jax.numpy`, whichever `array` belongs to (array API standard)."""
    return array.__array_namespace__()


def unit_range(pixels: Array, dtype: DTypeLike = np.float32) -> "jax.Array":
    """Divide uint8 values of any shape by 255, correctly rounded to `dtype`, as NumPy and PyTorch do.

    This is a look-up: XLA compiles a division by a constant into a product with the reciprocal, which is off by one
    unit in the last place for about half of the values.
    """
    import jax.numpy as jnp  # engines other than JAX import this module

    table = np.arange(256, dtype=dtype) / np.asarray(255, dtype)
    return jnp.asarray(table)[pixels]
