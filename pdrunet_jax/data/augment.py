"""Random augmentation of training images and masks on the device, inside jit.

Every draw depends only on the sample's key, made from seed, epoch and sample index. The order of samples, or an
interruption, does not change it, and turning one option on or off does not change the draws of the others.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from pdrunet_jax.config import AugmentConfig
from pdrunet_jax.data.masks import IGNORE, PADDING

ELASTIC_CELLS = 8
"""Cells of the elastic displacement's control grid along each side."""

# Each sample draws twelve uniform numbers, one per option; noise and elastic fields have streams of their own.
_FLIP_H, _FLIP_V, _ROTATE, _SCALE, _SHIFT_Y, _SHIFT_X, _SHEAR, _BLUR, _GAMMA, _CONTRAST, _BRIGHTNESS, _NOISE = range(12)
_NUMBERS, _ELASTIC_FIELD, _NOISE_FIELD = range(3)


def sample_keys(key: Array, epoch: ArrayLike, index: ArrayLike) -> Array:
    """One key per sample, from the run's `key` and the samples' `epoch` and `index`, both int (N,)."""
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(key, e), i))(
        jnp.asarray(epoch), jnp.asarray(index)
    )


def augment(
    images: Array,
    masks: Array,
    keys: Array,
    config: AugmentConfig,
    *,
    soft: bool = False,
    padded: bool = False,
    swapped: tuple[int, ...] = (),
) -> tuple[Array, Array]:
    """Augment `images` and `masks`; with every option at zero they are returned as they are.

    Flips are exact. Rotation, scale, shift, shear and elastic displacement are composed into one resampling: bilinear
    for images, nearest for masks. Pixels from outside the image are black, and `IGNORE` in the mask (0 if `soft`).

    Args:
        images: floating point (N, H, W, C) in [0, 1].
        masks: uint8 (N, H, W), class indices, or grey values if `soft`; (N, H, W, K) if classes overlap.
        keys: (N,) keys from `sample_keys`.
        config: strengths; static, so an option at zero costs nothing.
        soft: masks are grey values and resampled bilinearly.
        padded: images are padded, with `PADDING` in the mask. Padding moves with the image and what comes from outside
            is padding too; it stays black and does not count in the mean that the contrast changes around.
        swapped: class index in a mirror image for each class index; empty if none changes. An image mirrored along both
            axes is turned by 180 degrees, and its classes stay.

    Returns:
        Images in [0, 1] and masks, with the given shapes and types.
    """
    if config == AugmentConfig():
        return images, masks
    drawn = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _NUMBERS), (12,), jnp.float32))(keys)
    flips = {
        axis: drawn[:, place] < chance
        for axis, place, chance in ((1, _FLIP_V, config.flip_vertical), (2, _FLIP_H, config.flip_horizontal))
        if chance
    }
    if any((config.rotate, config.scale, config.translate, config.shear, config.elastic)):
        rows, columns = _sources(drawn, flips, keys, config, masks.shape[1:3])
        images, masks = _resample(images, masks, rows, columns, soft=soft, outside=PADDING if padded else IGNORE)
    else:
        for axis, flip in flips.items():
            images = jnp.where(flip[:, None, None, None], jnp.flip(images, axis), images)
            masks = jnp.where(flip.reshape(-1, *(1,) * (masks.ndim - 1)), jnp.flip(masks, axis), masks)
    if swapped and flips:
        masks = _swap_sides(masks, functools.reduce(jnp.logical_xor, flips.values()), swapped)
    if not padded:
        return _change_intensity(images, drawn, keys, config), masks
    inside = (masks[..., :1] if masks.ndim == 4 else masks[..., None]) != PADDING
    return jnp.where(inside, _change_intensity(images, drawn, keys, config, inside), 0), masks


def _swap_sides(masks: Array, mirrored: Array, swapped: tuple[int, ...]) -> Array:
    """Exchange the classes of either side in the masks that are `mirrored` (N,), bool."""
    if masks.ndim == 4:  # a layer for each class
        return jnp.where(mirrored[:, None, None, None], masks[..., np.array(swapped[1:]) - 1], masks)
    table = np.arange(256, dtype=np.uint8)
    table[: len(swapped)] = swapped
    return jnp.where(mirrored[:, None, None], jnp.asarray(table)[masks], masks)


def _normal(keys: Array, stream: int, shape: tuple[int, ...]) -> Array:
    """(N, *shape) normal numbers, float32 at any precision, so that the draws do not depend on it."""
    count = math.prod(shape)  # drawn flat: in three dimensions XLA on CPUs takes seconds to compile it
    flat = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), (count,), jnp.float32))(keys)
    return flat.reshape(-1, *shape)


