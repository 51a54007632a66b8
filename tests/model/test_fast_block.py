"""A block with its own gradient against automatic differentiation, where the normalisation is hard to compute."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pdrunet_jax.model.fast.block import LayerWeights, Shortcut, block
from pdrunet_jax.model.fast.convolution import EPSILON, convolve, per_channel

CHANNELS = 6


def plain(x: jax.Array, first: LayerWeights, second: LayerWeights, shortcut: Shortcut) -> jax.Array:
    """The block as it is written down, for JAX to differentiate."""

    def normalised(x: jax.Array, weights: LayerWeights) -> jax.Array:
        z = convolve(x, weights.kernel)
        mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
        z_hat = (z - per_channel(mean)) * per_channel(lax.rsqrt(var + EPSILON))
        return z_hat * per_channel(weights.scale) + per_channel(weights.shift)

    c1 = jax.nn.relu(normalised(x, first))
    skip = {"none": jnp.zeros_like(x), "input": x, "conv1": c1}[shortcut]
    return jax.nn.relu(normalised(c1, second) + skip)


def operands(mean: float, deviation: float, dtype: str) -> Any:
    rng = np.random.default_rng(0)
    centre = np.zeros((3, 3, CHANNELS, CHANNELS))
    centre[1, 1] = np.eye(CHANNELS)  # passes the mean on as it is, without a border where it differs
    kernels = (centre, rng.standard_normal(centre.shape) / 7)
    weights = [LayerWeights(kernel, *rng.uniform(0.5, 1.5, (2, CHANNELS))) for kernel in kernels]
    # Rounded to float32 whatever the dtype: all computations then see the same numbers.
    x = np.float32(mean + deviation * rng.standard_normal((2, 16, 12, CHANNELS)))
    g = np.float32(rng.standard_normal(x.shape))
    return jax.tree.map(lambda a: jnp.asarray(np.float32(a), dtype), (x, weights, g))


def gradients(function: Any, mean: float, deviation: float, dtype: str) -> Any:
    x, weights, g = operands(mean, deviation, dtype)
    out, back = jax.vjp(function, x, *weights)
    return jax.tree.map(lambda a: np.asarray(a, "float64"), (out, *back(g)))


@pytest.mark.parametrize("shortcut", ["none", "input", "conv1"])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1000.0, 1.0), (0.0, 1e-4)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_its_gradient_survives_a_large_mean_and_a_small_deviation(
    dtype: str, mean: float, deviation: float, shortcut: Shortcut
) -> None:
    with jax.enable_x64(True):
        want = gradients(lambda *args: plain(*args, shortcut), mean, deviation, "float64")
        got = gradients(lambda *args: block(*args, shortcut, 1)[0], mean, deviation, dtype)
    # An input of 1000 +- 1 is known to 6e-5 of its deviation in float32, and so is what comes of it.
    scale = max(1.0, mean / deviation / 20)
    tolerance = scale * (5e-15 if dtype == "float64" else 3e-6)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())
