"""Anatomy of the phantoms: long bones, short bones and soft tissue of a random limb.

Coordinates `u` (along the limb) and `v` (across it) are in units of the image's side; the view rotates and shifts them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

BONES = ("femur", "tibia", "fibula", "humerus", "radius", "ulna")

EndShape = Literal["condyles", "plateau", "head", "slant", "cut"]


@dataclass(frozen=True)
class End:
    """One end of a long bone. Flares widen the shaft on either side, in units of its half-width."""

    shape: EndShape
    left: float = 0.0
    right: float = 0.0
    length: float = 1.0
    """Extent of the flare along the bone, in half-widths of the shaft."""


@dataclass(frozen=True)
class Bone:
    """A long bone: a tube of cortex around marrow, with flared ends of trabecular bone."""

    name: str
    """One of `BONES`."""
    start: float
    stop: float
    offset: float
    """Position across the limb at u = 0."""
    radius: float
    """Half-width of the shaft."""
    first: End
    last: End
    tilt: float = 0.0
    """Change of the offset per unit of u."""
    bow: float = 0.0
    """Sideways displacement of the middle."""
    cortex: float = 0.35
    """Thickness of the shaft's wall as a fraction of its half-width."""
    spongy: float = 0.35
    """Density of the trabecular bone relative to cortex."""


@dataclass(frozen=True)
class Blob:
    """A short bone (carpal, tarsal, kneecap): an ellipse, not in the mask."""

    u: float
    v: float
    half_u: float
    half_v: float
    density: float = 1.0


@dataclass(frozen=True)
class Limb:
    """All that the X-rays pass through."""

    bones: tuple[Bone, ...]
    blobs: tuple[Blob, ...]
    left: tuple[float, ...]
    """Half-widths of the soft tissue at negative v, at equal steps of u in [-1, 1]."""
    right: tuple[float, ...]
    depth: float
    """Half-thickness of the soft tissue along the beam."""
    planes: tuple[float, ...]
    """Muscle and fat: relative density at equal steps of v in [-1, 1]."""
    ribs: float
    """Position v at which a rib cage begins; 0 for none."""


CUT = End("cut")
_FAR = 1.2  # outside every view


def draw_limb(rng: np.random.Generator) -> Limb:
    """Draw one patient's limb."""
    kind = int(rng.choice(len(_KINDS), p=[0.2, 0.25, 0.25, 0.15, 0.15]))
    draw, thickness = _KINDS[kind]
    bones, blobs = draw(rng)
    zoom = float(rng.uniform(0.85, 1.15))
    thickness *= float(rng.uniform(0.85, 1.25))
    steps = np.linspace(-1, 1, 9)
    width = thickness + rng.uniform(-0.05, 0.05) * steps + rng.normal(0, 0.012, 9)
    sway = 0.025 * np.sin(rng.uniform(1, 4) * steps + rng.uniform(0, 6))
    left, right = width - sway, width + sway
    ribs = 0.0
    if draw is _humerus and rng.random() < 0.7:
        ribs = float(rng.uniform(0.24, 0.32))
        right = right + 0.6
    return Limb(
        bones=tuple(_varied(bone, rng, zoom) for bone in bones),
        blobs=tuple(_varied_blob(blob, rng, zoom) for blob in blobs),
        left=tuple((left * zoom).tolist()),
        right=tuple((right * zoom).tolist()),
        depth=thickness * zoom * float(rng.uniform(0.75, 1.0)),
        planes=tuple(rng.normal(0, 1, 40).tolist()),
        ribs=ribs * zoom,
    )


def _lower_leg(rng: np.random.Generator) -> tuple[list[Bone], list[Blob]]:
    if rng.random() >= 0.5:  # without the ankle
        return _knee(rng, float(rng.uniform(-0.5, -0.3)))
    end = float(rng.uniform(0.15, 0.55))
    bow = float(rng.uniform(-0.02, 0.02))
    tibia = Bone("tibia", -_FAR, end, -0.02, 0.052, CUT, End("slant", 0.75, 0.45, 2.6), bow=bow)
    offset, tilt = float(rng.uniform(0.09, 0.115)), float(rng.uniform(-0.03, 0.02))
    head = End("head", 0.3, 0.7, 3.0)
    fibula = Bone("fibula", -_FAR, end + 0.05, offset, 0.025, CUT, head, tilt=tilt, cortex=0.5)
    foot = [
        Blob(end + 0.085, 0.01, 0.06, 0.085, 0.7),
        Blob(end + 0.2, 0.0, 0.1, 0.07, 0.8),
        Blob(end + 0.4, 0, 0.1, 0.12),
    ]
    return [tibia, fibula], foot


