"""Soft tissue around bones, and bones that have no surface of their own: foot and lumbar spine."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pdrunet_jax.data.phantoms.surfaces.raster import Points
from pdrunet_jax.data.phantoms.surfaces.shapes import Mesh, ball, ellipses, ring_frames, rod, tube

_CORNERS = 40
_PLACES = (-0.8, 0.0, 0.3, 0.6, 0.85, 1.0, 1.15, 1.35, 1.6, 1.85, 2.0, 2.15)
"""Along a leg: 0 is the hip, 1 the knee, 2 the ankle."""
_GIRTH = (102.0, 90.0, 80.0, 67.0, 57.0, 53.0, 50.0, 54.0, 45.0, 34.0, 32.0, 31.0)
"""Distance in mm from the middle of an average leg to the fascia at `_PLACES`."""
_FAT = (1.3, 1.2, 1.0, 0.8, 0.55, 0.45, 0.5, 0.55, 0.45, 0.25, 0.2, 0.2)
"""Thickness of the fat at `_PLACES`, relative to that of the thigh."""


@dataclass(frozen=True)
class Build:
    """A patient's build, from thin to obese."""

    muscle: float
    """Girth of the muscles relative to the average."""
    fat: float
    """Thickness of the fat around the thigh in mm."""


def draw_build(rng: np.random.Generator) -> Build:
    """Draw a patient's build."""
    return Build(float(rng.uniform(0.8, 1.2)), float(3 + rng.gamma(2.0, 6.0)))


def leg_tissue(
    joints: Points, bones: Points, build: Build, rng: np.random.Generator, *, below_trunk: bool = False
) -> tuple[Mesh, Mesh]:
    """Skin and fascia of a right leg.

    Args:
        joints: (3, 3) hip, knee and ankle.
        bones: (N, 3) points on the bones of the leg, which the fascia encloses.
        build: the patient's build.
        rng: for what differs between persons of a build.
        below_trunk: whether the leg ends at the hip, instead of going on beyond every picture.
    """
    places = np.linspace(-0.3 if below_trunk else _PLACES[0], _PLACES[-1], 72)
    upper, lower = joints[1] - joints[0], joints[2] - joints[1]
    path = joints[0] + np.minimum(places, 1)[:, None] * upper + np.maximum(places - 1, 0)[:, None] * lower
    path = ndimage.gaussian_filter1d(path, 2.0, axis=0, mode="nearest")
    angle = np.arange(_CORNERS, dtype=np.float64) * (
        2 * np.pi / _CORNERS
    )  # 0 is in front, a quarter turn on the outer side
    size = np.linalg.norm(upper) / 420
    girth = np.interp(places, _PLACES, _GIRTH) * size * build.muscle ** np.interp(places, (0.8, 1, 1.2), (1, 0.5, 0.9))
    thigh, calf = np.exp(-(((places - 0.4) / 0.4) ** 2)), np.exp(-(((places - 1.35) / 0.27) ** 2))
    front, outer = np.cos(angle), np.sin(angle)
    form = 1 - thigh[:, None] * (0.1 * front + 0.1 * outer) - calf[:, None] * (0.34 * front + 0.04 * outer)
    form += _waves(rng, 0.025, len(places))
    fascia = girth[:, None] * form
    fascia = np.maximum(fascia, _reach(path, bones, angle) + 2.5)
    fascia = ndimage.gaussian_filter(fascia, (1.2, 1.0), mode=("nearest", "wrap"))
    if below_trunk:  # round off where the trunk takes over
        fascia *= np.sqrt(np.clip((places + 0.3) / 0.36, 0.02, 1))[:, None]
    fat = 2 + build.fat * np.interp(places, _PLACES, _FAT)[:, None] * (
        1 - 0.25 * front + _waves(rng, 0.15, len(places))
    )
    return tube(path, fascia + np.maximum(fat, 1.5)), tube(path, fascia)


def trunk_tissue(pelvis: Points, hips: Points, middle: float, build: Build) -> tuple[Mesh, Mesh]:
    """Skin and fascia of the trunk around points (N, 3) of the pelvis and of the femur's head; `middle` is its x."""
    hip = float(hips[:, 2].mean())
    low, high = hip - 130, pelvis[:, 2].max() + 260
    height = np.linspace(low, high, 24)
    path = np.column_stack([np.full(24, middle), np.full(24, pelvis[:, 1].mean() + 5), height])
    closing = np.clip((height - low) / 180, 0.02, 1) ** 0.7
    wide = np.abs(np.concatenate([pelvis, hips])[:, 0] - middle).max() + 14
    waist = np.interp(height, (hip, hip + 180, high), (1, 0.97, 0.9))
    deep = np.ptp(pelvis[:, 1]) / 2 + 28
    muscle = 0.5 + 0.5 * build.muscle
    fascia = ellipses(deep * closing * muscle, wide * closing * waist * muscle, _CORNERS)
    angle = np.arange(_CORNERS) * (2 * np.pi / _CORNERS)
    fat = (4 + build.fat * 1.3) * (1 + 0.35 * np.cos(angle)) * closing[:, None]
    return tube(path, fascia + fat), tube(path, fascia)


