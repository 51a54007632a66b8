"""Pixels in and out of the network: scaled grey values, probabilities, classes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Array = jax.Array | np.ndarray


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


def _namespace(array: Array) -> Any:
    """`numpy` or `jax.numpy`, whichever `array` belongs to (array API standard)."""
    return array.__array_namespace__()


def unit_range(pixels: jax.Array | np.ndarray, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Divide uint8 values of any shape by 255, correctly rounded to `dtype`, as NumPy and PyTorch do.

    This is a look-up: XLA compiles a division by a constant into a product with the reciprocal, which is off by one
    unit in the last place for about half of the values.
    """
    table = np.arange(256, dtype=dtype) / np.asarray(255, dtype)
    return jnp.asarray(table)[pixels]
