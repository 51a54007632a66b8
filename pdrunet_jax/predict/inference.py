"""Inference: logits of whole batches, or one image of any size from file to mask."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from PIL import Image

from pdrunet_jax.data.fit import Fit, Spacing
from pdrunet_jax.data.greys import low_contrast
from pdrunet_jax.data.images import read_image, read_spacing
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.ensemble import average_logits
from pdrunet_jax.model.pixels import probabilities, unit_range
from pdrunet_jax.model.sides import Mirror
from pdrunet_jax.predict.postprocess import Cleaning, clean
from pdrunet_jax.predict.threshold import apply_threshold, check_threshold
from pdrunet_jax.predict.tiling import in_tiles
from pdrunet_jax.runtime import compile as compiling
from pdrunet_jax.runtime.devices import Placement
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.malloc import trim_malloc

Augmentation = Literal["none", "flip", "flips"]
"""Test-time augmentation: the image alone, also its left-right mirror, or all four mirrorings."""

# The axes of (N, H, W, C) reversed in each pass.
_FLIPPED_AXES: dict[Augmentation, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "flip": ((), (2,)),
    "flips": ((), (2,), (1,), (1, 2)),
}


class Prediction(NamedTuple):
    """Segmentation of one image at the image's own resolution."""

    mask: np.ndarray
    """(H, W) uint8 class indices, 0 is background; if classes overlap (H, W, K), 1 where class k + 1 is, else 0."""
    probability: np.ndarray
    """float32: foreground probability (H, W) for one output; (H, W, K), background first, for K outputs; without
    background if classes overlap."""
    spacing: Spacing | None
    """Millimetres per pixel, (row, column), if the file states it or the caller gave it."""
    remarks: tuple[str, ...] = ()
    """What a user should know about the image's brightness."""


def segment(
    model: Network,
    image: str | Path | np.ndarray,
    *,
    size: tuple[int, int] | Literal["own"] | None = None,
    spacing: Spacing | None = None,
    threshold: float | tuple[float, ...] = 0.5,
    augmentation: Augmentation = "none",
    tile: int | None = None,
    halo: int | None = None,
    cleaning: Cleaning | None = None,
) -> Prediction:
    """Segment one image.

    The image is stretched or padded to the size the model was trained at, as in training; probabilities are cropped and
    resized back before the threshold is applied. Both resizes are bilinear.

    Args:
        model: From `load_model`.
        image: A file, or pixels (H, W) or (H, W, C): uint8, or floats in [0, 1].
        size: (height, width) to run the network at instead of the training size; "own" for the image's own, which is
            also the default if the model has no training size.
        spacing: Millimetres per pixel, (row, column), of an image that states none.
        threshold: Foreground probability threshold, for models with one output or with overlapping classes (then also
            one a class); otherwise the most probable class is taken.
        augmentation: Average the probabilities over mirrored copies of the image; classes of either side change places
            there (`model.mirror`).
        tile: Run the network in tiles of this many pixels per side, for images that do not fit in memory.
        halo: Extra pixels around each tile. Default: `model.radius`, from which on the result is exact.
        cleaning: Applied to the mask, not to the probabilities.

    Raises:
        UserError: The file is not a readable image, the pixels have the wrong shape or type, the threshold does not fit
            the model, or mirror images do not, or a model trained at a fixed spacing cannot be run on the image or at
            the `size`.
        RunError: The network computes logits that are not finite.
    """
    check_threshold(threshold, model.outputs, multilabel=model.multilabel)
    remarks: list[str] = []
    pixels, stated = _read(image, model.config.in_channels, remarks)
    spacing = stated or spacing
    shape = pixels.shape[0], pixels.shape[1]
    fit = fit_of(model, shape, size)
    images = fit.image(pixels, spacing)[None]
    total: np.ndarray | float = 0.0
    check_augmentation(augmentation, model.mirror)
    for axes in _FLIPPED_AXES[augmentation]:
        flipped = np.flip(images, axes)
        logits = forward(model, flipped) if tile is None else forward_in_tiles(model, flipped, tile, halo)
        name = "the image" if isinstance(image, np.ndarray) else str(image)
        values = np.flip(finite_probabilities(logits, name, multilabel=model.multilabel), axes)
        if model.mirror.channels and len(axes) % 2:  # mirrored twice, an image is turned, and sides stay
            values = values[..., list(model.mirror.channels)]
        total = total + values
    average = np.asarray(total) / len(_FLIPPED_AXES[augmentation])
    probability = resize_to_image(fit.box(shape, spacing).crop(average[0]), shape)
    mask = apply_threshold(probability, threshold, multilabel=model.multilabel)
    return Prediction(mask if cleaning is None else clean(mask, cleaning), probability, spacing, tuple(remarks))


def fit_of(model: Network, shape: tuple[int, int], size: tuple[int, int] | Literal["own"] | None = None) -> Fit:
    """How to fit an image of `shape` to `model`, at its training size or at `size` (as for `segment`).

    Raises `UserError` if `size` is "own" and the model was trained at a fixed spacing.
    """
    if size == "own":
        if model.spacing is not None:
            raise UserError(
                f"size own: the model was trained at {model.spacing:g} mm per pixel, not at each image's own "
                "resolution; leave the size out, or give one that holds the largest image"
            )
        return Fit(shape)
    return Fit(size or model.size or shape, model.fit, model.spacing)


