"""Implants: joint replacements, nails, plates and screws, in the frame of a right leg before it is posed."""

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.phantoms.surfaces.raster import Points
from pdrunet_jax.data.phantoms.surfaces.shapes import Mesh, ball, ellipses, rod, tube

Implant = tuple[str, str, Mesh]
"""Material, the bone that it moves with, and its surface."""

IMPLANTS = ("knee", "hip", "nail", "plate", "screws")


def draw_implant(
    kind: str, femur: Points, tibia: Points, hip: Points, rng: np.random.Generator, place: float
) -> list[Implant]:
    """Draw an implant.

    Args:
        kind: one of `IMPLANTS`.
        femur: (N, 3) vertices of the bone.
        tibia: (N, 3) vertices of the bone.
        hip: (3,) centre of the head of the femur.
        rng: for its make and place.
        place: height z in mm that is in the picture.
    """
    metal = str(rng.choice(["titanium", "steel"]))
    if kind == "knee":
        return _knee(femur, tibia, rng)
    if kind == "hip":
        return _hip(femur, hip, rng)
    name, bone = ("femur", femur) if place > 0 else ("tibia", tibia)
    meshes = {"nail": _nail, "plate": _plate, "screws": _screws}[kind](bone, rng, place)
    return [(metal, name, mesh) for mesh in meshes]


def _knee(femur: Points, tibia: Points, rng: np.random.Generator) -> list[Implant]:
    """A replaced knee: caps of both condyles, a tray with a stem."""
    bottom = femur[:, 2].min()
    condyles = femur[femur[:, 2] < bottom + 25]
    left, right = condyles[:, 0].min(), condyles[:, 0].max()
    front, back = condyles[:, 1].max(), condyles[:, 1].min()
    angle = np.linspace(-0.75, 1.15, 15) * np.pi / 2 - np.pi / 2  # from the front around the bottom to the back
    middle, half = np.array(((front + back) / 2, bottom + 24)), np.array(((front - back) / 2 + 1, 25))
    parts: list[Implant] = []
    for share in (0.22, 0.78):
        path = np.column_stack(
            [
                np.full(15, left + share * (right - left)),
                middle[0] - half[0] * np.cos(angle),
                middle[1] + half[1] * np.sin(angle),
            ]
        )
        narrowed = np.sqrt(np.clip(np.minimum(np.arange(15), np.arange(14, -1, -1)) / 4 + 0.2, 0, 1))
        band = tube(path, ellipses(0.2 * (right - left) * narrowed, 4.0 * narrowed, 20), (1, 0, 0))
        parts.append(("steel", "femur", band))
    top = tibia[:, 2].max()
    head = tibia[tibia[:, 2] > top - 25]
    centre = np.array(((head[:, 0].min() + head[:, 0].max()) / 2, (head[:, 1].min() + head[:, 1].max()) / 2, top - 8))
    radii = np.ptp(head[:, :2], axis=0) / 2
    parts.append(("titanium", "tibia", ball(centre, (radii[0] * 0.95, radii[1] * 0.85, 2.5), 4.0)))
    length = rng.uniform(30, 90)
    parts.append(("titanium", "tibia", rod(centre, centre - np.array((0, 0, length)), 7.0, 7.0, pointed=0.3)))
    return parts


def _hip(femur: Points, hip: Points, rng: np.random.Generator) -> list[Implant]:
    """A replaced hip: head, neck, stem, and a cup in the pelvis."""
    line = _middle_line(femur)
    length = rng.uniform(110, 160)
    shaft = line[(line[:, 2] < hip[2] - 45) & (line[:, 2] > hip[2] - 45 - length)]
    stem = tube(shaft, ellipses(np.linspace(4, 12, len(shaft)), np.linspace(4, 10, len(shaft)), 18))
    radius = float(rng.choice([14, 16, 18]))
    outer, inner = ball(np.zeros(3), (27, 27, 27), rings=17), ball(np.zeros(3), (23, 23, 23), rings=17)
    shell = Mesh(
        np.concatenate([outer.vertices, inner.vertices]),
        np.concatenate([outer.faces, inner.faces[:, ::-1] + len(outer.vertices)]),
    )
    cut = np.maximum(shell.vertices, (-99, -99, 0))  # the half above; the flat half has no volume
    tilt = np.radians(rng.uniform(35, 50))
    turn = np.array([[np.cos(tilt), 0, -np.sin(tilt)], [0, 1, 0], [np.sin(tilt), 0, np.cos(tilt)]])
    return [
        ("steel", "femur", ball(hip, (radius, radius, radius))),
        ("titanium", "femur", rod(hip, shaft[-1] + np.array((0, 0, 5)), 7.0, 7.0)),
        ("titanium", "femur", stem),
        ("titanium", "pelvis", Mesh(cut @ turn.T + hip, shell.faces)),
    ]


