"""Export to a StableHLO artifact of `jax.export`: from uint8 images of any size to masks of the same size.

Both exports reproduce Pillow's bilinear `resize` bit for bit. It makes one pass per axis, each a product with a matrix
of weights. From s to t pixels, output pixel i weighs input pixel j by max(0, 1 - |j + 1/2 - (i + 1/2) s/t| /
max(s/t, 1)), divided by the sum of the row. For 8-bit pixels, weights are rounded to `FIXED_POINT` bits and each pass
to whole grey values.

With padding (`data.fit = pad`), the image fills a rectangle of the network's input. The matrices span the whole input,
with zeros outside the rectangle: the way in makes it black there, and the way out reads nothing there.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax import lax
from PIL import Image

from pdrunet_jax.model.base import Network
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.pixels import probabilities, unit_range

FIXED_POINT = 22
"""Fractional bits of the resize weights for 8-bit pixels."""

PLATFORMS = ("cpu", "cuda", "tpu")
"""Platforms that the artifact runs on."""


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """What an exported graph contains in addition to the network.

    Both formats map images (N, H, W, C), uint8, to "mask", uint8 (N, H, W), "probability", float32 (N, H, W) or
    (N, H, W, K) for K > 1 outputs, and "logits", float32 (N, height, width, K). N, H and W are dynamic. If classes
    overlap, the mask is (N, H, W, K) of 0 and 1.

    With `network_only`, images are float32 in [0, 1] at the network's size, and so are "probability" and "logits".
    """

    size: tuple[int, int] | None
    """(height, width) that the network runs at; None for that of each image."""
    threshold: float | tuple[float, ...]
    """Foreground probability threshold, for models with one output or overlapping classes (also one a class)."""
    tall_first: bool
    """Whether to resize tall images vertically first (see `pillow_resizes_tall_first`)."""
    fit: Literal["stretch", "pad"] = "stretch"
    """As `data.fit`."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Self-description of the file, JSON values."""
    network_only: bool = False
    """Whether scaling, resizing and the mask are left to the caller."""


def pillow_resizes_tall_first() -> bool:
    """Whether the installed Pillow starts with the vertical pass if the height shrinks by over twice as much as width.

    Earlier versions always start with the horizontal pass. The two orders differ by one grey value in some pixels.
    """
    tall = np.random.default_rng(0).integers(0, 256, (96, 24), np.uint8)

    def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))

    return np.array_equal(resize(tall, 20, 32), resize(resize(tall, 24, 32), 20, 32))


def build_stablehlo(model: Network, spec: GraphSpec) -> bytes:
    """Serialise a float32 model as an artifact; the metadata become its `fun_name`, as JSON.

    Raises `ValueError` if `spec` has no size.
    """
    plain = Execution("plain")  # the only path whose operations every platform runs well

    def network(images: jax.Array) -> dict[str, jax.Array]:
        logits = model(images, execution=plain)
        values = probabilities(logits, multilabel=model.multilabel)
        return {"probability": values[..., 0] if model.outputs == 1 else values, "logits": logits}

    def segment(images: jax.Array) -> dict[str, jax.Array]:
        rows, columns = _box(images.shape[1], images.shape[2], spec)
        logits = model(unit_range(_resize_images(images, rows, columns, spec)), execution=plain)
        small = probabilities(logits, multilabel=model.multilabel)
        probability = _resize_probability(small, rows, columns, images.shape[1], images.shape[2])
        if model.multilabel:
            at = jnp.broadcast_to(jnp.asarray(spec.threshold, jnp.float32), (model.outputs,))
            mask = probability > at.reshape(1, 1, 1, -1)
        elif model.outputs == 1:
            probability = probability[..., 0]
            mask = probability > jnp.float32(spec.threshold)
        else:
            mask = jnp.argmax(probability, axis=-1)
        return {"mask": mask.astype(jnp.uint8), "probability": probability, "logits": logits}

    # float64 for the resize weights; full float32 products, because GPUs and TPUs default to shorter formats.
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        sides = "{}, {}".format(*_size(spec)) if spec.network_only else "h, w"
        shape = jax_export.symbolic_shape(f"n, {sides}, {model.config.in_channels}")
        images = jax.ShapeDtypeStruct(shape, jnp.float32 if spec.network_only else jnp.uint8)
        exported = jax_export.export(jax.jit(network if spec.network_only else segment), platforms=PLATFORMS)(images)
    return bytes(dataclasses.replace(exported, fun_name=json.dumps(dict(spec.metadata))).serialize())


