"""From a phantom limb to an 8-bit radiograph: view, attenuation, metal, exposure, noise, collimator, markers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pdrunet_jax.data.phantoms.anatomy import BONES, Bone, Limb
from pdrunet_jax.data.phantoms.projection import Array, project_blobs, project_bone, project_ribs, project_soft_tissue

_LETTERS = {
    "R": ("11110", "10001", "10001", "11110", "10100", "10010", "10001"),
    "L": ("10000", "10000", "10000", "10000", "10000", "10000", "11111"),
}
"""Bitmaps of the lead letters."""


@dataclass(frozen=True)
class Level:
    """Factors and probabilities of what makes a radiograph hard to read."""

    density: float = 1.0
    """Factor of bone density; below 1 is osteoporosis."""
    noise: float = 1.0
    scatter: float = 1.0
    cast: float = 0.06
    """Probability of a plaster cast."""
    metal: float = 0.12
    """Probability of a plate or nail."""
    uncollimated: float = 0.15
    """Probability of no collimator edges."""
    unmarked: float = 0.35
    """Probability of no lead letter."""
    wires: int = 0
    """Maximum number of cables and tubes."""


LEVELS = {
    "easy": Level(1.3, 0.5, 0.5, cast=0.0, metal=0.0, uncollimated=0.6, unmarked=0.8),
    "standard": Level(),
    "hard": Level(0.6, 2.0, 2.0, cast=0.3, metal=0.3, wires=3),
}


def radiograph(
    limb: Limb, rng: np.random.Generator, size: int, level: Level
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Array]:
    """Take a radiograph of `limb`; only the grain depends on the size, not the scene.

    Returns, each (size, size): grey values; bones, 0 or 1 + the bone's place in `BONES`, where two overlap the one
    nearer to the film; brightness, float32 in [0, 1] before quantization to 8 bits.
    """
    # Attenuation of soft tissue, short bones, ribs and cast.
    grain = rng.spawn(1)[0]
    y, x = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) / size - 0.5] * 2, indexing="ij")
    u, v = _view(x, y, rng)
    soft, under_skin = project_soft_tissue(limb, u, v)
    muscle, haze, trabeculae = (_cloud(rng, cells, size) for cells in (9, 4, 90))
    attenuation = 3.0 * soft * (1 + 0.04 * muscle) + 4 * project_blobs(limb.blobs, u, v)
    if limb.ribs:
        attenuation += 5 * project_ribs(limb, u, v, rng)
    if rng.random() < level.cast:
        attenuation += _cast(under_skin, trabeculae, rng)

    # Long bones, and the mask.
    flat, texture = attenuation.ravel(), trabeculae.ravel()  # views
    found = np.zeros(size * size, np.uint8)
    for bone in limb.bones:
        at, inside, cortical, trabecular = project_bone(bone, u, v)
        flat[at] += 6.5 * level.density * (cortical + trabecular * (1 + 0.16 * texture[at]))
        found[at[inside]] = 1 + BONES.index(bone.name)
    bones = found.reshape(size, size)
    mask = bones > 0
    bare = mask
    if rng.random() < level.metal:
        metal = _implant(limb.bones[int(rng.integers(len(limb.bones)))], u, v, rng, 1 / size)
        attenuation += metal
        bare = mask & (metal == 0)
    # Exposure, then wires, collimator and marker.
    brightness = _expose(attenuation, bare, under_skin > 0, x, y, haze, rng, grain, level)
    if level.wires:
        brightness = _draw_wires(brightness, x, y, rng.spawn(1)[0], level.wires, 1 / size)
    brightness, field = _collimate(brightness, x, y, rng, 1 / size, level.uncollimated)
    mask &= field
    brightness = _mark(brightness, mask, x, y, rng, level.unmarked)
    grey = np.clip(brightness * 255 + grain.random((size, size), np.float32), 0, 255)
    return grey.astype(np.uint8), bones * mask, brightness


def _draw_wires(brightness: Array, x: Array, y: Array, rng: np.random.Generator, most: int, pixel: float) -> Array:
    """Add up to `most` cables and tubes: bent bright lines, tubes with a darker middle."""
    for _ in range(int(rng.integers(most + 1))):
        angle, bend, shift, phase = rng.uniform((0, -0.5, -0.35, 0), (np.pi, 0.5, 0.35, 2 * np.pi))
        along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
        straight = np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x - np.float32(shift)
        sway = np.float32(0.015) * np.sin(np.float32(9) * along + np.float32(phase))
        across = straight + np.float32(bend) * along**2 + sway
        half, strength = rng.uniform((0.003, 0.1), (0.011, 0.4))
        line = _coverage(np.float32(half) - np.abs(across), pixel)
        if half > 0.007:
            line = line * (1 - np.float32(0.6) * _coverage(np.float32(0.6 * half) - np.abs(across), pixel))
        brightness = np.clip(brightness + np.float32(strength) * line, 0, 1).astype(np.float32)
    return brightness


def _view(x: Array, y: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Limb coordinates of the pixels: rotated, scaled, shifted, mirrored."""
    angle = rng.normal(0, 14) if rng.random() < 0.85 else rng.uniform(-180, 180)
    scale = rng.uniform(1.05, 1.35)
    shift = rng.uniform(-0.08, 0.08, 2)
    cos, sin = np.cos(np.radians(angle)) / scale, np.sin(np.radians(angle)) / scale
    u = np.float32(cos) * y + np.float32(sin) * x + np.float32(shift[0])
    v = np.float32(cos) * x - np.float32(sin) * y + np.float32(shift[1])
    return u, v if rng.random() < 0.5 else -v


