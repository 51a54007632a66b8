"""Comparison of an exported model with the original on images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from pdrunet_jax.data.fit import Fit
from pdrunet_jax.data.images import read_image, resize_image
from pdrunet_jax.data.phantoms.phantom import draw
from pdrunet_jax.export.stablehlo import GraphSpec
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.pixels import probabilities, unit_range
from pdrunet_jax.predict.inference import forward, segment
from pdrunet_jax.predict.threshold import apply_threshold

TOLERANCE = 1e-4
"""Largest accepted difference of probabilities, and of logits up to ±`LARGE_LOGIT`; beyond, it grows in proportion."""

LARGE_LOGIT = 10.0
"""Beyond this, float32 rounding alone makes logits differ by more than a fixed bound allows."""

PHANTOMS = ((320, 256), (176, 208))
"""(height, width) of the synthetic X-rays used if no images are given."""

Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""From images (N, H, W, C) to "mask", "probability" and "logits", as `GraphSpec` says."""


class Agreement(NamedTuple):
    """Differences between an exported model and the original."""

    logits: float
    """Largest difference."""
    largest_logit: float
    """Largest absolute value of the model's logits."""
    probability: float
    """Largest difference."""
    differing: int
    """Mask pixels with another class."""
    inconsistent: int
    """Mask pixels that contradict the exported model's own probabilities."""
    pixels: int
    """Number of mask pixels; 0 for a network alone."""
    images: int
    sizes: tuple[tuple[int, int], ...]

    @property
    def good(self) -> bool:
        """Whether all differences are rounding errors."""
        bound = TOLERANCE * max(1.0, self.largest_logit / LARGE_LOGIT)
        return self.logits <= bound and self.probability <= TOLERANCE and self.inconsistent == 0  # false for NaN, too

    def __str__(self) -> str:
        sizes = ", ".join(f"{height} x {width}" for height, width in self.sizes)
        masks = f"; {self.differing} of {self.pixels:,} mask pixels differ ({self.differing / max(self.pixels, 1):.4%})"
        return (
            f"{self.images} images of {sizes} pixels: largest difference of logits {self.logits:.1e} (they reach "
            f"{self.largest_logit:.3g}), of probabilities {self.probability:.1e}{masks if self.pixels else ''}"
        )


def check_images(paths: Sequence[Path], channels: int) -> list[np.ndarray]:
    """Images (H, W, channels), uint8, from `paths` or synthetic. Raises `UserError` that names an unreadable file."""
    if paths:
        return [np.clip(np.rint(read_image(path, channels)), 0, 255).astype(np.uint8) for path in paths]
    drawn = [draw(number, size=max(size)).image[: size[0], : size[1]] for number, size in enumerate(PHANTOMS)]
    return [np.repeat(image[..., None], channels, axis=-1) for image in drawn]


def compare_outputs(run: Run, model: Network, images: Sequence[np.ndarray], spec: GraphSpec) -> Agreement:
    """Compare `run`, of a graph built to `spec`, with the model's logits and with `segment`.

    Each image is run alone at its own size, then all of them and a mirrored one as a batch at another size.
    """
    logits = probability = largest = 0.0
    differing = inconsistent = pixels = count = 0
    sizes: dict[tuple[int, int], None] = {}
    for batch in _batches(images):
        fit = Fit(spec.size or (batch.shape[1], batch.shape[2]), model.fit)
        fitted = np.stack([fit.image(image) for image in batch])
        got = run(np.asarray(unit_range(fitted)) if spec.network_only else batch)
        for number, image in enumerate(batch):
            with jax.default_matmul_precision("highest"):  # on GPUs, JAX's default would be TF32
                want_logits = np.asarray(forward(model, fitted[number][None]))[0]
                if spec.network_only:
                    values = np.asarray(probabilities(want_logits, multilabel=model.multilabel))
                    want = values[..., 0] if model.outputs == 1 else values
                else:
                    want, mask = _segment(model, image, spec)
            # np.maximum keeps NaN, max() would drop it.
            logits = np.maximum(logits, np.abs(got["logits"][number] - want_logits).max())
            largest = np.maximum(largest, np.abs(want_logits).max())
            probability = np.maximum(probability, np.abs(got["probability"][number] - want).max())
            if not spec.network_only:
                differing += int(np.sum(got["mask"][number] != mask))
                again = apply_threshold(got["probability"][number], spec.threshold, multilabel=model.multilabel)
                inconsistent += int(np.sum(got["mask"][number] != again))
                pixels += mask.size
        count += len(batch)
        sizes[batch.shape[1], batch.shape[2]] = None
    differences = float(logits), float(largest), float(probability)
    return Agreement(*differences, differing, inconsistent, pixels, count, tuple(sizes))


def _segment(model: Network, image: np.ndarray, spec: GraphSpec) -> tuple[np.ndarray, np.ndarray]:
    """Probability and mask of the model."""
    result = segment(model, image, size=spec.size or "own", threshold=spec.threshold)
    return result.probability, result.mask


def _batches(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    height, width = (max(1, side * 3 // 4) for side in images[0].shape[:2])
    second = np.stack([resize_image(image, (height, width)) for image in (*images, images[0][:, ::-1])])
    return [*(image[None] for image in images), second]