def _nail(bone: Points, rng: np.random.Generator, place: float) -> list[Mesh]:
    """A nail in the shaft, with screws across its ends."""
    line = _middle_line(bone)
    low, high = np.quantile(line[:, 2], (rng.uniform(0.1, 0.2), rng.uniform(0.88, 0.96)))
    path = line[(line[:, 2] > low) & (line[:, 2] < high)]
    radius = rng.uniform(4.5, 6)
    meshes = [tube(path, ellipses(np.full(len(path), radius), np.full(len(path), radius), 18))]
    for at in (2, 4, len(path) - 4):
        reach = np.array((rng.uniform(16, 24), 0, 0))
        meshes.append(rod(path[at] - reach, path[at] + reach, 2.3, 2.3, pointed=0.6))
    return meshes


def _plate(bone: Points, rng: np.random.Generator, place: float) -> list[Mesh]:
    """A plate on the outer side, with screws into the far cortex."""
    line = _middle_line(bone)
    half = rng.uniform(50, 110)
    centre = np.clip(place + rng.uniform(-60, 60), line[:, 2].min() + half, line[:, 2].max() - half)
    path = line[np.abs(line[:, 2] - centre) < half]
    steps = np.linspace(0, len(path) - 1, 24)
    path = np.column_stack([np.interp(steps, np.arange(len(path)), column) for column in path.T])
    heights, low, high = _sections(bone)
    inner, outer = (np.interp(path[:, 2], heights, side[:, 0]) for side in (low, high))
    surface = path.copy()
    surface[:, 0] = outer + 2
    meshes = [tube(surface, ellipses(np.full(24, 1.8), np.full(24, rng.uniform(5, 7)), 16), (1, 0, 0))]
    for at in range(2, 23, int(rng.integers(3, 6))):
        end = np.array((inner[at] + rng.uniform(-1, 4), surface[at, 1], surface[at, 2]))
        meshes.append(rod(surface[at], end, 2.0, 2.0, pointed=0.7))
        meshes.append(ball(surface[at], (2.6, 4, 4)))
    return meshes


def _screws(bone: Points, rng: np.random.Generator, place: float) -> list[Mesh]:
    """Two to four screws through an end of the bone."""
    line = _middle_line(bone)
    at = line[0] if abs(line[0, 2] - place) < abs(line[-1, 2] - place) else line[-1]
    meshes = []
    for _ in range(int(rng.integers(2, 5))):
        middle = at + rng.normal(0, 9, 3)
        way: NDArray[np.float64] = np.array((1, rng.normal(0, 0.2), rng.normal(0, 0.35))) * rng.uniform(17, 28)
        meshes.append(rod(middle - way, middle + way, 2.6, 2.6, pointed=0.6))
        meshes.append(ball(middle - way, (3.5, 4, 4)))
    return meshes


def _middle_line(bone: Points) -> Points:
    """(N, 3) Middles of a standing long bone at heights 8 mm apart, from below."""
    heights, low, high = _sections(bone)
    return np.column_stack([(low + high) / 2, heights])


def _sections(bone: Points) -> tuple[NDArray[np.float64], Points, Points]:
    """Heights (N,) 8 mm apart of a standing long bone, and its smoothed least and largest x and y (N, 2) there."""
    heights = np.arange(bone[:, 2].min() + 12, bone[:, 2].max() - 12, 8.0)
    slabs = [bone[np.abs(bone[:, 2] - height) < 12, :2] for height in heights]
    full = np.array([len(slab) > 2 for slab in slabs])  # a coarse surface may have no vertex at some heights

    def smooth(values: Points) -> Points:
        columns = (np.interp(heights, heights[full], column) for column in values.T)
        return np.column_stack([np.convolve(np.pad(c, 2, mode="edge"), np.ones(5) / 5, "valid") for c in columns])

    used = [slab for slab, enough in zip(slabs, full, strict=True) if enough]
    low, high = np.array([slab.min(axis=0) for slab in used]), np.array([slab.max(axis=0) for slab in used])
    return heights, smooth(low), smooth(high)