def open_stablehlo(data: bytes) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Load an artifact on the default device: a function from images to outputs by name."""
    function = jax.jit(jax_export.deserialize(bytearray(data)).call)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in function(images).items()}

    return run


def _size(spec: GraphSpec) -> tuple[int, int]:
    """The size of the network's input. Raises `ValueError` if there is none."""
    if spec.size is None:
        raise ValueError("a StableHLO artifact runs the network at one size")
    return spec.size


class Span(NamedTuple):
    """One axis of the rectangle that the image fills: `length` of `side` pixels, from `start` on."""

    side: int
    start: Any
    length: Any


def _box(height: Any, width: Any, spec: GraphSpec) -> tuple[Span, Span]:
    """Rows and columns of the rectangle of an image (height, width): `data.fit.Fit.box`."""
    target_height, target_width = _size(spec)
    if spec.fit == "stretch":
        return Span(target_height, 0, target_height), Span(target_width, 0, target_width)
    high, wide = jnp.asarray(height, jnp.int64), jnp.asarray(width, jnp.int64)

    def scaled(side: Any, numerator: Any, denominator: Any) -> jax.Array:
        return jnp.maximum((2 * side * numerator + denominator) // (2 * denominator), 1)

    tall = target_height * wide <= target_width * high
    rows = jnp.where(tall, target_height, scaled(high, target_width, wide))
    columns = jnp.where(tall, scaled(wide, target_height, high), target_width)
    return (
        Span(target_height, (target_height - rows) // 2, rows),
        Span(target_width, (target_width - columns) // 2, columns),
    )


def _resize_images(images: jax.Array, down: Span, across: Span, spec: GraphSpec) -> jax.Array:
    """Resize images (N, H, W, C), uint8, to `spec.size` exactly as Pillow does."""
    height, width = images.shape[1:3]
    rows, columns = _fixed_point(_weights_in(height, down)), _fixed_point(_weights_in(width, across))

    def horizontal(x: jax.Array) -> jax.Array:
        return _rounded(jnp.einsum("nhwc,vw->nhvc", x, columns))

    def vertical(x: jax.Array) -> jax.Array:
        return _rounded(jnp.einsum("nhwc,vh->nvwc", x, rows))

    pixels = images.astype(jnp.int32)
    if not spec.tall_first:
        return vertical(horizontal(pixels)).astype(jnp.uint8)
    tall = jnp.asarray(height) - down.length > jnp.maximum(2 * (jnp.asarray(width) - across.length), 0)
    resized: jax.Array = lax.cond(tall, lambda x: horizontal(vertical(x)), lambda x: vertical(horizontal(x)), pixels)
    return resized.astype(jnp.uint8)


def _resize_probability(probability: jax.Array, down: Span, across: Span, height: Any, width: Any) -> jax.Array:
    """Resize the rectangle in (N, h, w, K) to (N, height, width, K) as Pillow does for floating-point images."""
    columns = _weights_out(across, width).astype(probability.dtype)
    rows = _weights_out(down, height).astype(probability.dtype)
    return jnp.einsum("nhwk,vh->nvwk", jnp.einsum("nhwk,vw->nhvk", probability, columns), rows)


def _weights_in(source: Any, into: Span) -> jax.Array:
    """Resize weights (into.side, source), float64, unrounded; zero rows outside the span."""
    at = jnp.arange(into.side) - into.start
    weights = _weights(jnp.arange(source), at, source, into.length)
    return jnp.where(((at >= 0) & (at < into.length))[:, None], weights, 0)


def _weights_out(of: Span, target: Any) -> jax.Array:
    """Resize weights (target, of.side), float64, unrounded; zero columns outside the span."""
    return _weights(jnp.arange(of.side) - of.start, jnp.arange(target), of.length, target)


def _weights(sources: jax.Array, targets: jax.Array, source: Any, target: Any) -> jax.Array:
    """Resize weights (targets, sources), float64, unrounded, from `source` to `target` pixels.

    `sources` and `targets` are the pixels' places; sources outside weigh nothing. Sizes are numbers, arrays or symbolic
    dimensions.
    """
    scale = jnp.asarray(source, jnp.float64) / jnp.asarray(target, jnp.float64)
    narrower = 1 / jnp.maximum(scale, 1)
    centres = (targets.astype(jnp.float64) + 0.5) * scale
    distance = sources.astype(jnp.float64)[None, :] - centres[:, None] + 0.5
    weights = jnp.maximum(1 - jnp.abs(distance * narrower), 0)
    weights = jnp.where((sources >= 0) & (sources < jnp.asarray(source)), weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _fixed_point(weights: jax.Array) -> jax.Array:
    return jnp.floor(weights * 2**FIXED_POINT + 0.5).astype(jnp.int32)


def _rounded(sums: jax.Array) -> jax.Array:
    return (sums + 2 ** (FIXED_POINT - 1)) >> FIXED_POINT
