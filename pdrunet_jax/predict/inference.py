"""A trained model on images: batches as training makes them, or one picture of any size from file to mask."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from PIL import Image

from pdrunet_jax.data.images import read_image, read_spacing, resize_image
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.pixels import probabilities, unit_range
from pdrunet_jax.predict.postprocess import Cleaning, clean
from pdrunet_jax.predict.threshold import apply_threshold, check_threshold
from pdrunet_jax.predict.tiling import RADIUS, in_tiles
from pdrunet_jax.runtime import compile as compiling
from pdrunet_jax.runtime.devices import Placement
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.malloc import trim_malloc

Augmentation = Literal["none", "flip", "flips"]
"""At test time: the image alone, also mirrored left to right, or also top to bottom and both."""

MIRRORS: dict[Augmentation, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "flip": ((), (2,)),
    "flips": ((), (2,), (1,), (1, 2)),
}
"""The axes of (N, H, W, C) that are reversed in each pass."""


class Prediction(NamedTuple):
    """What the model sees in one image, at the image's own resolution."""

    mask: np.ndarray
    """(H, W) uint8 class indices; 0 is background."""
    probability: np.ndarray
    """float32: (H, W), of foreground, for one output; (H, W, K), background first, for K."""
    spacing: tuple[float, float] | None
    """Millimetres per pixel, (row, column), where the file states it."""


def predict(
    model: PDRUNet,
    image: str | Path | np.ndarray,
    *,
    size: tuple[int, int] | Literal["own"] | None = None,
    threshold: float = 0.5,
    augmentation: Augmentation = "none",
    tile: int | None = None,
    halo: int = RADIUS,
    cleaning: Cleaning | None = None,
) -> Prediction:
    """Segment one image.

    It is resized to the size that the model was trained at, and the probabilities back to its own, bilinearly both
    times; only then each pixel is decided.

    Args:
        model: From `load_model`.
        image: A file, or pixels (H, W) or (H, W, C): uint8, or floats in [0, 1].
        size: (height, width) that the network works at, if not the one it was trained at; "own" for the image's own,
            at which a model that knows none works anyway.
        threshold: Probability above which a pixel is foreground. For one output only: several classes compete, and
            the likeliest wins.
        augmentation: Average the probabilities with those of the mirrored image.
        tile: Compute the network in tiles of so many pixels a side, for images larger than memory; see
            `pdrunet_jax.tiling`.
        halo: Pixels around a tile that count for it.
        cleaning: What is done to the mask, and not to the probabilities.

    Raises:
        UserError: The file cannot be read as an image, the pixels have another form, or the threshold does not fit.
    """
    check_threshold(threshold, model.outputs)
    pixels, spacing = _open(image, model.in_channels)
    shape = pixels.shape[0], pixels.shape[1]
    network_size = shape if size == "own" else size or model.size or shape
    images = network_input(pixels, network_size)[None]
    passes = MIRRORS[augmentation]
    average = sum(_mirrored_probabilities(model, images, axes, tile, halo) for axes in passes) / len(passes)
    probability = restore(np.asarray(average)[0], shape)
    mask = apply_threshold(probability, threshold)
    return Prediction(mask if cleaning is None else clean(mask, cleaning), probability, spacing)


def predict_batches(
    model: PDRUNet, batches: Iterable[Mapping[str, np.ndarray]], place: Placement
) -> Iterator[tuple[Mapping[str, np.ndarray], jax.Array]]:
    """Each of `batches` with its logits (N, H, W, K). A batch holds "image", uint8 (N, H, W, C), for `place`."""
    graphdef, state = nnx.split(model)
    state = place.replicate(state)
    for batch in batches:
        yield batch, _compiled()(graphdef, state, place.shard_batch({"image": batch["image"]})["image"])


def forward(model: PDRUNet, images: np.ndarray) -> jax.Array:
    """Logits (N, H, W, K) of uint8 images (N, H, W, C), in evaluation mode.

    Compiled once for each architecture and shape, whichever weights it is called with.
    """
    graphdef, state = nnx.split(model)
    logits: jax.Array = _compiled()(graphdef, state, jax.device_put(images))
    return logits


def forward_in_tiles(model: PDRUNet, images: np.ndarray, tile: int, halo: int = RADIUS) -> np.ndarray:
    """As `forward`, in tiles of `tile` pixels a side with `halo` pixels around; see `pdrunet_jax.tiling`."""

    def network(part: np.ndarray) -> np.ndarray:
        logits = np.asarray(forward(model, part))
        trim_malloc()  # what one tile has used lies in pieces: the next would not fit, and memory would grow
        return logits

    return in_tiles(network, images, tile, halo)


def network_input(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W, C) in [0, 255] as the uint8 image of `size` that the network is trained on."""
    return resize_image(pixels, size)


def restore(probability: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Probabilities (h, w, K) brought to another resolution bilinearly: float32 (H, W) for K = 1, else (H, W, K)."""
    height, width = shape
    channels = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
        for channel in np.moveaxis(probability, -1, 0)
    ]
    return channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)


def height_width(size: Sequence[int], otherwise: str = "") -> tuple[int, int]:
    """Height and width from what `--size` was given, one number for both. Raises `UserError`.

    `otherwise` ends its message: what the option takes beside numbers.
    """
    if len(size) > 2 or min(size) < 1:
        raise UserError(f"--size {' '.join(map(str, size))}: give one number or height and width, 1 or more{otherwise}")
    return size[0], size[-1]


def _mirrored_probabilities(
    model: PDRUNet, images: np.ndarray, axes: tuple[int, ...], tile: int | None, halo: int
) -> np.ndarray:
    """Probabilities (N, H, W, K) from the images reversed along `axes`, turned back."""
    mirrored = np.flip(images, axes)
    logits = forward(model, mirrored) if tile is None else forward_in_tiles(model, mirrored, tile, halo)
    return np.flip(np.asarray(probabilities(np.asarray(logits))), axes)


@cache
def _compiled() -> Any:
    # Made at the first call: asking for the compiler's options starts the backend, which an import must not do.
    def run(graphdef: nnx.GraphDef[PDRUNet], state: nnx.State[Any, Any], images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return model(unit_range(images))

    return compiling.jit(run, static_argnums=0)


def _open(image: str | Path | np.ndarray, channels: int) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Pixels (H, W, C) in [0, 255], and the spacing."""
    if isinstance(image, np.ndarray):
        return _checked(image, channels), None
    path = Path(image)
    return read_image(path, channels), read_spacing(path)


def _checked(pixels: np.ndarray, channels: int) -> np.ndarray:
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[-1] != channels or 0 in pixels.shape:
        raise UserError(f"the image has the shape {pixels.shape}; the model takes (H, W, {channels})")
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating) or not (pixels.min() >= 0 and pixels.max() <= 1):
        raise UserError(f"the image's pixels are {pixels.dtype}; the model takes uint8, or floats in [0, 1]")
    return pixels.astype(np.float32) * 255