def _knee(rng: np.random.Generator, joint: float | None = None) -> tuple[list[Bone], list[Blob]]:
    joint = float(rng.uniform(-0.2, 0.2)) if joint is None else joint
    tilt = float(rng.uniform(-0.08, 0.08))
    femur = Bone("femur", -_FAR, joint - 0.012, 0.0, 0.06, CUT, End("condyles", 0.85, 0.85, 3.2), tilt=tilt)
    tibia = Bone("tibia", joint + 0.025, _FAR, -0.01, 0.056, End("plateau", 0.9, 0.9, 2.4), CUT)
    fibula = Bone("fibula", joint + 0.09, _FAR, 0.105, 0.025, End("head", 0.5, 0.7, 2.5), CUT, tilt=0.02, cortex=0.5)
    return [femur, tibia, fibula], [Blob(joint - 0.1, 0.0, 0.055, 0.05, 0.35)]


def _forearm(rng: np.random.Generator) -> tuple[list[Bone], list[Blob]]:
    gap = float(rng.uniform(0.055, 0.08))
    bow = float(rng.uniform(0.01, 0.035))
    if rng.random() < 0.4:  # wrist
        end = float(rng.uniform(0.05, 0.4))
        radius = Bone("radius", -_FAR, end, -gap, 0.034, CUT, End("slant", 0.75, 0.85, 3.4), bow=-bow, cortex=0.42)
        ulna = Bone(
            "ulna", -_FAR, end - 0.03, gap * 0.95, 0.028, CUT, End("head", 0.15, 0.35, 2.2), bow=bow / 2, cortex=0.45
        )
        first = [Blob(end + 0.055 + 2 * v * v, v, 0.036, 0.034, 1.3) for v in (-0.08, -0.02, 0.045)]
        second = [Blob(end + 0.115 + 2 * v * v, v, 0.038, 0.032, 1.3) for v in (-0.095, -0.035, 0.02, 0.075)]
        palm = [Blob(end + 0.265, 1.1 * v, 0.11, 0.02, 2) for v in (-0.13, -0.065, 0.0, 0.06, 0.115)]
        return [radius, ulna], first + second + palm
    joint = float(rng.uniform(-0.35, -0.05))
    tilt = float(rng.uniform(-0.15, 0.15))
    humerus = Bone("humerus", -_FAR, joint - 0.02, 0.01, 0.045, CUT, End("condyles", 1.0, 1.1, 2.6), tilt=tilt)
    radius = Bone(
        "radius", joint + 0.03, _FAR, -gap * 0.8, 0.029, End("plateau", 0.35, 0.35, 1.2), CUT, bow=-bow, cortex=0.42
    )
    ulna = Bone("ulna", joint - 0.01, _FAR, gap * 0.75, 0.033, End("head", 0.5, 0.4, 3.0), CUT, bow=bow, cortex=0.42)
    return [humerus, radius, ulna], []


def _humerus(rng: np.random.Generator) -> tuple[list[Bone], list[Blob]]:
    top = float(rng.uniform(-0.35, -0.1))
    tilt = float(rng.uniform(-0.2, 0.1))
    shoulder = [Blob(top + 0.06, 0.2, 0.1, 0.05, 0.8), Blob(top - 0.09, 0.13, 0.022, 0.15, 1.5)]
    humerus = Bone("humerus", top, _FAR, -0.02, 0.055, End("head", 0.35, 0.85, 3.6), CUT, tilt=tilt, cortex=0.4)
    return [humerus], shoulder


def _femur(rng: np.random.Generator) -> tuple[list[Bone], list[Blob]]:
    bow, tilt = float(rng.uniform(-0.05, 0.05)), float(rng.uniform(-0.1, 0.1))
    return [Bone("femur", -_FAR, _FAR, 0.0, 0.08, CUT, CUT, tilt=tilt, bow=bow, cortex=0.45)], []


_Draw = Callable[[np.random.Generator], tuple[list[Bone], list[Blob]]]
_KINDS: tuple[tuple[_Draw, float], ...] = (
    (_lower_leg, 0.2),
    (_forearm, 0.18),
    (_knee, 0.25),
    (_humerus, 0.2),
    (_femur, 0.38),
)


def _varied(bone: Bone, rng: np.random.Generator, zoom: float) -> Bone:
    """`bone` with a person's own proportions, enlarged by `zoom`."""
    wide, thick, dense, shift = rng.uniform((0.9, 0.75, 0.7, -0.006), (1.12, 1.2, 1.4, 0.006)).tolist()
    return replace(
        bone,
        start=bone.start * zoom,
        stop=bone.stop * zoom,
        offset=(bone.offset + shift) * zoom,
        bow=bone.bow * zoom,
        radius=bone.radius * wide * zoom,
        cortex=bone.cortex * thick,
        spongy=bone.spongy * dense,
    )


def _varied_blob(blob: Blob, rng: np.random.Generator, zoom: float) -> Blob:
    u, v = rng.normal(0, 0.004, 2).tolist()
    wide, high, dense = rng.uniform(0.88, 1.15, 3).tolist()
    return Blob(
        (blob.u + u) * zoom,
        (blob.v + v) * zoom,
        blob.half_u * high * zoom,
        blob.half_v * wide * zoom,
        blob.density * dense,
    )
