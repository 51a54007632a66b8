"""One differentiable block in training, two layers and the shortcut around them, with a gradient written by hand.

Automatic differentiation keeps the input, the convolution's result and the output of every layer for the gradient.
Here a block keeps three activations: its input and the results of its two convolutions. What follows from these by
multiply-adds, the activation between the layers and where the ReLUs were open, is computed again in the backward pass,
which costs it a few percent of its time and saves a third of its memory. The gradient through a normalisation is two
multiply-adds an element.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pdrunet_jax.model.fast.convolution import (
    EPSILON,
    channel_sum,
    channel_sum_of,
    convolution_gradients,
    convolve,
    moments,
    per_channel,
    pixel_count,
)

Shortcut = Literal["none", "input", "conv1"]
"""What is added before a block's last ReLU: nothing, its input, or what its first layer gave."""

Moments = tuple[jax.Array, jax.Array]
"""Mean and biased variance of each channel, (K,) and (K,)."""


class LayerWeights(NamedTuple):
    """The parameters of one layer. The convolution's bias would cancel in the normalisation, and is not among them."""

    kernel: jax.Array
    """(3, 3, C, K), in the dtype of the activations."""
    scale: jax.Array
    """(K,), in the dtype of the statistics."""
    shift: jax.Array
    """(K,), in the dtype of the statistics."""


class _Normalised(NamedTuple):
    """A convolution's result and what it is normalised with."""

    z: jax.Array
    mean: jax.Array
    inv: jax.Array
    """1 / sqrt(variance + epsilon)."""

    def before_relu(self, weights: LayerWeights, skip: jax.Array | None) -> jax.Array:
        """batch_norm(z) + skip, in the dtype of the statistics."""
        y = self.centred() * per_channel(self.inv * weights.scale) + per_channel(weights.shift)
        return y if skip is None else y + skip.astype(y.dtype)

    def centred(self) -> jax.Array:
        return self.z.astype(self.mean.dtype) - per_channel(self.mean)


_Saved = tuple[jax.Array, LayerWeights, LayerWeights, _Normalised, _Normalised]


def _block(
    x: jax.Array, first: LayerWeights, second: LayerWeights, shortcut: Shortcut, dilation: int
) -> tuple[jax.Array, Moments, Moments]:
    return _forward(x, first, second, shortcut, dilation)[0]


block = jax.custom_vjp(_block, nondiff_argnums=(3, 4))
block.__doc__ = """relu(bn2(conv2(c1)) + shortcut) with c1 = relu(bn1(conv1(x))), with the batch's own statistics.

Args, in order: x (N, H, W, C), the weights of the first and of the second layer, the shortcut, the dilation.

Returns the activation (N, H, W, K) in the dtype of x, and the moments of the two convolutions' results, through which
no gradient flows: they feed the running statistics.
"""


def _convolved(x: jax.Array, weights: LayerWeights, dilation: int) -> tuple[_Normalised, Moments]:
    z = convolve(x, weights.kernel, dilation)
    mean, var = moments(z.astype(weights.scale.dtype))
    return _Normalised(z, mean, lax.rsqrt(var + EPSILON)), (mean, var)


def _skip(shortcut: Shortcut, x: jax.Array, c1: jax.Array) -> jax.Array | None:
    return {"none": None, "input": x, "conv1": c1}[shortcut]


def _forward(
    x: jax.Array, first: LayerWeights, second: LayerWeights, shortcut: Shortcut, dilation: int
) -> tuple[tuple[jax.Array, Moments, Moments], _Saved]:
    one, moments1 = _convolved(x, first, dilation)
    c1 = jax.nn.relu(one.before_relu(first, None)).astype(x.dtype)
    two, moments2 = _convolved(c1, second, dilation)
    out = jax.nn.relu(two.before_relu(second, _skip(shortcut, x, c1))).astype(x.dtype)
    return (out, moments1, moments2), (x, first, second, one, two)


def _backward(
    shortcut: Shortcut, dilation: int, saved: _Saved, gradients: tuple[jax.Array, Moments, Moments]
) -> tuple[jax.Array, LayerWeights, LayerWeights]:
    x, first, second, one, two = saved
    d_out = gradients[0]
    # Nothing holds XLA on CPUs back from computing this in the forward pass and keeping it after all, unless it
    # depends on the gradient: on a zero, or on NaN where the gradient is not finite.
    later = one._replace(mean=one.mean + (0 * d_out.ravel()[0]).astype(one.mean.dtype))
    c1 = jax.nn.relu(later.before_relu(first, None)).astype(x.dtype)

    d_y = jnp.where(two.before_relu(second, _skip(shortcut, x, c1)) > 0, d_out.astype(second.scale.dtype), 0)
    d_c1, d_second = _layer_gradient(c1, second, two, d_y, dilation)
    d_skip = d_y.astype(x.dtype)
    if shortcut == "conv1":
        d_c1 = d_c1 + d_skip
    d_y = jnp.where(c1 > 0, d_c1, 0).astype(first.scale.dtype)
    d_x, d_first = _layer_gradient(x, first, one, d_y, dilation)
    return (d_x + d_skip if shortcut == "input" else d_x), d_first, d_second


def _layer_gradient(
    x: jax.Array, weights: LayerWeights, saved: _Normalised, d_y: jax.Array, dilation: int
) -> tuple[jax.Array, LayerWeights]:
    """Gradients of a layer's input and weights from that of what enters its ReLU, zero where the ReLU was shut."""
    pixels = pixel_count(d_y)
    d_shift = channel_sum(d_y)
    d_scale = channel_sum_of(lambda d_y, z: d_y * saved._replace(z=z).centred(), d_y, saved.z) * saved.inv
    # Depends on a sum of the gradient, so that XLA does not keep what it has computed of this before.
    saved = saved._replace(mean=saved.mean + 0 * d_shift)
    a = saved.inv * weights.scale
    # d z = a (d_y - mean(d_y) - z_hat mean(d_y z_hat)), Ioffe and Szegedy (2015), as two multiply-adds an element.
    c1, c0 = a * saved.inv * d_scale / pixels, a * d_shift / pixels
    d_z = (per_channel(a) * d_y - per_channel(c1) * saved.centred() - per_channel(c0)).astype(x.dtype)
    d_x, d_kernel = convolution_gradients(x, weights.kernel, d_z, dilation)
    return d_x, LayerWeights(d_kernel, d_scale, d_shift)


block.defvjp(_forward, _backward)
