"""Dense 3x3 convolution with fewer multiplications: Winograd's minimal filtering F(2x2, 3x3).

Lavin and Gray (arXiv:1509.09308), section 4.1: sixteen products of sums of pixels and sums of weights give four pixels
of the result, instead of thirty-six products. With many channels the products are matrix products, which take most of
the time. The image is processed in strips, so that the sums stay in the caches. In float32 the rounding error is at
most 1.5 times the error of a direct convolution.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pdrunet_jax.model.fast.xla import map_chunks, map_into, on_cpu

STRIP_PIXELS = 8192
"""Approximate pixels of a strip. Smaller: starting operations takes time; larger: the sums leave the caches."""

MIN_CHANNELS, MIN_PIXELS = 32, 16_384
"""Channels and pixels from which it beats XLA's direct convolution, measured on a 2-core AVX-512 CPU: by 10 to 25 %
with 40 channels, not with 24."""

Planes = list[jax.Array]
"""Sixteen arrays (N, H / 2, W / 2, C), one for each product, row by row of the 4x4 pattern."""


def is_faster(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether Winograd's method is faster for `x` (N, H, W, C), and as exact."""
    n, height, width, _ = x.shape
    return (
        on_cpu()
        and kernel.shape[:2] == (3, 3)
        and min(kernel.shape[2:]) >= MIN_CHANNELS
        and height % 2 == width % 2 == 0
        and n * height * width >= MIN_PIXELS
        and x.dtype.itemsize >= 4  # sums of bfloat16 would lose more than the products
    )


def winograd_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve `x` (N, H, W, C), H and W even, with `kernel` (3, 3, C, K), zero padded: (N, H, W, K)."""
    n, height, width, c = x.shape
    kernels = _kernel_sums(kernel)

    def strip(padded: jax.Array) -> jax.Array:
        planes = _input_sums(padded)
        return _result([plane @ weights for plane, weights in zip(planes, kernels, strict=True)])

    def whole(images: jax.Array) -> jax.Array:
        return strip(jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))))

    rows = strip_rows(height, width)
    if rows == height:
        return map_chunks(whole, x, STRIP_PIXELS)
    strips = height // rows
    between = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))

    def one_of_many(i: jax.Array) -> jax.Array:
        start = (i // strips, i % strips * rows, 0, 0)
        images = lax.dynamic_slice(between, start, (1, rows + 2, width, c))
        return strip(jnp.pad(images, ((0, 0), (0, 0), (1, 1), (0, 0))))

    return map_into(one_of_many, n * strips, x).reshape(n, height, width, -1)


def strip_rows(height: int, width: int) -> int:
    """Rows of a strip: the even divisor of `height` that is closest to `STRIP_PIXELS`, or all rows."""
    if height * width <= STRIP_PIXELS:
        return height
    divisors = [2 * rows for rows in range(1, height // 2 + 1) if height % (2 * rows) == 0]
    return min(divisors, key=lambda rows: abs(math.log(rows * width / STRIP_PIXELS)))


def _kernel_sums(kernel: jax.Array) -> list[jax.Array]:
    """Sixteen matrices (C, K): G g G^T."""

    def four(a: jax.Array, b: jax.Array, c: jax.Array) -> tuple[jax.Array, ...]:
        return a, (a + b + c) / 2, (a - b + c) / 2, c

    return [weights for row in four(*kernel) for weights in four(*row)]


def _input_sums(x: jax.Array) -> Planes:
    """B^T d B of all tiles of `x` (N, H + 2, W + 2, C); tiles are 4x4 and two pixels apart."""
    n, height, width, c = x.shape

    def pixels(row: int, column: int) -> jax.Array:
        end = (n, row + height - 3, column + width - 3, c)
        return lax.slice(x, (0, row, column, 0), end, (1, 2, 2, 1))

    def four(d: list[jax.Array]) -> list[jax.Array]:
        return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]

    columns = [four([pixels(row, column) for row in range(4)]) for column in range(4)]
    return [plane for row in range(4) for plane in four([column[row] for column in columns])]


def _result(m: Planes) -> jax.Array:
    """A^T m A of all tiles, side by side: (N, H, W, K)."""

    def two(m: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        return m[0] + m[1] + m[2], m[1] - m[2] - m[3]

    columns = [two(m[column::4]) for column in range(4)]
    tiles = [jnp.stack(two([column[row] for column in columns]), 3) for row in range(2)]
    n, h, w, _, k = tiles[0].shape
    return jnp.stack(tiles, 2).reshape(n, 2 * h, 2 * w, k)