def _cloud(rng: np.random.Generator, cells: int, size: int) -> Array:
    """Smooth noise of about unit variance: a coarse random grid, interpolated."""
    position = np.linspace(0, cells - 1, size)
    weights = np.clip(1 - np.abs(position[:, None] - np.arange(cells)[None, :]), 0, 1).astype(np.float32)
    grid = rng.standard_normal((cells, cells), np.float32)
    cloud: Array = weights @ grid @ weights.T
    return cloud


def _cast(under_skin: Array, texture: Array, rng: np.random.Generator) -> Array:
    """Attenuation of plaster around the limb, highest along the skin."""
    thickness = rng.uniform(0.025, 0.045)
    band = np.clip((under_skin + thickness) / 0.01, 0, 1)
    along_skin = np.clip(1 - under_skin / thickness, 0, 1)
    return np.asarray(band * (0.2 + 0.9 * along_skin) * (1 + 0.05 * texture), np.float32)


def _implant(bone: Bone, u: Array, v: Array, rng: np.random.Generator, pixel: float) -> Array:
    """Attenuation of a plate with screws next to the shaft, or of a nail inside it."""
    low, high = max(bone.start, -0.45), min(bone.stop, 0.45)
    length = (high - low) * rng.uniform(0.35, 0.8)
    begin = low + (high - low - length) * rng.uniform(0.1, 0.9)
    middle = bone.bow * np.sin(np.pi * np.clip((u - bone.start) / (bone.stop - bone.start), 0, 1))
    across = v - bone.offset - bone.tilt * u - middle

    within = np.minimum(u - begin, begin + length - u)
    kind = rng.random()
    if kind < 0.3:  # a nail inside the shaft
        return np.asarray(2.0 * _coverage(np.minimum(within, bone.radius * 0.32 - np.abs(across)), pixel), np.float32)
    places = np.linspace(begin + length * 0.08, begin + length * 0.92, int(rng.integers(4, 8)))
    nearest = np.abs(u[..., None] - places).min(axis=-1)
    if kind < 0.65:  # a plate seen from the front, with the heads of its screws
        side = rng.uniform(-0.4, 0.4) * bone.radius
        plate = 1.3 * _coverage(np.minimum(within, bone.radius * 0.42 - np.abs(across - side)), pixel)
        heads = _coverage(bone.radius * 0.3 - np.hypot(nearest, across - side), pixel) * _coverage(within, pixel)
        return np.asarray(plate + heads, np.float32)
    side = rng.choice([-1, 1])  # a plate seen from its edge, with its screws across the bone
    depth = side * across / bone.radius
    plate = 2.2 * _coverage(np.minimum(within, bone.radius * (0.13 - np.abs(depth - 1.13))), pixel)
    screws = np.minimum(bone.radius * 0.11 - nearest, bone.radius * np.minimum(depth + 0.9, 1.35 - depth))
    return np.asarray(np.maximum(plate, 1.8 * _coverage(screws, pixel) * _coverage(within, pixel)), np.float32)


def _coverage(inside: Array, pixel: float) -> Array:
    """Share of each pixel covered by a shape whose edge is `inside` away."""
    return np.asarray(np.clip(inside / np.float32(pixel) + np.float32(0.5), 0, 1))


