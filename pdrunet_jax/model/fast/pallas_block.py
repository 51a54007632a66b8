"""A block in training (Figure 2) on the kernels of `fast/pallas.py`, as one function with a hand-written gradient.

It keeps three activations, as `fast/block.py` does: its input and the results of its two convolutions. What lies
between is computed by the kernels on their way in.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pdrunet_jax.model.fast import pallas
from pdrunet_jax.model.fast.block import BackwardNorm, LayerWeights, Moments, Norm, Normalised, Shortcut, skip_of
from pdrunet_jax.model.fast.convolution import EPSILON, channel_sum, pixel_count

_Saved = tuple[jax.Array, LayerWeights, LayerWeights, Normalised, Normalised]


def _block(
    x: jax.Array, first: LayerWeights, second: LayerWeights, shortcut: Shortcut, dilation: int
) -> tuple[jax.Array, Moments, Moments]:
    return _forward(x, first, second, shortcut, dilation)[0]


block = jax.custom_vjp(_block, nondiff_argnums=(3, 4))
block.__doc__ = """`fast/block.py`'s function of this name: the same arguments and results."""


def _norm(layer: Normalised, weights: LayerWeights) -> Norm:
    return Norm(layer.mean, layer.inv * weights.scale, weights.shift)


def _convolved(
    x: jax.Array, weights: LayerWeights, dilation: int, norm: Norm | None = None
) -> tuple[Normalised, Moments]:
    z, sums = pallas.forward(x, weights.kernel, dilation, norm=norm, sums=True)
    assert sums is not None
    mean, var = pallas.moments(sums, pixel_count(x))
    mean, var = mean.astype(weights.scale.dtype), var.astype(weights.scale.dtype)
    return Normalised(z, mean, lax.rsqrt(var + EPSILON)), (mean, var)


def _forward(
    x: jax.Array, first: LayerWeights, second: LayerWeights, shortcut: Shortcut, dilation: int
) -> tuple[tuple[jax.Array, Moments, Moments], _Saved]:
    one, moments1 = _convolved(x, first, dilation)
    two, moments2 = _convolved(one.z, second, dilation, _norm(one, first))
    out = jax.nn.relu(_before_last_relu(x, one, two, first, second, shortcut)).astype(x.dtype)
    return (out, moments1, moments2), (x, first, second, one, two)


def _before_last_relu(
    x: jax.Array, one: Normalised, two: Normalised, first: LayerWeights, second: LayerWeights, shortcut: Shortcut
) -> jax.Array:
    c1 = jax.nn.relu(one.before_relu(first, None)).astype(x.dtype)
    return two.before_relu(second, skip_of(shortcut, x, c1))


def _backward(
    shortcut: Shortcut, dilation: int, saved: _Saved, gradients: tuple[jax.Array, Moments, Moments]
) -> tuple[jax.Array, LayerWeights, LayerWeights]:
    x, first, second, one, two = saved
    pixels = pixel_count(x)
    open_ = _before_last_relu(x, one, two, first, second, shortcut) > 0
    d_y = jnp.where(open_, gradients[0], 0)
    sums = channel_sum(d_y.astype(second.scale.dtype)), channel_sum(d_y.astype(second.scale.dtype) * two.centred())
    back, d_second = _through(two, second, sums, pixels)
    d_y1, d_kernel2, sums1 = pallas.gradients(
        d_y, one.z, second.kernel, dilation, back=back, norm=_norm(one, first), add_gradient=shortcut == "conv1"
    )
    assert sums1 is not None
    back, d_first = _through(one, first, sums1, pixels)
    d_x, d_kernel1, _ = pallas.gradients(
        d_y1, x, first.kernel, dilation, back=back, skip=d_y if shortcut == "input" else None
    )
    return d_x, d_first._replace(kernel=d_kernel1), d_second._replace(kernel=d_kernel2)


def _through(
    layer: Normalised, weights: LayerWeights, sums: tuple[jax.Array, jax.Array], pixels: int
) -> tuple[BackwardNorm, LayerWeights]:
    """The gradient through a normalisation, Ioffe and Szegedy (2015), and of its scale and shift.

    `sums` are those of the gradient before the ReLU, and of that times (z - mean), over all pixels.
    """
    d_shift, d_scale = sums[0].astype(weights.scale.dtype), sums[1].astype(weights.scale.dtype) * layer.inv
    factor = layer.inv * weights.scale
    slope, offset = factor * layer.inv * d_scale / pixels, factor * d_shift / pixels
    return BackwardNorm(layer.z, layer.mean, factor, slope, offset), weights._replace(scale=d_scale, shift=d_shift)


block.defvjp(_forward, _backward)
