"""From what the detector measured to the picture that a maker's software shows: panels, enhancement, window, coding."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pdrunet_jax.data.phantoms.surfaces.raster import Picture, resized


@dataclass(frozen=True)
class Maker:
    """How a maker's software turns a measurement into a picture."""

    name: str
    detail: tuple[float, float]
    """Range of the gain of small structures."""
    flattening: tuple[float, float]
    """Range of the share of slow changes that is taken away."""
    curve: tuple[float, float]
    """Range of the strength of the S-shaped curve of film; 0 is a straight line."""


MAKERS = (
    Maker("film", (0.0, 0.1), (0.0, 0.0), (1.0, 2.5)),
    Maker("plain", (0.0, 0.3), (0.0, 0.1), (0.0, 0.8)),
    Maker("enhanced", (0.4, 1.6), (0.15, 0.5), (0.0, 1.0)),
    Maker("flat", (0.2, 0.8), (0.4, 0.7), (0.3, 1.2)),
)


def stitched(
    signal: Picture, masks: dict[str, NDArray[np.bool_]], rng: np.random.Generator
) -> tuple[Picture, dict[str, NDArray[np.bool_]]]:
    """Put a long picture together from two or three panels: steps of exposure, seams, and small shifts of both.

    Returns the signal (H, W) and the masks of the bones as they are shown.
    """
    height = signal.shape[0]
    count = int(rng.integers(2, 4))
    seams = [round(height * (index + rng.uniform(-0.12, 0.12)) / count) for index in range(1, count)]
    signal, masks = signal.copy(), {name: mask.copy() for name, mask in masks.items()}
    for top, bottom in zip(seams, [*seams[1:], height], strict=True):
        step = round(rng.normal(0, 1.2) * height / 512)
        for picture in (signal, *masks.values()):
            picture[top:bottom] = _shifted(picture[top:bottom], step)
        signal[top:bottom] *= np.float32(np.exp(rng.normal(0, 0.25)))
    for seam in seams:
        style = rng.random()
        if style < 0.4:  # a blend of both panels
            half = max(2, round(height * rng.uniform(0.004, 0.015)))
            above, below = signal[max(seam - half, 0)].copy(), signal[min(seam + half, height - 1)].copy()
            place = np.linspace(0, 1, 2 * half)[:, None]
            rows = signal[seam - half : seam + half]
            rows[:] = 0.5 * rows + 0.5 * (above * (1 - place) + below * place)[: len(rows)]
        elif style < 0.65:  # a line
            signal[seam : seam + max(1, round(height / 700))] *= np.float32(rng.choice([0.3, 3.0]))
    return signal, masks


def developed(signal: Picture, body: NDArray[np.bool_], rng: np.random.Generator, maker: Maker) -> NDArray[np.float32]:
    """Turn the signal (H, W) into brightness in [0, 1]; the window fits the pixels of `body` (H, W)."""
    dense = -np.log(signal)
    size = max(signal.shape)
    detail, flattening, curve = (rng.uniform(*each) for each in (maker.detail, maker.flattening, maker.curve))
    if detail > 0.05 or flattening > 0.05:
        limit = np.percentile(dense[body], 99.9) if body.any() else dense.max()
        dense = np.minimum(dense, limit + 0.7)
        step = 4
        coarse = dense[::step, ::step]
        fine, slow = (
            resized(ndimage.gaussian_filter(coarse, width * size / step, mode="nearest", truncate=2.5), dense.shape)
            for width in (rng.uniform(0.008, 0.025), rng.uniform(0.06, 0.15))
        )
        dense = dense + np.float32(detail) * (dense - fine) - np.float32(flattening) * (slow - np.float32(slow.mean()))
    inside = dense[body][::3] if body.any() else dense.ravel()
    low, high = np.percentile(inside, (rng.uniform(0.5, 8), rng.uniform(98.5, 99.8)))
    contrast = max(high - low, 0.25)
    bottom = low - contrast * (abs(rng.normal(0, 0.25)) - 0.05)
    top = high + contrast * rng.uniform(-0.1, 0.3)
    shown = np.clip((dense - np.float32(bottom)) / np.float32(top - bottom), 0, 1)
    if curve > 0.1:
        centre = np.float32(rng.uniform(0.4, 0.6))
        ends = np.tanh(curve * np.array((-centre, 1 - centre)))
        shown = (np.tanh(np.float32(curve) * (shown - centre)) - ends[0]) / (ends[1] - ends[0])
    return np.asarray(np.clip(shown, 0, 1) ** np.float32(2 ** rng.normal(0, 0.4)), np.float32)


def plain(signal: Picture, body: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Turn the signal (H, W) into brightness in [0, 1], the same way for all pictures: logarithm and window."""
    dense = -np.log(signal)
    low, high = np.percentile(dense[body] if body.any() else dense, (1, 99.5))
    return np.asarray(np.clip((dense - low) / max(high - low, 0.25), 0, 1), np.float32)


def lettered(shown: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Write a line or two of text into a corner, as workstations do."""
    image = Image.fromarray(shown)
    size = max(7, round(rng.uniform(0.016, 0.03) * max(shown.shape)))
    lines = ["".join(rng.choice(list("ABDEKLMNRST 0123456789"), int(rng.integers(5, 14)))) for _ in range(3)]
    text = "\n".join(lines[: int(rng.integers(1, 4))])
    bottom, right = rng.random(2) < 0.5
    place = (shown.shape[1] - 4 if right else 4, shown.shape[0] - 4 if bottom else 4)
    anchor = ("r" if right else "l") + ("d" if bottom else "a")
    ImageDraw.Draw(image).multiline_text(
        place, text, float(rng.uniform(0.6, 1.0)), ImageFont.load_default(size), anchor=anchor
    )
    return np.clip(np.asarray(image, np.float32), 0, 1)


def _shifted(rows: NDArray[np.generic], step: int) -> NDArray[np.generic]:
    """The rows moved right by `step` pixels; what moves in repeats the edge."""
    if not step:
        return rows.copy()
    columns = np.clip(np.arange(rows.shape[1]) - step, 0, rows.shape[1] - 1)
    return rows[:, columns]