def _expose(
    attenuation: Array,
    bone: NDArray[np.bool_],
    body: NDArray[np.bool_],
    x: Array,
    y: Array,
    haze: Array,
    rng: np.random.Generator,
    grain: np.random.Generator,
    level: Level,
) -> Array:
    """Turn attenuation into brightness in [0, 1]: beam, scatter, blur, noise and display window."""
    direction = rng.uniform(0, 2 * np.pi)
    heel = rng.uniform(0.1, 1.2) * (np.cos(direction) * x + np.sin(direction) * y) + 0.04 * haze
    scatter = np.float32(level.scatter * rng.uniform(0.01, 0.05)) * (1 + 0.1 * haze)
    signal = heel - np.log(np.exp(-attenuation) + scatter)
    signal = ndimage.gaussian_filter(signal, rng.uniform(0.25, 0.8) * len(x) / 256)
    # Noise grows behind thick parts, where fewer quanta arrive.
    quanta = np.float32(level.noise * rng.uniform(0.006, 0.02)) * np.exp(np.clip(signal, 0, 3) / 3)
    signal += quanta * grain.standard_normal(x.shape, np.float32)

    # The window fits the bones, as a radiographer would set it; the brightness of soft tissue is random.
    low, high = np.percentile(signal[bone if bone.any() else body], (2, 98))
    soft = np.percentile(signal[body & ~bone], rng.uniform(5, 60))
    contrast = max(high - soft, 0.3)
    bottom = min(soft, low) - contrast * rng.uniform(0.0, 1.1)
    top = high + contrast * rng.uniform(-0.1, 0.6)
    display = np.clip((signal - bottom) / (top - bottom), 0, 1)
    return np.asarray(display**2 ** rng.uniform(-0.7, 0.9), np.float32)


def _collimate(
    brightness: Array, x: Array, y: Array, rng: np.random.Generator, pixel: float, uncollimated: float
) -> tuple[Array, NDArray[np.bool_]]:
    """Limit the picture to a rectangular field; outside, film is unexposed (white) or the shutter black."""
    if rng.random() < uncollimated:
        return brightness, np.ones(brightness.shape, np.bool_)
    angle = np.radians(rng.normal(0, 6))
    across, along = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    left, right, top, bottom = rng.uniform(0.27, 0.52, 4)
    inward = np.minimum(np.minimum(across + left, right - across), np.minimum(along + top, bottom - along))
    white = rng.random() < 0.75
    softness = pixel * (rng.uniform(2, 8) if white else 1)
    open_share = np.clip(inward / softness + 0.5, 0, 1)
    outside = rng.uniform(0.85, 1.0) if white else rng.uniform(0, 0.06)
    return np.asarray(outside + (brightness - outside) * open_share, np.float32), inward > 0


def _mark(
    brightness: Array, mask: NDArray[np.bool_], x: Array, y: Array, rng: np.random.Generator, unmarked: float
) -> Array:
    """Add a lead letter, at the one of four places where it covers least bone."""
    if rng.random() < unmarked:
        return brightness
    letter = np.array([[int(c) for c in row] for row in _LETTERS["RL"[int(rng.integers(2))]]], np.float32)
    letter = np.pad(letter, 1)[:, :: 1 if rng.random() < 0.8 else -1]
    height = rng.uniform(0.06, 0.11)
    angle = np.radians(rng.normal(0, 12) + rng.choice([0, 0, 0, 90]))
    best, covered = None, mask.size + 1
    for place in rng.uniform(-0.42, 0.42, (4, 2)):
        dx, dy = x - place[0], y - place[1]
        row = ((np.cos(angle) * dy - np.sin(angle) * dx) / height + 0.5) * letter.shape[0]
        column = (np.cos(angle) * dx + np.sin(angle) * dy) / height * letter.shape[0] + letter.shape[1] / 2
        inside = (row >= 0) & (row < letter.shape[0]) & (column >= 0) & (column < letter.shape[1])
        if (overlap := int(np.count_nonzero(mask & inside))) < covered:
            best, covered = (row, column, inside), overlap
    assert best is not None
    row, column, inside = best
    drawn = np.zeros_like(brightness)
    drawn[inside] = ndimage.map_coordinates(letter, (row[inside] - 0.5, column[inside] - 0.5), order=1)
    drawn = np.clip((drawn - 0.5) * 3 + 0.5, 0, 1)
    boxed = rng.random() < 0.3
    plate = np.where(inside, 0.35 * brightness + 0.1, brightness) if boxed else brightness
    return np.asarray(plate + (rng.uniform(0.85, 1.0) - plate) * drawn, np.float32)
