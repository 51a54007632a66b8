"""Polygons around the regions of a mask, which Pillow, and so LabelMe, fills to nearly the same pixels."""

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.int64]
"""(n, 2) columns and rows: a closed path through the outermost pixels of a region."""

_VERTEX = 0.5
"""Cost of a vertex. 0.5 keeps bones of 15 pixels at a Dice of 0.995 with a tolerance of 1; a cost of 1 would save a
third of the vertices, but needs bones twice as wide for that."""

_LONGEST = 1024  # outline pixels that one edge may replace; bounds the work on straight borders


def outlines(region: NDArray[np.bool_], tolerance: float) -> list[Ring]:
    """One polygon for each part of `region` (H, W), at most `tolerance` pixels from its outline.

    Parts are 8-connected. A cut there and back joins each hole to the outline, so a part with holes is one polygon,
    too. Filled by `ImageDraw.polygon`, polygons of tolerance 0 reproduce the region, except for a few pixels where a
    cut meets another hole; larger tolerances cut off about as much as they add.
    """
    import scipy.ndimage  # takes about a second; most predictions need no contours

    parts, _ = scipy.ndimage.label(region, structure=np.ones((3, 3), np.int8))
    outer: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = defaultdict(list)
    for ring, is_hole in _rings(region):
        part = int(parts[ring[0, 1], ring[0, 0]])
        simple = _simplify(ring, tolerance)
        if not is_hole:
            outer[part] = simple if len(simple) > 2 else ring
        elif len(simple) > 2:  # else the hole is thinner than the tolerance and closes
            holes[part].append(simple)
    return [_with_cuts(ring, holes[part]) for part, ring in sorted(outer.items())]


def _rings(region: NDArray[np.bool_]) -> list[tuple[Ring, bool]]:
    """Trace every border of `region`: the region's pixels along it, and whether it surrounds a hole.

    The path follows the cracks between pixels, with the region on its right.
    """
    padded = np.pad(region, 1)
    rows, columns = np.nonzero(padded)
    # A crack is given by its start (the pixel whose upper left corner that is) and direction: 0 east, 1 south, 2 west,
    # 3 north. East runs along the upper side of its pixel, and so on.
    sides = (
        (0, ~padded[rows - 1, columns], 0, 0),
        (1, ~padded[rows, columns + 1], 0, 1),
        (2, ~padded[rows + 1, columns], 1, 1),
        (3, ~padded[rows, columns - 1], 1, 0),
    )
    pixel_of = {
        (row + down, column + right, direction): (column - 1, row - 1)
        for direction, bare, down, right in sides
        for row, column in zip(rows[bare].tolist(), columns[bare].tolist(), strict=True)
    }
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    found = []
    while pixel_of:
        start = crack = next(iter(pixel_of))
        path: list[tuple[int, int]] = []
        area = 0
        while True:
            pixel = pixel_of.pop(crack)
            if not path or path[-1] != pixel:
                path.append(pixel)
            row, column, direction = crack
            area += (0, column, 0, -column)[direction]
            row, column = row + steps[direction][0], column + steps[direction][1]
            # Left turn first: pixels that touch at a corner stay connected.
            ways = ((row, column, (direction + turn) % 4) for turn in (3, 0, 1))
            crack = next(way for way in ways if way in pixel_of or way == start)
            if crack == start:
                break
        if len(path) > 1 and path[-1] == path[0]:
            path.pop()
        found.append((np.array(path, np.int64), area < 0))
    return found


