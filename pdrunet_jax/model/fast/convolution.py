"""Convolution, its gradients, and sums over pixels: the operations that layers and blocks are made of.

The filter gradient of automatic differentiation runs on CPUs at a few percent of the machine's speed; here it is a
matrix product.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pdrunet_jax.model.fast import winograd
from pdrunet_jax.model.fast.phases import to_phases
from pdrunet_jax.model.fast.xla import largest_divisor, on_cpu
from pdrunet_jax.model.sharding import axis_size, psum, pvary

EPSILON = 1e-5
"""Added to the variance in batch normalisation, as in PyTorch."""

BLOCK_PIXELS = 2048
"""Pixels of one block of `product_filter_gradient`: both operands then stay in a core's L2 cache."""

LARGE_IMAGE, FEW_CHANNELS, MANY_CHANNELS = 128 * 128, 8, 32
"""Where the filter gradient as a product beats XLA's own, measured on a quiet 2-core AVX-512 CPU: always with many
channels; with fewer on images of at least this many pixels (a phase counts as one); never with very few."""

SUM_GROUPS = 256
"""Most groups that `channel_sum` adds up one by one."""

SUM_SLICES, SLICED_PIXELS = 8, 4096
"""Most slices that `channel_sum_of` adds up before `channel_sum`, and the number of pixels from which it does so."""


def convolve(
    x: jax.Array, kernel: jax.Array, dilation: int = 1, padding: str | Sequence[tuple[int, int]] = "SAME"
) -> jax.Array:
    """Convolve (cross-correlate) `x` (N, H, W, C) with `kernel` (3, 3, C, K), or any odd size, and zero padding.

    `dilation` is the spacing of the kernel's taps in pixels. The padding "SAME" keeps the size, (N, H, W, K); any other
    padding is the number of rows and columns to add before and after.
    """
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, rhs_dilation=(dilation, dilation), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def pad_rows(x: jax.Array, rows: int) -> jax.Array:
    """Add `rows` rows of zeros above and below: (N, H + 2 rows, W, C)."""
    return jnp.pad(x, ((0, 0), (rows, rows), (0, 0), (0, 0)))


def per_channel(v: jax.Array) -> jax.Array:
    """Reshape (C,) to (1, 1, 1, C), to broadcast over an activation."""
    return v.reshape(1, 1, 1, -1)


