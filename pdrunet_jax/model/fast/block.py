"""A block in training (Figure 2) as one function with a hand-written gradient.

Automatic differentiation keeps the input, the convolution's result and the output of every layer. This function keeps
three activations a block: its input and the results of its two convolutions. The activation between the layers and the
ReLUs' signs are multiply-adds away from these, and are computed again in the backward pass: a few percent more time, a
third less memory. The gradient through a normalisation is two multiply-adds an element.
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
"""Term added before a block's last ReLU: nothing, the block's input, or its first layer's output."""

Moments = tuple[jax.Array, jax.Array]
"""Mean and biased variance of each channel, (K,) and (K,)."""


class LayerWeights(NamedTuple):
    """Parameters of one layer, without the convolution's bias, which would cancel in the normalisation."""

    kernel: jax.Array
    """(3, 3, C, K), in the activations' dtype."""
    scale: jax.Array
    """(K,), in the statistics' dtype."""
    shift: jax.Array
    """(K,), in the statistics' dtype."""


class Norm(NamedTuple):
    """Normalisation of a convolution's result: (z - mean) * factor + shift, (C,) each."""

    mean: jax.Array
    factor: jax.Array
    shift: jax.Array


class BackwardNorm(NamedTuple):
    """Gradient through a normalisation, from the gradient g of its result: factor * g - slope * (z - mean) - offset."""

    z: jax.Array
    """Result of the convolution, in the layout of the kernels that take it."""
    mean: jax.Array
    factor: jax.Array
    slope: jax.Array
    offset: jax.Array


class Normalised(NamedTuple):
    """A convolution's result with its mean and inverse standard deviation."""

    z: jax.Array
    mean: jax.Array
    inv: jax.Array
    """1 / sqrt(variance + epsilon)."""

    def before_relu(self, weights: LayerWeights, skip: jax.Array | None) -> jax.Array:
        """batch_norm(z) + skip, in the statistics' dtype."""
        y = self.centred() * per_channel(self.inv * weights.scale) + per_channel(weights.shift)
        return y if skip is None else y + skip.astype(y.dtype)

    def centred(self) -> jax.Array:
        """Z - mean, in the statistics' dtype."""
        return self.z.astype(self.mean.dtype) - per_channel(self.mean)


_Saved = tuple[jax.Array, LayerWeights, LayerWeights, Normalised, Normalised]


def _block(
    x: jax.Array, first: LayerWeights, second: LayerWeights, shortcut: Shortcut, dilation: int
) -> tuple[jax.Array, Moments, Moments]:
    return _forward(x, first, second, shortcut, dilation)[0]


block = jax.custom_vjp(_block, nondiff_argnums=(3, 4))
block.__doc__ = """relu(bn2(conv2(c1)) + skip) with c1 = relu(bn1(conv1(x))), normalised with the batch's statistics.

Args, in order: x (N, H, W, C), weights of the first layer, weights of the second layer, shortcut, dilation.

Returns the activation (N, H, W, K) in the dtype of x, and the moments of the two convolutions' results for the running
statistics; no gradient flows through the moments.
"""


def _convolved(x: jax.Array, weights: LayerWeights, dilation: int) -> tuple[Normalised, Moments]:
    z = convolve(x, weights.kernel, dilation)
    mean, var = moments(z.astype(weights.scale.dtype))
    return Normalised(z, mean, lax.rsqrt(var + EPSILON)), (mean, var)


def skip_of(shortcut: Shortcut, x: jax.Array, c1: jax.Array) -> jax.Array | None:
    """The term that `shortcut` adds, of a block's input and its first layer's output."""
    return {"none": None, "input": x, "conv1": c1}[shortcut]


def _forward(
    x: jax.Array, first: LayerWeights, second: LayerWeights, shortcut: Shortcut, dilation: int
) -> tuple[tuple[jax.Array, Moments, Moments], _Saved]:
    one, moments1 = _convolved(x, first, dilation)
    c1 = jax.nn.relu(one.before_relu(first, None)).astype(x.dtype)
    two, moments2 = _convolved(c1, second, dilation)
    out = jax.nn.relu(two.before_relu(second, skip_of(shortcut, x, c1))).astype(x.dtype)
    return (out, moments1, moments2), (x, first, second, one, two)


def _backward(
    shortcut: Shortcut, dilation: int, saved: _Saved, gradients: tuple[jax.Array, Moments, Moments]
) -> tuple[jax.Array, LayerWeights, LayerWeights]:
    x, first, second, one, two = saved
    d_out = gradients[0]
    # If this did not depend on the gradient, XLA on CPUs would compute it in the forward pass and keep it after all.
    # The added term is zero, or NaN where the gradient is not finite.
    later = one._replace(mean=one.mean + (0 * d_out.ravel()[0]).astype(one.mean.dtype))
    c1 = jax.nn.relu(later.before_relu(first, None)).astype(x.dtype)

    d_y = jnp.where(two.before_relu(second, skip_of(shortcut, x, c1)) > 0, d_out.astype(second.scale.dtype), 0)
    d_c1, d_second = _layer_gradient(c1, second, two, d_y, dilation)
    d_skip = d_y.astype(x.dtype)
    if shortcut == "conv1":
        d_c1 = d_c1 + d_skip
    d_y = jnp.where(later.before_relu(first, None) > 0, d_c1, 0).astype(first.scale.dtype)
    d_x, d_first = _layer_gradient(x, first, one, d_y, dilation)
    return (d_x + d_skip if shortcut == "input" else d_x), d_first, d_second


def _layer_gradient(
    x: jax.Array, weights: LayerWeights, saved: Normalised, d_y: jax.Array, dilation: int
) -> tuple[jax.Array, LayerWeights]:
    """Gradients of a layer's input and weights from the gradient before its ReLU, zero where it was closed."""
    pixels = pixel_count(d_y)
    d_shift = channel_sum(d_y)
    d_scale = channel_sum_of(lambda d_y, z: d_y * saved._replace(z=z).centred(), d_y, saved.z) * saved.inv
    # This depends on a sum of the gradient, so that XLA does not keep an earlier result.
    saved = saved._replace(mean=saved.mean + 0 * d_shift)
    a = saved.inv * weights.scale
    # d z = a (d_y - mean(d_y) - z_hat mean(d_y z_hat)), Ioffe and Szegedy (2015), as two multiply-adds an element.
    c1, c0 = a * saved.inv * d_scale / pixels, a * d_shift / pixels
    d_z = (per_channel(a) * d_y - per_channel(c1) * saved.centred() - per_channel(c0)).astype(x.dtype)
    d_x, d_kernel = convolution_gradients(x, weights.kernel, d_z, dilation)
    return d_x, LayerWeights(d_kernel, d_scale, d_shift)


block.defvjp(_forward, _backward)