def predict_batches(
    model: Network, batches: Iterable[Mapping[str, np.ndarray]], place: Placement
) -> Iterator[tuple[Mapping[str, np.ndarray], jax.Array]]:
    """Each batch with its logits (N, H, W, K), computed on the devices of `place`.

    A batch holds "image", uint8 (N, H, W, C): this process's share.
    """
    members = [nnx.split(member) for member in model.members]
    placed = [(graphdef, place.replicate(state)) for graphdef, state in members]
    for batch in batches:
        images = place.shard_batch({"image": batch["image"]})["image"]
        yield batch, _logits(placed, images, model)


def forward(model: Network, images: np.ndarray) -> jax.Array:
    """Logits (N, H, W, K) of uint8 images (N, H, W, C), in evaluation mode.

    Compiled once for each architecture and shape, not for each set of weights, nor for each member of an ensemble.
    """
    return _logits([nnx.split(member) for member in model.members], jax.device_put(images), model)


def forward_in_tiles(model: Network, images: np.ndarray, tile: int, halo: int | None = None) -> np.ndarray:
    """Same as `forward`, in tiles of `tile` pixels per side with `halo` pixels around (see `predict/tiling.py`).

    `halo` is `model.radius` by default. Raises `UserError` if tiles of this model differ from the whole image.
    """
    check_tiles(model)

    def network(part: np.ndarray) -> np.ndarray:
        logits = np.asarray(forward(model, part))
        trim_malloc()  # otherwise fragmentation makes memory grow with every tile
        return logits

    return in_tiles(network, images, tile, model.radius if halo is None else halo, model.multiple)


def check_tiles(model: Network) -> None:
    """Raise `UserError` if a pixel's logits depend on the size of the image, so that tiles cannot be exact."""
    if model.config.up == "bilinear_corners":
        raise UserError("tile: a network with model.up = bilinear_corners computes whole images only; leave it out")


def resize_to_image(probability: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize probabilities (h, w, K) bilinearly to (H, W): float32 (H, W) for K = 1, else (H, W, K)."""
    height, width = shape
    channels = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
        for channel in np.moveaxis(probability, -1, 0)
    ]
    return channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)


def finite_probabilities(logits: jax.Array | np.ndarray, name: str, *, multilabel: bool = False) -> np.ndarray:
    """Probabilities, of the same shape as `logits`. Raises `RunError` with the image's `name` for NaN or infinity."""
    values = np.asarray(logits)
    if not np.isfinite(values).all():  # NaN is above no threshold: the mask would be empty without a word
        raise RunError(f"{name}: the network computes NaN or infinity from it: the weights are not usable; use others")
    return np.asarray(probabilities(values, multilabel=multilabel))


def height_width(size: Sequence[int]) -> tuple[int, int] | None:
    """(height, width) from the numbers given to `--size`, one for both or two; None for none. Raises `UserError`."""
    if not size:
        return None
    if len(size) > 2 or not all(1 <= side <= 1 << 16 for side in size):
        raise UserError(f"--size {' '.join(map(str, size))}: give one number, or height and width, from 1 to {1 << 16}")
    return size[0], size[-1]


def check_augmentation(augmentation: Augmentation, mirror: Mirror) -> None:
    """Raise `UserError` if a model with classes of either side cannot judge these mirror images."""
    reason, remedy = "", ""
    if augmentation != "none" and mirror.horizontal:
        reason, remedy = mirror.horizontal, "use none, or name the classes that change places (predict --swap-on-flip)"
    elif augmentation == "flips" and mirror.vertical:
        reason, remedy = mirror.vertical, "use flip"
    if reason:
        raise UserError(f"augmentation {augmentation}: the model cannot judge such images: {reason}; {remedy}")


def row_column(spacing: Sequence[float]) -> Spacing | None:
    """(row, column) from the numbers given to `--spacing`, one for both or two; None for none. Raises `UserError`."""
    if not spacing:
        return None
    if len(spacing) > 2 or not all(0 < number < math.inf for number in spacing):
        shown = " ".join(f"{number:g}" for number in spacing)
        raise UserError(f"--spacing {shown}: give one number of mm, or rows and columns, each above 0")
    return spacing[0], spacing[-1]


@cache
def compiled_forward() -> Any:
    """Compile `forward`, at its first call: querying compiler options starts the backend, which no import must do."""

    def run(graphdef: nnx.GraphDef[Network], state: nnx.State[Any, Any], images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return model(unit_range(images))

    return compiling.jit(run, static_argnums=0)


def _logits(members: Iterable[tuple[Any, Any]], images: jax.Array, model: Network) -> jax.Array:
    """Logits of the split `members` of `model`, averaged."""
    logits = [compiled_forward()(graphdef, state, images) for graphdef, state in members]
    return average_logits(logits, multilabel=model.multilabel)


def _read(image: str | Path | np.ndarray, channels: int, remarks: list[str]) -> tuple[np.ndarray, Spacing | None]:
    """Pixels (H, W, C) in [0, 255], and the spacing."""
    if not isinstance(image, np.ndarray):
        pixels = read_image(Path(image), channels, remarks)
        remarks += [remark] if (remark := low_contrast(pixels)) else []
        return pixels, read_spacing(Path(image))
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[-1] != channels or 0 in pixels.shape:
        raise UserError(f"the image has the shape {pixels.shape}; the model takes (H, W, {channels})")
    if pixels.dtype == np.uint8:
        return pixels, None
    if not np.issubdtype(pixels.dtype, np.floating) or not (pixels.min() >= 0 and pixels.max() <= 1):
        raise UserError(f"the image has {pixels.dtype} pixels; the model takes uint8, or floats in [0, 1]")
    return pixels.astype(np.float32) * 255, None
