"""What convolutional layers and their gradients are made of: convolution, filter gradient, sums over pixels.

Automatic differentiation leaves XLA a filter gradient that runs on CPUs at a few percent of the machine's speed; here
it is a matrix product.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pdrunet_jax.model import sharding as shards
from pdrunet_jax.model.fast import winograd
from pdrunet_jax.model.fast.xla import largest_divisor

EPSILON = 1e-5
"""BatchNorm's addition to the variance, as in PyTorch."""

BLOCK_PIXELS = 2048
"""Pixels of one block of `product_filter_gradient`: its two operands then stay in a core's L2 cache."""

LARGE_IMAGE, FEW_CHANNELS, MANY_CHANNELS = 128 * 128, 8, 32
"""Where the filter gradient as a product beats XLA's own, measured on a quiet 2-core AVX-512 CPU: with many channels
everywhere, with fewer on images from this number of pixels (a phase counts as one), with very few nowhere."""

SUM_GROUPS = 256
"""Groups, at most, that `channel_sum` adds up one by one."""

SUM_SLICES, SLICED_PIXELS = 8, 4096
"""Slices, at most, that `channel_sum_of` adds up before it takes their `channel_sum`, and pixels from which it does."""


def convolve(x: jax.Array, kernel: jax.Array, dilation: int = 1) -> jax.Array:
    """3x3 convolution (cross-correlation, as in every network library) with zero padding that keeps the size.

    Args:
        x: (N, H, W, C).
        kernel: (3, 3, C, K), or any odd size.
        dilation: spacing of the kernel's taps in pixels.

    Returns:
        (N, H, W, K).
    """
    reach = dilation * (kernel.shape[0] // 2)
    if reach and shards.split_rows():
        return _convolve(shards.with_neighbours(x, reach), kernel, dilation, ((0, 0), (reach, reach)))
    return _convolve(x, kernel, dilation, "SAME")


def _convolve(x: jax.Array, kernel: jax.Array, dilation: int, padding: str | Sequence[tuple[int, int]]) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, rhs_dilation=(dilation, dilation), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def rows_around(x: jax.Array, rows: int) -> jax.Array:
    """(N, H + 2 rows, W, C): `x` (N, H, W, C) with the rows above and below it, which are zeros around an image."""
    if shards.split_rows():
        return shards.with_neighbours(x, rows)
    return jnp.pad(x, ((0, 0), (rows, rows), (0, 0), (0, 0)))


def per_channel(v: jax.Array) -> jax.Array:
    """(C,) as (1, 1, 1, C), to be combined with activations."""
    return v.reshape(1, 1, 1, -1)


def channel_sum(x: jax.Array) -> jax.Array:
    """The sum of (N, H, W, C) over all pixels, (C,)."""
    if jax.default_backend() != "cpu":
        return shards.total(x.sum((0, 1, 2)))
    # XLA's reductions on CPUs take several times as long as products with a vector of ones. In groups, because the
    # rounding of one long sum would grow with the number of pixels.
    pixels, c = x.size // x.shape[-1], x.shape[-1]
    groups = largest_divisor(pixels, SUM_GROUPS)
    ones = jnp.ones((groups, pixels // groups), x.dtype)
    parts = lax.dot_general(ones, x.reshape(groups, -1, c), (((1,), (1,)), ((0,), (0,))))
    return shards.total(parts.sum(0))


def channel_sum_of(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """The sum over all pixels of an elementwise `function` of arrays (N, H, W, C), (C,)."""
    c = arrays[0].shape[-1]
    pixels = arrays[0].size // c
    if jax.default_backend() != "cpu" or pixels < SLICED_PIXELS:
        return channel_sum(function(*arrays))
    # The function's values would be written to memory and read again by `channel_sum`. XLA writes an eighth of that if
    # their sum is that of a few slices, which it computes in one pass.
    slices = largest_divisor(pixels, SUM_SLICES)
    parts = [array.reshape(slices, 1, 1, -1, c) for array in arrays]
    total = function(*(part[0] for part in parts))
    for i in range(1, slices):
        total = total + function(*(part[i] for part in parts))
    return channel_sum(total)


def pixel_count(x: jax.Array) -> int:
    """How many pixels `channel_sum` adds up."""
    return x.size // x.shape[-1] * shards.count()


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of each channel, (C,) and (C,).

    Two passes: the one-pass form E[x^2] - E[x]^2 loses all precision where the mean is large.
    """
    pixels = pixel_count(x)
    mean = channel_sum(x) / pixels
    return mean, channel_sum_of(lambda x: jnp.square(x - per_channel(mean)), x) / pixels


def convolution_gradients(
    x: jax.Array, kernel: jax.Array, g: jax.Array, dilation: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `convolve(x, kernel, dilation)` with respect to `x` and `kernel`, in their shapes.

    That of the input is a convolution with the flipped, transposed kernel. It and that of the kernel see the rows
    around `g`, which are put there once for both.

    Args:
        x: the convolution's input, (N, H, W, C).
        kernel: (3, 3, C, K).
        g: the gradient of its output, (N, H, W, K).
        dilation: spacing of the kernel's taps in pixels.
    """
    around = rows_around(g, dilation)
    d_kernel = filter_gradient(x, around, dilation)
    # A zero that depends on the one gradient makes the other wait for it. Left to itself, XLA on CPUs goes on from the
    # input's gradient through layers further up, while `x` and `around` still wait for the kernel's, in memory. It does
    # not wait for the other parts of a mesh.
    zero = 0 * d_kernel.ravel()[0].astype(kernel.dtype)
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3) + zero
    d_x = _convolve(around, flipped, dilation, ((0, 0), (dilation, dilation)))
    return d_x, shards.total(d_kernel).astype(kernel.dtype)


def filter_gradient(x: jax.Array, around: jax.Array, dilation: int = 1) -> jax.Array:
    """The gradient of `convolve(x, kernel, dilation)` with respect to the 3x3 kernel, by the faster of two ways.

    Args:
        x: the convolution's input, (N, H, W, C).
        around: the gradient of its output with the rows around, (N, H + 2 dilation, W, K), as `rows_around` gives it.
        dilation: spacing of the kernel's taps in pixels.

    Returns:
        (3, 3, C, K), of this part of a mesh alone, accumulated in at least float32.
    """
    height, width = x.shape[1:3]
    channels = min(x.shape[-1], around.shape[-1])
    if channels >= (FEW_CHANNELS if height * width >= LARGE_IMAGE else MANY_CHANNELS):
        return product_filter_gradient(x, around, dilation)
    kernel = shards.own(jnp.zeros((3, 3, x.shape[-1], around.shape[-1]), x.dtype))
    g = around[:, dilation:-dilation]
    gradient: jax.Array = jax.vjp(lambda kernel: convolve(x, kernel, dilation), kernel)[1](g)[0]
    return gradient


def product_filter_gradient(x: jax.Array, around: jax.Array, dilation: int = 1) -> jax.Array:
    """The filter gradient as matrix products; arguments and result as for `filter_gradient`.

    Three taps come from each product: three column shifts of a block of the input side by side (pixels, 3C) against
    the output's gradient (pixels, K), shifted by whole rows for the other two products.
    """
    n, h, w, c = x.shape
    k = around.shape[-1]
    d = dilation
    rows, count = largest_divisor(h, BLOCK_PIXELS // w), largest_divisor(n, BLOCK_PIXELS // (h * w))
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def body(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        image, row = (i // (h // rows)) * count, (i % (h // rows)) * rows
        xs = lax.dynamic_slice(x, (image, row, 0, 0), (count, rows, w, c))
        gs = lax.dynamic_slice(around, (image, row, 0, 0), (count, rows + 2 * d, w, k))
        xs = jnp.pad(xs, ((0, 0), (0, 0), (d, d), (0, 0)))
        columns = jnp.concatenate([xs[:, :, j * d : j * d + w] for j in range(3)], -1).reshape(-1, 3 * c)
        lines = [gs[:, (2 - i) * d : (2 - i) * d + rows].reshape(-1, k) for i in range(3)]
        products = [
            lax.dot_general(columns, line, (((0,), (0,)), ((), ())), preferred_element_type=dtype) for line in lines
        ]
        return total + jnp.stack(products), None

    blocks = jnp.arange((n // count) * (h // rows))
    total, _ = lax.scan(body, shards.own(jnp.zeros((3, 3 * c, k), dtype)), blocks)
    return total.reshape(3, 3, c, k)


def _convolution(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    if dilation == 1 and winograd.pays(x, kernel):
        return winograd.winograd_convolve(x, kernel)
    return convolve(x, kernel, dilation)


convolution = jax.custom_vjp(_convolution, nondiff_argnums=(2,))
convolution.__doc__ = """`convolve`, Winograd's way where that is faster, with the gradients of `convolution_gradients`.

For layers without normalisation: those of a block in training have a gradient of their own.
"""


def _convolution_forward(
    x: jax.Array, kernel: jax.Array, dilation: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolution(x, kernel, dilation), (x, kernel)


def _convolution_backward(
    dilation: int, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return convolution_gradients(*saved, g, dilation)


convolution.defvjp(_convolution_forward, _convolution_backward)
