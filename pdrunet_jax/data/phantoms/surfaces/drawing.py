"""X-ray number k: a scene, its rays, the detector and the picture, all from the seed and k alone."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.phantoms.phantom import Difficulty, generator
from pdrunet_jax.data.phantoms.surfaces.appearance import MAKERS, developed, lettered, plain, stitched
from pdrunet_jax.data.phantoms.surfaces.bodies import Body
from pdrunet_jax.data.phantoms.surfaces.lead import calibration_ball, collimator, cushion, marker, ruler
from pdrunet_jax.data.phantoms.surfaces.physics import measured, primary, spectrum
from pdrunet_jax.data.phantoms.surfaces.raster import Picture
from pdrunet_jax.data.phantoms.surfaces.render import Rendered, render
from pdrunet_jax.data.phantoms.surfaces.scene import Chances, Scene, draw_scene
from pdrunet_jax.data.phantoms.surfaces.variations import Variation
from pdrunet_jax.data.phantoms.surfaces.views import VIEWS, View

CLASSES = ("femur", "tibia", "fibula", "patella", "pelvis", "foot")
"""Bones that have masks."""

_PICTURE, _BODY = 7, 8  # streams of random numbers; phantom.py and files.py of the package above have 0 to 2

_HARDSHIP: dict[Difficulty, float] = {"easy": 0.25, "standard": 1.0, "hard": 2.0}
"""Factor of noise and scatter, and of how often casts, implants, rulers and letters are drawn."""


@dataclass(frozen=True)
class Drawing:
    """An X-ray drawn from surfaces."""

    image: NDArray[np.uint8] | NDArray[np.uint16]
    """(H, W) grey values of 8 or 16 bits."""
    masks: dict[str, NDArray[np.bool_]]
    """(H, W) silhouette of each bone in the field, by class. Silhouettes overlap where bones do."""
    body: str
    """Name of the body that it is drawn from."""
    view: View
    traits: tuple[str, ...]
    """Projection, side, maker, and what else was drawn: cast, implant, ruler, stitched, inverted and so on."""
    quality: int | None
    """Quality of the JPEG file that it is meant for; None for PNG."""


def draw_xray(
    bodies: Sequence[Body],
    index: int,
    *,
    seed: int = 0,
    size: int = 512,
    difficulty: Difficulty = "standard",
    views: Sequence[View] = VIEWS,
    without: Collection[Variation] = (),
) -> Drawing:
    """Draw X-ray number `index` of a seed; its longest side is `size` pixels. Variations in `without` are left out.

    It depends on nothing but the arguments: neither on how many are drawn nor in which order. The same processor,
    NumPy, SciPy and Pillow give the same bits.
    """
    rng = generator(seed, _PICTURE, index)
    hard = _HARDSHIP[difficulty]
    body = bodies[body_index(len(bodies), index, seed)]
    metal = "implants" not in without
    chances = Chances(metal * min(0.12 * hard, 0.5), metal * min(0.05 * hard, 0.5), float("shape" not in without))
    scene = draw_scene(body, rng, size, chances, views)
    rendered = render(scene, rng, without)
    traits = [scene.projection, scene.side]
    signal, field = _exposed(scene, rendered, rng, hard, traits, without)
    for name, kinds in (("implant", ("titanium", "steel")), ("cast", ("plaster",))):
        if any((rendered.lengths[kind] > 1)[field].any() for kind in kinds if kind in rendered.lengths):
            traits.append(name)
    masks = {name: mask & field for name, mask in rendered.masks.items() if (mask & field).any()}
    body_seen = rendered.body & field
    if scene.view in ("leg", "legs") and rng.random() < 0.55 and "seams" not in without:
        signal, masks = stitched(signal, masks, rng)
        traits.append("stitched")

    # The picture.
    alike = "exposure" in without
    maker = MAKERS[int(rng.integers(len(MAKERS)))]
    traits += [] if alike else [maker.name]
    shown = plain(signal, body_seen) if alike else developed(signal, body_seen, rng, maker)
    if not field.all() and rng.random() < 0.3:
        shown = np.where(field, shown, np.float32(rng.choice([0, 0, 1])))
        traits.append("shutter")
    if rng.random() < 0.12 * hard and "objects" not in without:
        shown = lettered(shown, rng)
        traits.append("text")
    if rng.random() < 0.03 and not alike:  # MONOCHROME1 taken for MONOCHROME2
        shown = 1 - shown
        traits.append("inverted")
    image, quality = (np.round(shown * 255).astype(np.uint8), None) if alike else _coded(shown, rng, traits)
    return Drawing(image, masks, body.name, scene.view, tuple(traits), quality)


def body_index(count: int, index: int, seed: int) -> int:
    """Which of `count` bodies X-ray number `index` of a seed is drawn from."""
    return int(generator(seed, _BODY, index).integers(count))


def _exposed(
    scene: Scene,
    rendered: Rendered,
    rng: np.random.Generator,
    hard: float,
    traits: list[str],
    without: Collection[Variation],
) -> tuple[Picture, NDArray[np.bool_]]:
    """What the detector measures (H, W), and the field of the collimator (H, W)."""
    camera, lengths = scene.camera, dict(rendered.lengths)
    shape = camera.shape
    shadow = None if "collimation" in without else collimator(shape, rng)
    field = np.ones(shape, np.bool_) if shadow is None else shadow > 0.5
    if shadow is not None:
        traits.append("collimated")
    if "objects" not in without:
        _add_objects(lengths, scene, rendered, field, rng, hard, traits)

    alike = "exposure" in without
    thick = scene.view in ("hip", "pelvis", "thigh")
    peak = rng.uniform(68, 95) if thick or scene.view in ("leg", "legs") else rng.uniform(48, 72)
    signal = primary(lengths, spectrum(70.0 if alike else peak, 3.5 if alike else rng.uniform(2.5, 4.5)))
    rows, columns = (np.linspace(-0.5, 0.5, side, dtype=np.float32) for side in shape)
    heel = rng.normal(0, 0.0 if alike else 0.12, 2).astype(np.float32)
    signal *= np.exp(heel[0] * rows[:, None] + heel[1] * columns)
    if shadow is not None:
        signal *= shadow

    # The automatic exposure sees the patient inside the field.
    seen = rendered.body & field
    mean = float(signal[seen].mean()) if seen.any() else 1.0
    aim = 1e9 if "noise" in without else 10 ** rng.uniform(2.9, 4.6) / hard**2
    gridded = thick or rng.random() < 0.3
    scatter = hard * (rng.uniform(0.03, 0.2) if gridded else rng.uniform(0.1, 0.5)) * (1.4 if thick else 1.0)
    signal = measured(
        signal,
        rng,
        scatter=0.2 if alike else scatter,
        spread=rng.uniform(25, 60) / camera.pitch,
        blur=0.4 if alike else rng.uniform(0.2, 0.9) * max(shape) / 512,
        grain=rng.uniform(0.0, 0.7),
        quanta=max(aim / mean, 50.0),
    )
    if gridded and rng.random() < 0.4 and not alike:
        wave = np.sin(np.arange(max(shape), dtype=np.float32) * np.float32(rng.uniform(0.8, 3.0)))
        lines = 1 + np.float32(rng.uniform(0.003, 0.02)) * wave
        signal = signal * (lines[: shape[0], None] if rng.random() < 0.5 else lines[: shape[1]])
        traits.append("grid")
    return signal.astype(np.float32), field


def _add_objects(
    lengths: dict[str, Picture],
    scene: Scene,
    rendered: Rendered,
    field: NDArray[np.bool_],
    rng: np.random.Generator,
    hard: float,
    traits: list[str],
) -> None:
    """Add letters, a ruler, a calibration ball and a cushion to the path lengths."""
    shape, pitch = scene.camera.shape, scene.camera.pitch
    lead = np.zeros(shape, np.float32)
    if rng.random() < 0.65:
        busy = rendered.body & np.logical_or.reduce(list(rendered.masks.values()) or [rendered.body])
        lead += marker(shape, scene.side, busy, field, rng)
        traits.append("marker")
    if rng.random() < (0.35 if scene.view in ("leg", "legs") else 0.04 * hard):
        lead += ruler(shape, pitch, rng)
        traits.append("ruler")
    if lead.any():
        lengths["lead"] = lead
    if rng.random() < 0.04 * hard:
        lengths["steel"] = lengths.get("steel", np.float32(0)) + calibration_ball(shape, pitch, rng)
        traits.append("ball")
    if rng.random() < 0.2:
        lengths["muscle"] = lengths["muscle"] + cushion(shape, rng)
        traits.append("cushion")


def _coded(
    shown: NDArray[np.float32], rng: np.random.Generator, traits: list[str]
) -> tuple[NDArray[np.uint8] | NDArray[np.uint16], int | None]:
    """The picture in whole numbers, and the quality of its JPEG file or None."""
    kind = rng.random()
    if kind < 0.2:
        most = (1 << int(rng.choice([10, 12, 14, 16]))) - 1
        traits.append("16-bit")
        return np.round(shown * most).astype(np.uint16), None
    image = np.round(shown * 255).astype(np.uint8)
    if kind < 0.5:
        traits.append("jpeg")
        return image, int(rng.integers(45, 96))
    return image, None