def foot_tissue(ankle: Points, build: Build) -> tuple[Mesh, Mesh]:
    """Skin and fascia of a right foot that points forward, below `ankle` (3,)."""
    place = np.linspace(0, 1, 16)
    high = np.interp(place, (0, 0.05, 0.14, 0.3, 0.5, 0.75, 0.95, 1), (6, 20, 32, 36, 27, 17, 11, 4))
    wide = np.interp(place, (0, 0.05, 0.14, 0.3, 0.5, 0.75, 0.95, 1), (6, 20, 29, 32, 37, 44, 36, 8))
    path = ankle + np.column_stack([4 - 10 * place, -62 + 250 * place, -84 + high])
    grown = 3 + 0.1 * build.fat
    corners = ellipses(high, wide, 24)
    return tube(path, corners + grown, (0, 0, 1)), tube(path, corners, (0, 0, 1))


def foot_bones(rng: np.random.Generator) -> list[Mesh]:
    """Bones of a right foot that points forward; the middle of the dome of the talus is at 0."""
    around = [
        ((0, 6, -15), (17, 24, 15), 2.6),
        ((-4, 32, -17), (12, 10, 11), 2.3),  # head of the talus
        ((4, -26, -48), (15, 26, 20), 2.6),
        ((3, 4, -44), (14, 26, 13), 2.8),  # front of the calcaneus
        ((-9, 46, -21), (17, 8, 12), 2.5),
        ((14, 48, -38), (12, 18, 11), 3.0),
        ((-17, 62, -27), (8, 12, 12), 3.0),
        ((-4, 61, -25), (7, 10, 11), 3.0),
        ((7, 61, -28), (7, 11, 11), 3.0),
    ]
    bones = [
        ball(np.array(centre) + rng.normal(0, 1, 3), tuple(np.array(radii) * rng.uniform(0.93, 1.07, 3)), power)
        for centre, radii, power in around
    ]
    bones = [_uneven(bone, rng) for bone in bones]
    for ray in range(5):
        base = np.array((-19 + 8.5 * ray, 74 - 4 * max(ray - 1, 0), -29 - 3 * ray))
        head = np.array((-27 + 15 * ray, 136 - 7 * abs(ray - 1), -60.0))
        thick = 7.5 if ray == 0 else 4.5
        shaft = np.linspace(base, head, 9)
        waist = thick * np.array((1.5, 1.3, 1.0, 0.85, 0.8, 0.85, 1.0, 1.3, 1.1))
        bones.append(tube(shaft, ellipses(waist, waist * 0.95, 14), (0, 0, 1)))
        toe = head + np.array((-1.5 + ray, 24 if ray == 0 else 20, -4))
        bones.append(rod(head + (toe - head) * 0.2, toe, thick * 0.85, thick * 0.75))
        bones.append(rod(toe + (toe - head) * 0.08, toe + (toe - head) * 0.6, thick * 0.75, thick * 0.6, pointed=0.3))
    return bones


def spine(top: Points, rng: np.random.Generator) -> list[Mesh]:
    """Five lumbar vertebrae above the point `top` (3,), the middle of the upper end of the sacrum."""
    bones = []
    for level in range(5):
        centre = top + np.array((0, 8 + 2 * level, 18 + 35 * level)) + rng.normal(0, 0.8, 3)
        bones.append(ball(centre, (25 - level * 0.7, 17, 14.5), 4.5))
        bones.append(ball(centre + np.array((0, -42, -4)), (4, 14, 11), 2.5))
        for side in (-1, 1):
            bones.append(
                rod(centre + np.array((side * 16, -22, 2)), centre + np.array((side * 42, -28, 5)), 5, 4, pointed=0.4)
            )
            bones.append(ball(centre + np.array((side * 15, -26, -10)), (6, 7, 14), 2.5))
    return bones


def _uneven(mesh: Mesh, rng: np.random.Generator) -> Mesh:
    """A surface with shallow random bumps and hollows, which make a bone of a ball."""
    offset = mesh.vertices - mesh.vertices.mean(axis=0)
    way = offset / np.maximum(np.linalg.norm(offset, axis=1, keepdims=True), 1e-9)
    bumps = np.sin(way @ rng.normal(0, 2.6, (3, 4)) + rng.uniform(0, 2 * np.pi, 4)).sum(axis=1)
    return Mesh(mesh.vertices + offset * (0.055 * bumps)[:, None], mesh.faces)


def _waves(rng: np.random.Generator, strength: float, rings: int) -> NDArray[np.float64]:
    """(rings, corners) Smooth random differences of about `strength`, closed around the leg."""
    waves = ndimage.gaussian_filter(rng.standard_normal((rings, _CORNERS)), (6, 3), mode=("nearest", "wrap"))
    return np.asarray(waves * strength / waves.std())


def _reach(path: Points, points: Points, angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rings, corners) How far the points (N, 3) reach from the path at each ring and angle."""
    front, outer, _ = ring_frames(path)
    squared = (points**2).sum(1)[:, None] - 2 * points @ path.T + (path**2).sum(1)
    ring = squared.argmin(axis=1)
    offset = points - path[ring]
    a, b = (offset * front[ring]).sum(1), (offset * outer[ring]).sum(1)
    corner = np.round(np.arctan2(b, a) / (2 * np.pi) * len(angle)).astype(int) % len(angle)
    reach = np.zeros((len(path), len(angle)))
    np.maximum.at(reach, (ring, corner), np.hypot(a, b))
    return np.asarray(ndimage.maximum_filter(reach, (3, 3), mode=("nearest", "wrap")))
