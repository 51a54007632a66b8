"""Path lengths of rays through closed surfaces, and the pinhole camera that casts the rays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Points = NDArray[np.float64]
Faces = NDArray[np.int64]
Picture = NDArray[np.float32]

_FLAT = 1e-9  # twice the area in pixels below which a triangle is seen from its edge


@dataclass(frozen=True)
class Camera:
    """A point source above a flat detector. Lengths are in mm, the detector is the plane of depth 0."""

    distance: float
    """From source to detector."""
    centre: tuple[float, float]
    """Point (u, v) of the detector at the middle of the picture."""
    source: tuple[float, float]
    """Point (u, v) of the detector below the source."""
    pitch: float
    """Side of a pixel."""
    shape: tuple[int, int]
    """Height and width of the picture in pixels."""

    def project(self, points: Points) -> Points:
        """Turn points (N, 3) of u (right), v (down) and height above the detector into columns, rows and distances.

        Pixel centres have whole numbers as columns and rows; distances from the source are in mm.
        """
        offset = points - (*self.source, self.distance)
        stretch = self.distance / -offset[:, 2]
        column = (self.source[0] - self.centre[0] + offset[:, 0] * stretch) / self.pitch + (self.shape[1] - 1) / 2
        row = (self.source[1] - self.centre[1] + offset[:, 1] * stretch) / self.pitch + (self.shape[0] - 1) / 2
        return np.stack([column, row, np.linalg.norm(offset, axis=1)], axis=1)


def resized(picture: Picture, shape: tuple[int, int]) -> Picture:
    """A smooth picture enlarged to `shape`."""
    return np.asarray(Image.fromarray(picture).resize(shape[::-1], Image.Resampling.BICUBIC))


def path_lengths(points: Points, faces: Faces, shape: tuple[int, int]) -> tuple[tuple[slice, slice], Picture]:
    """Length of each pixel's ray inside a closed surface.

    The length is the sum of the distances at which the ray leaves the surface, less those at which it enters. A
    triangle's distance is a linear function of column and row, so every edge only says where along a row of pixels a
    linear function begins or ends: all triangles are summed by two running sums along the rows. Between its vertices a
    triangle's distance is taken as linear in perspective too, an error of micrometres for triangles of some mm.

    Args:
        points: (N, 3) columns, rows and distances of the vertices, as `Camera.project` returns them.
        faces: (M, 3) vertices of the triangles, anticlockwise as seen from outside.
        shape: height and width of the picture.

    Returns:
        The part of the picture that the surface may cover, and the lengths there in the unit of the distances.
    """
    low, high = np.ceil(points[:, :2].min(axis=0)), np.floor(points[:, :2].max(axis=0)) + 1
    left, top = np.clip(low, 0, (shape[1], shape[0])).astype(int)
    right, bottom = np.clip(high, (left, top), (max(shape[1], left), max(shape[0], top))).astype(int)
    window = (slice(top, bottom), slice(left, right))
    height, width = bottom - top, right - left
    if not height or not width:
        return window, np.zeros((height, width), np.float32)
    moved = points - (left, top, 0.0)
    corners = moved[faces]

    # The linear function of each triangle in view.
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = first[:, 0] * second[:, 1] - second[:, 0] * first[:, 1]
    seen = np.abs(area) > _FLAT
    for axis, end in ((0, width), (1, height)):
        before, behind = (moved[:, axis] < 0)[faces], (moved[:, axis] > end)[faces]
        for off in (before, behind):
            seen &= ~(off[:, 0] & off[:, 1] & off[:, 2])
    faces, first, second, area = faces[seen], first[seen], second[seen], area[seen]
    across = (first[:, 2] * second[:, 1] - second[:, 2] * first[:, 1]) / area
    along = (first[:, 0] * second[:, 2] - second[:, 0] * first[:, 2]) / area
    origin = moved[faces[:, 0]]
    constant = origin[:, 2] - across * origin[:, 0] - along * origin[:, 1]

    # Edges, each from its upper to its lower end, so that two triangles find the very same crossings of their edge.
    start, stop = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    falling = moved[start, 1] < moved[stop, 1]
    upper, lower = moved[np.where(falling, start, stop)], moved[np.where(falling, stop, start)]
    begin = np.clip(np.ceil(upper[:, 1]), 0, height).astype(np.int64)
    counts = np.clip(np.ceil(lower[:, 1]), 0, height).astype(np.int64) - begin
    crossed = np.flatnonzero(counts)
    counts, upper, lower = counts[crossed], upper[crossed], lower[crossed]
    slope = (lower[:, 0] - upper[:, 0]) / (lower[:, 1] - upper[:, 1])
    which = np.repeat(np.arange(len(crossed)), counts)
    row = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts - begin[crossed], counts)
    column = np.ceil(upper[which, 0] + (row - upper[which, 1]) * slope[which])
    place = row * (width + 1) + np.clip(column, 0, width).astype(np.int64)

    triangle = crossed[which] // 3
    sign = np.where(falling[crossed], 1.0, -1.0)[which]
    at_zero = sign * (constant[triangle] + along[triangle] * row)
    sums = [
        np.bincount(place, weights, height * (width + 1)).reshape(height, width + 1)[:, :-1].cumsum(axis=1)
        for weights in (at_zero, sign * across[triangle])
    ]
    lengths = sums[0] + sums[1] * np.arange(width)
    return window, np.maximum(lengths, 0).astype(np.float32)