def _simplify(ring: Ring, tolerance: float) -> Ring:
    """Find the cheapest polygon within `tolerance` of `ring`, by dynamic programming.

    A vertex costs `_VERTEX` times `tolerance` squared; an outline pixel, its squared distance from its ideal position.
    Douglas-Peucker, which drops vertices as far as the tolerance allows, would cut off more than it adds: most corners
    of a pixel outline point outwards.
    """
    count = len(ring)
    if count < 4:
        return ring
    centred = ring - ring.mean(axis=0)
    ring = np.roll(ring, -int((centred**2).sum(axis=1).argmax()), axis=0)  # start at a corner: it stays a vertex
    closed = np.concatenate([ring, ring[:1]]).astype(np.float64)
    cost = np.full(count + 1, np.inf)
    cost[0] = 0.0
    previous = np.zeros(count + 1, np.int64)
    for at in range(count):
        reached = cost[at] + _VERTEX * tolerance**2 + _edge_costs(closed, at, tolerance)
        ahead = slice(at + 1, at + 1 + len(reached))
        better = reached < cost[ahead]
        cost[ahead] = np.where(better, reached, cost[ahead])
        previous[ahead] = np.where(better, at, previous[ahead])
    vertices = []
    at = int(previous[count])
    while at:
        vertices.append(at)
        at = int(previous[at])
    return ring[[0, *reversed(vertices)]]


def _edge_costs(path: NDArray[np.float64], at: int, tolerance: float) -> NDArray[np.float64]:
    """Squared errors of edges from point `at` of `path` to each of the next; infinite beyond `tolerance`."""
    length = 32
    while True:
        x, y = (path[at + 1 : at + 1 + length] - path[at]).T
        distance = np.maximum(np.hypot(x, y), 1e-9)
        angle = np.unwrap(np.arctan2(y, x))
        # An edge must pass within `tolerance` of every point: each point allows a wedge of directions.
        half = np.where(distance > tolerance, np.arcsin(np.minimum(1.0, tolerance / distance)), np.inf)
        lowest, highest = np.maximum.accumulate(angle - half), np.minimum.accumulate(angle + half)
        if highest[-1] < lowest[-1] or length >= _LONGEST or at + 1 + length >= len(path):
            break
        length *= 2
    allowed = distance > 0.5  # not the point itself, if the path returns to it
    allowed[1:] &= (angle[1:] >= lowest[:-1] - 1e-9) & (angle[1:] <= highest[:-1] + 1e-9)
    allowed[1:] &= np.maximum.accumulate(distance)[:-1] <= distance[1:] + tolerance  # nor may a point be past its end
    dx, dy = x / distance, y / distance
    # Pillow fills pixels whose centre is inside a line, or outside by up to half a pixel to the left or right. On
    # average, the outermost pixels are this far inside the line.
    inset = 0.5 * (np.maximum(np.abs(dx), np.abs(dy)) - np.abs(dy))
    outward = np.cumsum(x) * dy - np.cumsum(y) * dx
    squares = np.cumsum(x * x) * dy**2 - 2 * np.cumsum(x * y) * dx * dy + np.cumsum(y * y) * dx**2
    costs: NDArray[np.float64] = squares + 2 * inset * outward + inset**2 * np.arange(1, len(x) + 1)
    return np.where(allowed, costs, np.inf)


def _with_cuts(ring: Ring, holes: list[Ring]) -> Ring:
    """Join `holes` to `ring` in one path, each at the shortest distance from the path so far."""
    from scipy.spatial import cKDTree

    def nearest(hole: Ring, joined: "cKDTree") -> tuple[float, int, tuple[int, int]]:
        """Shortest cut: its length, the vertex of `hole`, and the point of `joined`."""
        distances, points = joined.query(hole)
        vertex = int(np.argmin(distances))
        return float(distances[vertex]), vertex, tuple(joined.data[points[vertex]].astype(int).tolist())

    tree = cKDTree(ring)
    cuts = {index: nearest(hole, tree) for index, hole in enumerate(holes)}
    while cuts:
        index = min(cuts, key=lambda index: cuts[index][0])
        _, vertex, point = cuts.pop(index)
        hole = np.roll(holes[index], -vertex, axis=0)
        at = int(np.flatnonzero((ring == np.array([point])).all(axis=1))[0])
        ring = np.concatenate([ring[: at + 1], hole, hole[:1], ring[at:]])
        tree = cKDTree(hole)
        cuts = {index: min(cut, nearest(holes[index], tree)) for index, cut in cuts.items()}
    return ring
