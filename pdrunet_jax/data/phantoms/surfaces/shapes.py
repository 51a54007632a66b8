"""Closed surfaces made from rings: tubes, balls and boxes, for soft tissue, foot bones, casts and implants."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.phantoms.surfaces.raster import Faces, Points


@dataclass(frozen=True)
class Mesh:
    """A closed surface: vertices (N, 3) in mm, faces (M, 3) anticlockwise as seen from outside."""

    vertices: Points
    faces: Faces

    @property
    def volume(self) -> float:
        """Volume in mm^3; negative if the faces are turned inside out."""
        a, b, c = (self.vertices[self.faces[:, corner]] for corner in range(3))
        return float((a * np.cross(b, c)).sum() / 6)

    def outward(self) -> "Mesh":
        """This surface with its faces turned outward."""
        return self if self.volume >= 0 else Mesh(self.vertices, self.faces[:, ::-1].copy())


def ring_frames(path: Points, guide: tuple[float, float, float] = (0, 1, 0)) -> tuple[Points, Points, Points]:
    """Unit vectors (N, 3) along a path (N, 3): two square to it, the first as near to `guide` as can be; its own."""
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    first = np.array(guide) - tangent * (tangent @ np.array(guide))[:, None]
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return first, np.cross(tangent, first), tangent


def tube(path: Points, radii: NDArray[np.float64], guide: tuple[float, float, float] = (0, 1, 0)) -> Mesh:
    """A tube around a path (N, 3) with closed ends.

    `radii` (N, K) are distances from the path at K equal angles; angle 0 is the first vector of `ring_frames`, a
    quarter turn the second.
    """
    first, second, _ = ring_frames(path, guide)
    angle = np.arange(radii.shape[1]) * (2 * np.pi / radii.shape[1])
    around = np.cos(angle)[:, None] * first[:, None] + np.sin(angle)[:, None] * second[:, None]
    rings = path[:, None] + radii[..., None] * around
    vertices = np.concatenate([rings.reshape(-1, 3), path[:1], path[-1:]])
    return Mesh(vertices, _tube_faces(*radii.shape))


def ellipses(first: NDArray[np.float64], second: NDArray[np.float64], corners: int = 24) -> NDArray[np.float64]:
    """Radii (N, `corners`) for `tube` of ellipses with half-axes `first` and `second`, each (N,)."""
    angle = np.arange(corners) * (2 * np.pi / corners)
    a, b = np.asarray(first)[:, None], np.asarray(second)[:, None]
    return np.asarray(a * b / np.hypot(b * np.cos(angle), a * np.sin(angle)))


def rod(start: Points, stop: Points, first: float, second: float, *, pointed: float = 0.0) -> Mesh:
    """A straight bar of elliptical section with half-axes in mm, narrowing to `pointed` of them at its end."""
    path = np.linspace(start, stop, 5)
    taper = np.array((1, 1, 1, 1, 1 - pointed))
    way = np.abs(path[-1] - path[0])
    guide = (0, 1, 0) if way[1] < 0.8 * np.linalg.norm(way) else (0, 0, 1)
    return tube(path, ellipses(first * taper, second * taper, 16), guide)


def ball(centre: Points, radii: tuple[float, float, float], power: float = 2.0, rings: int = 13) -> Mesh:
    """An ellipsoid with half-axes along x, y and z; a higher `power` makes it more of a box."""
    height = np.sin(np.linspace(-np.pi / 2, np.pi / 2, rings))
    width = np.maximum(1 - np.abs(height) ** power, 1e-6) ** (1 / power)
    angle = np.arange(20) * (2 * np.pi / 20)
    round_ = (np.abs(np.cos(angle)) ** power + np.abs(np.sin(angle)) ** power) ** (-1 / power)
    path = np.zeros((rings, 3))
    path[:, 2] = height
    unit = tube(path, width[:, None] * round_)
    return Mesh(unit.vertices * radii + centre, unit.faces)


def _tube_faces(rings: int, corners: int) -> Faces:
    here = np.arange(corners)
    onward = np.roll(here, -1)
    base = np.arange(rings - 1)[:, None] * corners
    a, b, c, d = base + here, base + onward, base + corners + onward, base + corners + here
    sides = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])
    begin, end, last = rings * corners, rings * corners + 1, (rings - 1) * corners
    caps = [np.stack([np.full(corners, begin), onward, here], -1)]
    caps.append(np.stack([np.full(corners, end), last + here, last + onward], -1))
    return np.concatenate([sides, *caps]).astype(np.int64)