def _sources(
    drawn: Array, flips: dict[int, Array], keys: Array, config: AugmentConfig, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Source row and column of each output pixel, float32 (N, H, W).

    `drawn` (N, 12) is uniform; `flips` holds for axes 1 and 2 which samples (N,) are mirrored first.
    """
    height, width = shape
    centred = 2 * drawn - 1
    angle = math.radians(config.rotate) * centred[:, _ROTATE]
    slant = jnp.tan(math.radians(config.shear) * centred[:, _SHEAR])
    zoom = jnp.exp(math.log1p(config.scale) * centred[:, _SCALE])

    # About the centre and in pixels, so that a rotation stays one in images that are not square.
    y = jnp.arange(height, dtype=jnp.float32)[None, :, None] - (height - 1) / 2
    x = jnp.arange(width, dtype=jnp.float32)[None, None, :] - (width - 1) / 2
    cos, sin = (jnp.cos(angle) / zoom)[:, None, None], (jnp.sin(angle) / zoom)[:, None, None]
    rows = cos * y - sin * x
    columns = sin * y + cos * x + slant[:, None, None] * rows
    rows += (config.translate * height * centred[:, _SHIFT_Y])[:, None, None]
    columns += (config.translate * width * centred[:, _SHIFT_X])[:, None, None]
    if config.elastic:
        control = _normal(keys, _ELASTIC_FIELD, (2, ELASTIC_CELLS + 3, ELASTIC_CELLS + 3))
        smooth = jnp.einsum(
            "hi,ndij,wj->ndhw", _spline(height), control, _spline(width), precision=jax.lax.Precision.HIGHEST
        )
        rows, columns = rows + config.elastic * smooth[:, 0], columns + config.elastic * smooth[:, 1]
    signs = {axis: jnp.where(flip, -1.0, 1.0).astype(jnp.float32)[:, None, None] for axis, flip in flips.items()}
    return rows * signs.get(1, 1) + (height - 1) / 2, columns * signs.get(2, 1) + (width - 1) / 2


def _spline(count: int) -> Array:
    """Cubic B-spline weights (count, ELASTIC_CELLS + 3) that turn white noise into a smooth curve of variance 1."""
    position = (np.arange(count) + 0.5) * (ELASTIC_CELLS / count)
    distance = np.abs(position[:, None] + 1 - np.arange(ELASTIC_CELLS + 3)[None, :])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.maximum(2 - distance, 0) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    return jnp.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True), jnp.float32)


def _resample(
    images: Array, masks: Array, rows: Array, columns: Array, *, soft: bool, outside: int
) -> tuple[Array, Array]:
    height, width = masks.shape[1:3]
    inside = (rows > -0.5) & (rows < height - 0.5) & (columns > -0.5) & (columns < width - 0.5)
    rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, right = rows - top, columns - left
    row, column = top.astype(jnp.int32), left.astype(jnp.int32)
    next_row, next_column = jnp.minimum(row + 1, height - 1), jnp.minimum(column + 1, width - 1)

    def bilinear(pixels: Array) -> Array:
        """`pixels` (N, H, W, C) at the source positions."""
        a, b = down[..., None].astype(pixels.dtype), right[..., None].astype(pixels.dtype)
        upper = _take(pixels, row, column) * (1 - b) + _take(pixels, row, next_column) * b
        lower = _take(pixels, next_row, column) * (1 - b) + _take(pixels, next_row, next_column) * b
        return jnp.where(inside[..., None], upper * (1 - a) + lower * a, 0)

    if soft:
        return bilinear(images), jnp.round(bilinear(masks[..., None].astype(images.dtype))[..., 0]).astype(masks.dtype)
    layers = masks if masks.ndim == 4 else masks[..., None]
    nearest = _take(layers, jnp.where(down < 0.5, row, next_row), jnp.where(right < 0.5, column, next_column))
    if masks.ndim == 3:
        return bilinear(images), jnp.where(inside, nearest[..., 0], jnp.asarray(outside, masks.dtype))
    return bilinear(images), jnp.where(inside[..., None], nearest, jnp.asarray(outside, masks.dtype))


def _take(pixels: Array, row: Array, column: Array) -> Array:
    """`pixels` (N, H, W, C) at `row` and `column`, int32 (N, H, W) and in bounds."""
    count, height, width, channels = pixels.shape
    # One flat index: several times faster on CPUs than a gather over three axes.
    image = jnp.arange(count, dtype=jnp.int32)[:, None, None] * (height * width)
    flat = (image + row * width + column).ravel()
    return pixels.reshape(-1, channels).at[flat].get(mode="promise_in_bounds").reshape(*row.shape, channels)


def _change_intensity(
    images: Array, drawn: Array, keys: Array, config: AugmentConfig, inside: Array | None = None
) -> Array:
    """Apply the options that leave every pixel where it is; pixels not `inside` (N, H, W, 1) count in no mean."""
    if not any((config.blur, config.gamma, config.contrast, config.brightness, config.noise)):
        return images

    def each(place: int) -> Array:
        """The uniform number of an option, broadcastable to images."""
        return drawn[:, place, None, None, None].astype(images.dtype)

    if config.blur:
        images = _blur(images, config.blur * drawn[:, _BLUR])
    if config.gamma:
        images = images ** jnp.exp2(config.gamma * (2 * each(_GAMMA) - 1))
    if config.contrast:
        mean = images.mean(axis=(1, 2, 3), keepdims=True, where=inside)
        images = mean + (images - mean) * (1 + config.contrast * (2 * each(_CONTRAST) - 1))
    if config.brightness:
        images = images + config.brightness * (2 * each(_BRIGHTNESS) - 1)
    if config.noise:
        grain = _normal(keys, _NOISE_FIELD, images.shape[1:])
        images = images + config.noise * each(_NOISE) * grain.astype(images.dtype)
    return jnp.clip(images, 0, 1)


def _blur(images: Array, deviation: Array) -> Array:
    """Gaussian blur of `deviation` (N,) pixels; at the edges the kernel is truncated and renormalised."""

    def kernel(length: int) -> Array:
        position = jnp.arange(length, dtype=jnp.float32)
        distance = (position[:, None] - position[None, :])[None]
        weights = jnp.exp(-((distance / jnp.maximum(deviation, 1e-3)[:, None, None]) ** 2) / 2)
        return (weights / weights.sum(axis=2, keepdims=True)).astype(images.dtype)

    # Matrix products rather than shifted sums: XLA on CPUs would fuse the resampling into every shift and repeat it.
    down, across = kernel(images.shape[1]), kernel(images.shape[2])
    return jnp.einsum("nij,njkc,nlk->nilc", down, images, across, precision=jax.lax.Precision.HIGHEST)
