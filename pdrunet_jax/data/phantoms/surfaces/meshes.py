"""Repair and measure triangle surfaces: close holes, join vertices, normals, thickness."""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pdrunet_jax.data.phantoms.surfaces.raster import Points
from pdrunet_jax.data.phantoms.surfaces.shapes import Mesh


def half_thickness(mesh: Mesh) -> NDArray[np.float64]:
    """(N,) Radius in mm of the largest ball that touches each vertex from inside without crossing the surface."""
    vertices, outward = mesh.vertices, normals(mesh)
    tree = cKDTree(vertices)
    radius = np.full(len(vertices), 40.0)
    shrinking = np.arange(len(vertices))
    for _ in range(8):
        own, before = vertices[shrinking], radius[shrinking]
        nearest = tree.query(own - before[:, None] * outward[shrinking])[1]
        way = own - vertices[nearest]
        depth = (way * outward[shrinking]).sum(axis=1)
        smaller = (way**2).sum(axis=1) / (2 * np.maximum(depth, 1e-9))
        after = np.where(depth > 1e-6, np.minimum(before, np.maximum(smaller, 0.5)), before)
        radius[shrinking] = after
        shrinking = shrinking[after < before]  # the others would meet the same vertex again
    return radius


def closed(mesh: Mesh) -> tuple[Mesh, float]:
    """Close the holes of a surface with cones, and turn it outward; returns it and the cones' share of its area."""
    edges = np.concatenate([mesh.faces[:, pair] for pair in ((0, 1), (1, 2), (2, 0))])
    count = len(mesh.vertices)
    keys, inverse = np.unique(np.sort(edges, axis=1) @ (count, 1), return_inverse=True)
    balance = np.bincount(inverse, np.where(edges[:, 0] < edges[:, 1], 1, -1), len(keys)).astype(np.int64)
    open_ = np.flatnonzero(balance)
    if not len(open_):
        return mesh.outward(), 0.0
    low, high = keys[open_] // count, keys[open_] % count
    ends = np.where((balance[open_] > 0)[:, None], np.stack([high, low], 1), np.stack([low, high], 1))
    ends = np.repeat(ends, np.abs(balance[open_]), axis=0)
    # Edges that meet belong to one hole, and get one apex.
    hole = np.arange(count)
    while True:
        lowest = np.minimum(hole[ends[:, 0]], hole[ends[:, 1]])
        before = hole.copy()
        np.minimum.at(hole, ends[:, 0], lowest)
        np.minimum.at(hole, ends[:, 1], lowest)
        if np.array_equal(before, hole):
            break
    owners, of_edge = np.unique(hole[ends[:, 0]], return_inverse=True)
    apexes = np.stack([mesh.vertices[ends[of_edge == index, 0]].mean(axis=0) for index in range(len(owners))])
    cones = np.column_stack([ends, count + of_edge])
    whole = Mesh(np.concatenate([mesh.vertices, apexes]), np.concatenate([mesh.faces, cones])).outward()
    areas = [np.linalg.norm(_of_faces(whole.vertices, faces), axis=1).sum() for faces in (cones, whole.faces)]
    return whole, float(areas[0] / max(areas[1], 1e-30))


def merged(vertices: Points, faces: NDArray[np.int64]) -> tuple[Points, NDArray[np.int64]]:
    """The surface with vertices at the same place made one, and faces without area left out."""
    scale = max(float(np.ptp(vertices, axis=0).max(initial=0)), 1e-30) if len(vertices) else 1.0
    _, first, inverse = np.unique(np.round(vertices / scale * 1e6), axis=0, return_index=True, return_inverse=True)
    faces = inverse.reshape(-1)[faces]
    a, b, c = faces.T
    faces = faces[(a != b) & (b != c) & (c != a)]
    used, renumbered = np.unique(faces, return_inverse=True)
    return vertices[first][used], renumbered.reshape(-1, 3).astype(np.int64)


def normals(mesh: Mesh) -> Points:
    """(N, 3) Unit normals of the vertices, outward."""
    of_faces = _of_faces(mesh.vertices, mesh.faces)
    total = np.zeros_like(mesh.vertices)
    for axis in range(3):
        total[:, axis] = np.bincount(mesh.faces.ravel(), np.repeat(of_faces[:, axis], 3), len(total))
    return np.asarray(total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12))


def _of_faces(vertices: Points, faces: NDArray[np.int64]) -> Points:
    """(M, 3) Normal of each face, as long as twice its area."""
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    return np.asarray(np.cross(b - a, c - a))


def averaged(values: NDArray[np.float64], mesh: Mesh) -> NDArray[np.float64]:
    """(N,) values, each averaged with those of the vertices around it."""
    total = np.bincount(mesh.faces.ravel(), np.repeat(values[mesh.faces].mean(axis=1), 3), len(values))
    return np.asarray(total / np.maximum(np.bincount(mesh.faces.ravel(), minlength=len(values)), 1))
