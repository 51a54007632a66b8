"""What a graph outside Pillow has to know in order to repeat its bilinear `resize`, bit for bit.

Each axis has a pass of its own, a product with a matrix of weights. For output pixel i of a side that goes from s to t
pixels the weight of input pixel j is max(0, 1 - |j + 1/2 - (i + 1/2) s/t| / max(s/t, 1)), divided by the sum of the
row. For 8-bit pixels the weights are rounded to `FIXED_POINT` bits, and each pass is rounded to whole grey values.

The model as a StableHLO artifact of `jax.export`: from uint8 images of any size to masks of the same size.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export
from jax import lax
from PIL import Image

from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.pixels import probabilities, unit_range

FIXED_POINT = 22
"""Bits after the point in the weights for 8-bit pixels."""


def tall_images_vertically_first() -> bool:
    """Whether the installed Pillow starts with the vertical pass where the height shrinks by more than twice the width.

    Where that is so depends on its version: earlier ones always start with the horizontal pass. The two orders round
    differently, by one grey value in some pixels.
    """
    tall = np.random.default_rng(0).integers(0, 256, (96, 24), np.uint8)

    def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))

    return np.array_equal(resize(tall, 20, 32), resize(resize(tall, 24, 32), 20, 32))


PLATFORMS = ("cpu", "cuda", "tpu")
"""What the artifact is made for."""


def build_stablehlo(
    model: PDRUNet, *, size: tuple[int, int], threshold: float, tall_first: bool, metadata: Mapping[str, Any]
) -> bytes:
    """The serialised artifact.

    Its function takes images (N, H, W, C), uint8, and returns "mask", uint8 (N, H, W), "probability", float32
    (N, H, W) or (N, H, W, K) for K > 1 outputs, and "logits", float32 (N, height, width, K). N, H and W are free.

    Args:
        model: in float32; its execution path does not matter, the artifact has the plain one.
        size: (height, width) that the network works at.
        threshold: probability above which a pixel is foreground, for one output.
        tall_first: how Pillow orders its passes; see `pdrunet_jax.resampling`.
        metadata: JSON values; they become the artifact's `fun_name`.
    """
    model = nnx.clone(model)
    model.path = "plain"  # the only one made of operations that every platform does well

    def segment(images: jax.Array) -> dict[str, jax.Array]:
        logits = model(unit_range(_resize(images, size, tall_first)))
        probability = _restore(probabilities(logits), images.shape[1], images.shape[2])
        if model.outputs == 1:
            probability = probability[..., 0]
            mask = probability > jnp.float32(threshold)
        else:
            mask = jnp.argmax(probability, axis=-1)
        return {"mask": mask.astype(jnp.uint8), "probability": probability, "logits": logits}

    # The weights of Pillow's resize are computed in float64; products are in float32, not in a GPU's or TPU's shorter
    # formats, so that the artifact gives the same everywhere.
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        shape = jax_export.symbolic_shape(f"n, h, w, {model.in_channels}")
        images = jax.ShapeDtypeStruct(shape, jnp.uint8)
        exported = jax_export.export(jax.jit(segment), platforms=PLATFORMS)(images)
    return bytes(dataclasses.replace(exported, fun_name=json.dumps(dict(metadata))).serialize())


def open_stablehlo(data: bytes) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The artifact's function on the default device, from images to its outputs by name."""
    function = jax.jit(jax_export.deserialize(bytearray(data)).call)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in function(images).items()}

    return run


def _resize(images: jax.Array, size: tuple[int, int], tall_first: bool) -> jax.Array:
    """Pillow's bilinear `resize` of (N, H, W, C) uint8 to `size`, bit for bit."""
    height, width = images.shape[1:3]
    rows = _fixed_point(_weights(height, size[0]))
    columns = _fixed_point(_weights(width, size[1]))

    def horizontal(x: jax.Array) -> jax.Array:
        return _rounded(jnp.einsum("nhwc,vw->nhvc", x, columns))

    def vertical(x: jax.Array) -> jax.Array:
        return _rounded(jnp.einsum("nhwc,vh->nvwc", x, rows))

    pixels = images.astype(jnp.int32)
    if not tall_first:
        return vertical(horizontal(pixels)).astype(jnp.uint8)
    tall = jnp.asarray(height) - size[0] > jnp.maximum(2 * (jnp.asarray(width) - size[1]), 0)
    resized: jax.Array = lax.cond(tall, lambda x: horizontal(vertical(x)), lambda x: vertical(horizontal(x)), pixels)
    return resized.astype(jnp.uint8)


def _restore(probability: jax.Array, height: Any, width: Any) -> jax.Array:
    """(N, h, w, K) bilinearly to (N, height, width, K), as Pillow resizes floating-point images."""
    columns = _weights(probability.shape[2], width).astype(probability.dtype)
    rows = _weights(probability.shape[1], height).astype(probability.dtype)
    return jnp.einsum("nhwk,vh->nvwk", jnp.einsum("nhwk,vw->nhvk", probability, columns), rows)


def _weights(source: Any, target: Any) -> jax.Array:
    """The matrix (target, source) of `pdrunet_jax.resampling`, float64; the sizes are numbers or symbols."""
    scale = jnp.asarray(source, jnp.float64) / jnp.asarray(target, jnp.float64)
    narrower = 1 / jnp.maximum(scale, 1)
    centres = (jnp.arange(target, dtype=jnp.float64) + 0.5) * scale
    distance = jnp.arange(source, dtype=jnp.float64)[None, :] - centres[:, None] + 0.5
    weights = jnp.maximum(1 - jnp.abs(distance * narrower), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _fixed_point(weights: jax.Array) -> jax.Array:
    return jnp.floor(weights * 2**FIXED_POINT + 0.5).astype(jnp.int32)


def _rounded(sums: jax.Array) -> jax.Array:
    return (sums + 2 ** (FIXED_POINT - 1)) >> FIXED_POINT
