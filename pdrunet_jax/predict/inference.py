"""Inference: one image of any size from file to mask. Importing it does not load JAX."""

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image

from pdrunet_jax.data.fit import Fit, Spacing
from pdrunet_jax.data.greys import low_contrast
from pdrunet_jax.data.images import read_image_and_spacing
from pdrunet_jax.model.pixels import probabilities
from pdrunet_jax.model.sides import Mirror
from pdrunet_jax.predict.engines.engine import Engine, Facts, facts_of
from pdrunet_jax.predict.postprocess import Cleaning, clean
from pdrunet_jax.predict.threshold import apply_threshold, check_threshold
from pdrunet_jax.predict.tiling import in_tiles
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.malloc import trim_malloc

if TYPE_CHECKING:
    import jax

    from pdrunet_jax.model.base import Network

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


class Input(NamedTuple):
    """An image, read and fitted to the network."""

    name: str
    pixels: np.ndarray
    """(H, W, C) in [0, 255], at the image's own resolution."""
    images: np.ndarray
    """(1, h, w, C) uint8, as the network takes it."""
    fit: Fit
    spacing: Spacing | None
    remarks: tuple[str, ...]


def segment(
    model: "Network | Engine",
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
    facts = facts_of(model)
    check_threshold(threshold, facts.outputs, multilabel=facts.multilabel)
    check_augmentation(augmentation, facts.mirror)
    given = read_input(facts, image, size=size, spacing=spacing)
    probability = compute_probability(model, given, augmentation=augmentation, tile=tile, halo=halo)
    return finish(facts, given, probability, threshold=threshold, cleaning=cleaning)


def read_input(
    facts: Facts,
    image: str | Path | np.ndarray,
    *,
    size: tuple[int, int] | Literal["own"] | None = None,
    spacing: Spacing | None = None,
) -> Input:
    """Read an image and fit it to the network, the first part of `segment`."""
    remarks: list[str] = []
    pixels, stated = _read(image, facts.in_channels, remarks)
    spacing = stated or spacing
    fit = fit_of(facts, (pixels.shape[0], pixels.shape[1]), size)
    name = "the image" if isinstance(image, np.ndarray) else str(image)
    return Input(name, pixels, fit.image(pixels, spacing)[None], fit, spacing, tuple(remarks))


def compute_probability(
    model: "Network | Engine",
    given: Input,
    *,
    augmentation: Augmentation = "none",
    tile: int | None = None,
    halo: int | None = None,
) -> np.ndarray:
    """Run the network, the second part of `segment`: probabilities (h, w, K) at its size, averaged over mirrorings."""
    facts = facts_of(model)
    total: np.ndarray | float = 0.0
    for axes in _FLIPPED_AXES[augmentation]:
        flipped = np.flip(given.images, axes)
        logits = forward(model, flipped) if tile is None else forward_in_tiles(model, flipped, tile, halo)
        values = np.flip(finite_probabilities(logits, given.name, multilabel=facts.multilabel), axes)
        if facts.mirror.channels and len(axes) % 2:  # mirrored twice, an image is turned, and sides stay
            values = values[..., list(facts.mirror.channels)]
        total = total + values
    average: np.ndarray = (np.asarray(total) / len(_FLIPPED_AXES[augmentation]))[0]
    return average


def finish(
    facts: Facts,
    given: Input,
    probability: np.ndarray,
    *,
    threshold: float | tuple[float, ...] = 0.5,
    cleaning: Cleaning | None = None,
) -> Prediction:
    """Bring the probabilities to the image's resolution and decide, the last part of `segment`."""
    shape = given.pixels.shape[0], given.pixels.shape[1]
    large = resize_to_image(given.fit.box(shape, given.spacing).crop(probability), shape)
    mask = apply_threshold(large, threshold, multilabel=facts.multilabel)
    return Prediction(mask if cleaning is None else clean(mask, cleaning), large, given.spacing, given.remarks)


def fit_of(facts: Facts, shape: tuple[int, int], size: tuple[int, int] | Literal["own"] | None = None) -> Fit:
    """How to fit an image of `shape` to the network, at its training size or at `size` (as for `segment`).

    Raises `UserError` if `size` is "own" and the model was trained at a fixed spacing.
    """
    if size == "own":
        if facts.spacing is not None:
            raise UserError(
                f"size own: the model was trained at {facts.spacing:g} mm per pixel, not at each image's own "
                "resolution; leave the size out, or give one that holds the largest image"
            )
        return Fit(shape)
    return Fit(size or facts.size or shape, facts.fit, facts.spacing)


def forward(model: "Network | Engine", images: np.ndarray) -> "jax.Array | np.ndarray":
    """Logits (N, H, W, K) of uint8 images (N, H, W, C), in evaluation mode.

    Compiled once for each architecture and shape, not for each set of weights, nor for each member of an ensemble.
    """
    if isinstance(model, Engine):
        return model.logits(images)
    logits: jax.Array = import_module("pdrunet_jax.predict.engines.network").network_logits(model, images)
    return logits


def forward_in_tiles(model: "Network | Engine", images: np.ndarray, tile: int, halo: int | None = None) -> np.ndarray:
    """Same as `forward`, in tiles of `tile` pixels per side with `halo` pixels around (see `predict/tiling.py`).

    `halo` is the network's radius by default. Raises `UserError` if tiles of it differ from the whole image.
    """
    facts = facts_of(model)
    check_tiles(facts)

    def network(part: np.ndarray) -> np.ndarray:
        logits = np.asarray(forward(model, part))
        trim_malloc()  # otherwise fragmentation makes memory grow with every tile
        return logits

    return in_tiles(network, images, tile, facts.radius if halo is None else halo, facts.multiple)


def check_tiles(facts: Facts) -> None:
    """Raise `UserError` if a pixel's logits depend on the size of the image, so that tiles cannot be exact."""
    if not facts.tileable:
        raise UserError("tile: a network with model.up = bilinear_corners computes whole images only; leave it out")


def resize_to_image(probability: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize probabilities (h, w, K) bilinearly to (H, W): float32 (H, W) for K = 1, else (H, W, K)."""
    height, width = shape
    channels = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
        for channel in np.moveaxis(probability, -1, 0)
    ]
    return channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)


def finite_probabilities(logits: "jax.Array | np.ndarray", name: str, *, multilabel: bool = False) -> np.ndarray:
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


def _read(image: str | Path | np.ndarray, channels: int, remarks: list[str]) -> tuple[np.ndarray, Spacing | None]:
    """Pixels (H, W, C) in [0, 255], and the spacing."""
    if not isinstance(image, np.ndarray):
        pixels, spacing = read_image_and_spacing(Path(image), channels, remarks)
        remarks += [remark] if (remark := low_contrast(pixels)) else []
        return pixels, spacing
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[-1] != channels or 0 in pixels.shape:
        raise UserError(f"the image has the shape {pixels.shape}; the model takes (H, W, {channels})")
    if pixels.dtype == np.uint8:
        return pixels, None
    if not np.issubdtype(pixels.dtype, np.floating) or not (pixels.min() >= 0 and pixels.max() <= 1):
        raise UserError(f"the image has {pixels.dtype} pixels; the model takes uint8, or floats in [0, 1]")
    return pixels.astype(np.float32) * 255, None
