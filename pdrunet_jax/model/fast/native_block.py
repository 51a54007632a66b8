"""A block in training (Figure 2), and a single layer, on the kernels of `fast/native.py`, with their own gradients.

A block keeps three activations, as in `fast/block.py`: its input and the results of its two convolutions. What lies
between is computed by the kernels on the way into their convolutions.
"""

from typing import NamedTuple

import jax
from jax import lax

from pdrunet_jax.model.fast import native
from pdrunet_jax.model.fast.block import BackwardNorm, LayerWeights, Moments, Norm, Shortcut
from pdrunet_jax.model.fast.convolution import EPSILON


class _Layer(NamedTuple):
    """A convolution's result with the mean and inverse standard deviation of its channels."""

    z: jax.Array
    mean: jax.Array
    inv: jax.Array
    weights: LayerWeights

    @property
    def norm(self) -> Norm:
        """The normalisation with the batch's statistics."""
        return Norm(self.mean, self.inv * self.weights.scale, self.weights.shift)

    def through(self, sums: tuple[jax.Array, jax.Array]) -> tuple[BackwardNorm, jax.Array, jax.Array]:
        """The gradient through the normalisation, Ioffe and Szegedy (2015), and of its scale and shift.

        `sums` are those of the gradient before the ReLU, and of that times (z - mean), over all pixels.
        """
        pixels = self.z.size // self.z.shape[2]
        d_shift, d_scale = sums[0], sums[1] * self.inv
        factor = self.norm.factor
        slope, offset = factor * self.inv * d_scale / pixels, factor * d_shift / pixels
        return BackwardNorm(self.z, self.mean, factor, slope, offset), d_scale, d_shift


def _convolved(x: jax.Array, weights: LayerWeights, dilation: int, norm: Norm | None = None) -> tuple[_Layer, Moments]:
    z, (mean, var) = native.forward(x, weights.kernel, dilation, norm=norm, moments=True)
    return _Layer(z, mean, lax.rsqrt(var + EPSILON), weights), (mean, var)


def _block(
    x: jax.Array, first: LayerWeights, second: LayerWeights, shortcut: Shortcut, dilation: int
) -> tuple[jax.Array, Moments, Moments]:
    return _block_forward(x, first, second, shortcut, dilation)[0]


def _block_forward(
    x: jax.Array, first: LayerWeights, second: LayerWeights, shortcut: Shortcut, dilation: int
) -> tuple[tuple[jax.Array, Moments, Moments], tuple[jax.Array, _Layer, _Layer]]:
    one, moments1 = _convolved(x, first, dilation)
    two, moments2 = _convolved(one.z, second, dilation, one.norm)
    out = native.end(two.z, two.norm, *_skip(shortcut, x, one))
    return (out, moments1, moments2), (x, one, two)


def _block_backward(
    shortcut: Shortcut,
    dilation: int,
    saved: tuple[jax.Array, _Layer, _Layer],
    given: tuple[jax.Array, Moments, Moments],
) -> tuple[jax.Array, LayerWeights, LayerWeights]:
    x, one, two = saved
    d_y, sums = native.end_gradient(given[0], two.z, two.norm, *_skip(shortcut, x, one))
    back, *d_second = two.through(sums)
    added = d_y if shortcut == "conv1" else None
    d_y1, d_kernel2, sums = native.gradients(
        d_y, one.z, two.weights.kernel, dilation, back=back, norm=one.norm, added=added
    )
    back, *d_first = one.through(sums)
    added = d_y if shortcut == "input" else None
    d_x, d_kernel1, _ = native.gradients(d_y1, x, one.weights.kernel, dilation, back=back, added=added)
    return d_x, LayerWeights(d_kernel1, *d_first), LayerWeights(d_kernel2, *d_second)


def _skip(shortcut: Shortcut, x: jax.Array, one: _Layer) -> tuple[jax.Array | None, Norm | None]:
    """The term before the last ReLU, and the normalisation that it goes through together with a ReLU."""
    if shortcut == "conv1":
        return one.z, one.norm
    return (x if shortcut == "input" else None), None


block = jax.custom_vjp(_block, nondiff_argnums=(3, 4))
block.__doc__ = """`fast/block.py`'s function of this name, with activations (N, H, C, W)."""
block.defvjp(_block_forward, _block_backward)


def _layer(x: jax.Array, weights: LayerWeights, skip: jax.Array | None, dilation: int) -> tuple[jax.Array, Moments]:
    return _layer_forward(x, weights, skip, dilation)[0]


def _layer_forward(
    x: jax.Array, weights: LayerWeights, skip: jax.Array | None, dilation: int
) -> tuple[tuple[jax.Array, Moments], tuple[jax.Array, _Layer, jax.Array | None]]:
    layer, moments = _convolved(x, weights, dilation)
    return (native.end(layer.z, layer.norm, skip), moments), (x, layer, skip)


def _layer_backward(
    dilation: int, saved: tuple[jax.Array, _Layer, jax.Array | None], given: tuple[jax.Array, Moments]
) -> tuple[jax.Array, LayerWeights, jax.Array | None]:
    x, layer, skip = saved
    d_y, sums = native.end_gradient(given[0], layer.z, layer.norm, skip)
    back, *rest = layer.through(sums)
    d_x, d_kernel, _ = native.gradients(d_y, x, layer.weights.kernel, dilation, back=back)
    return d_x, LayerWeights(d_kernel, *rest), None if skip is None else d_y


layer = jax.custom_vjp(_layer, nondiff_argnums=(3,))
layer.__doc__ = """relu(bn(conv(x)) + skip), normalised with the batch's statistics.

Args, in order: x (N, H, C, W), weights of the layer, skip (N, H, K, W) or None, dilation.

Returns the activation (N, H, K, W) and the moments of the convolution's result; no gradient flows through the latter.
"""
layer.defvjp(_layer_forward, _layer_backward)
