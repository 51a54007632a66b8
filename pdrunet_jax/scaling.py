"""Grey values as the network takes them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def unit_range(pixels: jax.Array | np.ndarray, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """uint8 values of any shape divided by 255, correctly rounded to `dtype`, as NumPy and PyTorch divide.

    Looked up, because XLA compiles a division by a constant into a product with its reciprocal, which is off by one
    unit in the last place for about half of the values.
    """
    table = np.arange(256, dtype=dtype) / np.asarray(255, dtype)
    return jnp.asarray(table)[pixels]