def channel_sum(x: jax.Array) -> jax.Array:
    """Sum (N, H, W, C) over all pixels: (C,)."""
    if not on_cpu():
        return psum(x.sum((0, 1, 2)))
    # On CPUs, XLA's reductions take several times as long as products with a vector of ones. They are taken in groups,
    # since the rounding error of one long sum would grow with the number of pixels.
    pixels, c = x.size // x.shape[-1], x.shape[-1]
    groups = largest_divisor(pixels, SUM_GROUPS)
    ones = jnp.ones((groups, pixels // groups), x.dtype)
    parts = lax.dot_general(ones, x.reshape(groups, -1, c), (((1,), (1,)), ((0,), (0,))))
    return psum(parts.sum(0))


def channel_sum_of(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Sum an elementwise `function` of arrays (N, H, W, C) over all pixels: (C,)."""
    c = arrays[0].shape[-1]
    pixels = arrays[0].size // c
    if not on_cpu() or pixels < SLICED_PIXELS:
        return channel_sum(function(*arrays))
    # `channel_sum` would write the function's values to memory and read them again. Summed over a few slices first, in
    # one pass of XLA, only an eighth of that is written.
    slices = largest_divisor(pixels, SUM_SLICES)
    parts = [array.reshape(slices, 1, 1, -1, c) for array in arrays]
    total = function(*(part[0] for part in parts))
    for i in range(1, slices):
        total = total + function(*(part[i] for part in parts))
    return channel_sum(total)


def pixel_count(x: jax.Array) -> int:
    """Number of pixels that `channel_sum` adds up, on all devices of a mesh."""
    return x.size // x.shape[-1] * axis_size()


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the mean and the biased variance of each channel, (C,) and (C,).

    The form E[x^2] - E[x]^2 would lose all precision where the mean is large. CPUs take two passes; GPUs one, which
    reads memory once, with pixels relative to the mean of one in 64.
    """
    pixels = pixel_count(x)
    if on_cpu():
        mean = channel_sum(x) / pixels
        return mean, channel_sum_of(lambda x: jnp.square(x - per_channel(mean)), x) / pixels
    near = lax.stop_gradient(channel_sum(x[:, ::8, ::8]) / pixel_count(x[:, ::8, ::8]))
    apart = x - per_channel(near)
    first, second = psum(jnp.stack([apart.sum((0, 1, 2)), jnp.square(apart).sum((0, 1, 2))])) / pixels
    return near + first, jnp.maximum(second - jnp.square(first), 0)


def convolution_gradients(
    x: jax.Array, kernel: jax.Array, g: jax.Array, dilation: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of `convolve(x, kernel, dilation)` with respect to `x` and `kernel`, in their shapes.

    `kernel` is (3, 3, C, K), and `g` (N, H, W, K) is the gradient of the output. The input's gradient is a convolution
    with the flipped, transposed kernel. Both gradients need `g` with rows of zeros around it, which are added once.
    """
    padded = pad_rows(g, dilation)
    d_kernel = filter_gradient(x, padded, dilation)
    # A zero that depends on the kernel's gradient makes the input's gradient wait for it. Otherwise XLA on CPUs goes on
    # to earlier layers first, and `x` and `padded` stay in memory until the kernel's gradient is computed.
    zero = 0 * d_kernel.ravel()[0].astype(kernel.dtype)
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3) + zero
    d_x = convolve(padded, flipped, dilation, ((0, 0), (dilation, dilation)))
    return d_x, psum(d_kernel).astype(kernel.dtype)


def filter_gradient(x: jax.Array, padded: jax.Array, dilation: int = 1) -> jax.Array:
    """Compute the gradient of `convolve(x, kernel, dilation)` for its 3x3 kernel, by the faster of two methods.

    `padded` is the gradient of the output with rows of zeros from `pad_rows`: (N, H + 2 dilation, W, K). Returns
    (3, 3, C, K), accumulated in at least float32; on a mesh, the part of this device.
    """
    height, width = x.shape[1:3]
    channels = min(x.shape[-1], padded.shape[-1])
    if on_cpu() and channels >= (FEW_CHANNELS if height * width >= LARGE_IMAGE else MANY_CHANNELS):
        return product_filter_gradient(x, padded, dilation)
    g = padded[:, dilation:-dilation]
    if dilation > 1 and not on_cpu():
        # XLA takes the filter gradient of a dilated convolution for a convolution with an image in the place of its
        # kernel. On phases it is a dense one; where they do not divide the image, pixels of zeros complete it.
        x, g, dilation = _complete_phases(x, dilation), _complete_phases(g, dilation), 1
    kernel = pvary(jnp.zeros((3, 3, x.shape[-1], g.shape[-1]), x.dtype))
    gradient: jax.Array = jax.vjp(lambda kernel: convolve(x, kernel, dilation), kernel)[1](g)[0]
    return gradient


def _complete_phases(x: jax.Array, phases: int) -> jax.Array:
    """Pad `x` (N, H, W, C) at the bottom and on the right to multiples of `phases`, and convert it to phases."""
    height, width = x.shape[1:3]
    return to_phases(jnp.pad(x, ((0, 0), (0, -height % phases), (0, -width % phases), (0, 0))), 1, phases)


def product_filter_gradient(x: jax.Array, padded: jax.Array, dilation: int = 1) -> jax.Array:
    """Compute the filter gradient by matrix products; arguments and result as for `filter_gradient`.

    Each product gives three taps: three column shifts of a block of the input side by side (pixels, 3C) times the
    output's gradient (pixels, K). The other two products take that gradient shifted by whole rows.
    """
    n, h, w, c = x.shape
    k = padded.shape[-1]
    d = dilation
    rows, count = largest_divisor(h, BLOCK_PIXELS // w), largest_divisor(n, BLOCK_PIXELS // (h * w))
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def body(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        image, row = (i // (h // rows)) * count, (i % (h // rows)) * rows
        xs = lax.dynamic_slice(x, (image, row, 0, 0), (count, rows, w, c))
        gs = lax.dynamic_slice(padded, (image, row, 0, 0), (count, rows + 2 * d, w, k))
        xs = jnp.pad(xs, ((0, 0), (0, 0), (d, d), (0, 0)))
        columns = jnp.concatenate([xs[:, :, j * d : j * d + w] for j in range(3)], -1).reshape(-1, 3 * c)
        lines = [gs[:, (2 - i) * d : (2 - i) * d + rows].reshape(-1, k) for i in range(3)]
        products = [
            lax.dot_general(columns, line, (((0,), (0,)), ((), ())), preferred_element_type=dtype) for line in lines
        ]
        return total + jnp.stack(products), None

    blocks = jnp.arange((n // count) * (h // rows))
    total, _ = lax.scan(body, pvary(jnp.zeros((3, 3 * c, k), dtype)), blocks)
    return total.reshape(3, 3, c, k)


def _convolution(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    if dilation == 1 and winograd.is_faster(x, kernel):
        return winograd.winograd_convolve(x, kernel)
    return convolve(x, kernel, dilation)


convolution = jax.custom_vjp(_convolution, nondiff_argnums=(2,))
convolution.__doc__ = """`convolve`, by Winograd's method where that is faster; gradients as `convolution_gradients`.

For layers outside `fast/block.py`, which has gradients of its own.
"""
convolution.defvjp(
    lambda x, kernel, dilation: (_convolution(x, kernel, dilation), (x, kernel)),
    lambda dilation, saved, g: convolution_gradients(saved[0], saved[1], g, dilation),
)
