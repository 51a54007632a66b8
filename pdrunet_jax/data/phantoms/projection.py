"""Path lengths of parallel rays through bones, soft tissue and ribs, in units of the image's side."""

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.phantoms.anatomy import Blob, Bone, EndShape, Limb

Array = NDArray[np.floating]


def project_bone(bone: Bone, u: Array, v: Array) -> tuple[NDArray[np.intp], NDArray[np.bool_], Array, Array]:
    """Path lengths through `bone` at the points (`u`, `v`).

    Returns flat indices of the points near it and, for each, whether it is inside, and the path lengths through
    cortical and trabecular bone.
    """
    widest = bone.radius * (1.3 + max(bone.first.left, bone.first.right, bone.last.left, bone.last.right))
    off_axis = v - np.float32(bone.tilt) * u - np.float32(bone.offset)
    near = (np.abs(off_axis) < widest + abs(bone.bow)) & (u > bone.start - widest) & (u < bone.stop + widest)
    at = np.flatnonzero(near)
    along, off_axis = u.ravel()[at], off_axis.ravel()[at]

    knots = np.linspace(bone.start - widest, bone.stop + widest, 400)
    share = np.clip((knots - bone.start) / (bone.stop - bone.start), 0, 1)
    left, right, ends = np.ones_like(knots), np.ones_like(knots), np.zeros_like(knots)
    for end, distance in ((bone.first, knots - bone.start), (bone.last, bone.stop - knots)):
        if end.shape != "cut":
            flare = np.exp(-((np.maximum(distance, 0) / (end.length * bone.radius)) ** 2))
            left, right, ends = left + end.left * flare, right + end.right * flare, np.maximum(ends, flare)
    middle = bone.bow * np.sin(np.pi * share) + bone.radius * (right - left) / 2
    half = _lookup(along, knots, bone.radius * (left + right) / 2)
    spongy = _lookup(along, knots, ends)
    across = (off_axis - _lookup(along, knots, middle)) / half

    inward = half * (1 - np.abs(across))
    for end, beyond in ((bone.first, bone.start - along), (bone.last, along - bone.stop)):
        if end.shape != "cut":
            inward = _rounded_minimum(inward, half * _cap(end.shape, across) - beyond, bone.radius * 0.7)

    radius = np.minimum(half, bone.radius * 1.6)
    wall = bone.radius * bone.cortex * (1 - 0.8 * spongy)
    outer = _chord(inward, radius)
    inner = _chord(inward - wall, radius - wall)
    return at, inward > 0, outer - inner, inner * bone.spongy * (0.12 + 0.88 * spongy)


def project_soft_tissue(limb: Limb, u: Array, v: Array) -> tuple[Array, Array]:
    """Path length through soft tissue, and depth below the skin, at the points (`u`, `v`)."""
    knots = np.linspace(-1, 1, 201)
    left, right = _lookup(u, knots, _smooth(limb.left, knots)), _lookup(u, knots, _smooth(limb.right, knots))
    half = (left + right) / 2
    inward = half - np.abs(v - (right - left) / 2)
    share = np.clip(inward / half, 0, 1)
    fat = 1 - 0.2 * np.exp(-np.maximum(inward, 0) / np.float32(0.015))
    planes = _lookup(v + np.float32(0.03) * np.sin(4 * u), knots, _smooth(limb.planes, knots))
    density = fat * (1 + 0.06 * planes)
    return 2 * np.float32(limb.depth) * (share * (2 - share)) ** np.float32(0.42) * density, inward


def project_blobs(blobs: tuple[Blob, ...], u: Array, v: Array) -> Array:
    """Path length through short bones: a thin shell around a sparse core."""
    total = np.zeros_like(u)
    waves = np.sin(37 * v + 9 * u), np.sin(17 * u - 23 * v)  # so that no outline is an ellipse
    u, v = u + np.float32(0.007) * waves[0], v + np.float32(0.007) * waves[1]
    for blob in blobs:
        distance = ((u - np.float32(blob.u)) / blob.half_u) ** 2 + ((v - np.float32(blob.v)) / blob.half_v) ** 2
        depth = np.float32(min(blob.half_u, blob.half_v))
        solid = 2 * depth * np.sqrt(np.clip(1 - distance, 0, 1))
        shell = solid - 2 * depth * np.sqrt(np.clip(0.75 - distance, 0, 1))
        total += np.float32(blob.density) * (np.float32(0.25) * solid + np.float32(0.3) * shell)
    return total


def project_ribs(limb: Limb, u: Array, v: Array, rng: np.random.Generator) -> Array:
    """Path length through ribs: thin, curved, repeated; as bright as bone, but not a long bone."""
    spacing, phase, slope = rng.uniform((0.1, 0.0, 0.2), (0.14, 1.0, 0.6)).astype(np.float32)
    depth = v - np.float32(limb.ribs)
    row = (u + slope * depth - np.float32(0.8) * depth**2) / spacing + phase
    inward = np.float32(0.22) - np.abs(row - np.round(row))  # in units of the spacing
    ring = np.clip(inward * 10, 0, 1) - np.float32(0.6) * np.clip((inward - np.float32(0.07)) * 10, 0, 1)
    shadows: Array = np.float32(0.09) * ring * np.clip(depth * 14, 0, 1)
    return shadows


def _lookup(at: Array, knots: NDArray[np.float64], values: NDArray[np.float64]) -> Array:
    """Interpolate linearly between equal steps; several times faster than np.interp on images."""
    last = len(knots) - 1
    position = np.clip((at - np.float32(knots[0])) * np.float32(last / (knots[-1] - knots[0])), 0, last - 1e-3)
    below = position.astype(np.int32)
    table = values.astype(np.float32)
    found: Array = table[below] + (position - below).astype(np.float32) * np.diff(table)[below]
    return found


def _cap(shape: EndShape, across: Array) -> Array:
    """Extent of an end beyond its nominal position, in half-widths of the bone."""
    if shape == "condyles":
        bumps = 0.2 - 0.25 * (np.abs(across) - 0.55) ** 2 - 0.07 * np.exp(-((across / 0.25) ** 2))
        return np.asarray(bumps, np.float32)
    if shape == "plateau":
        spines = 0.14 * np.exp(-(((np.abs(across) - 0.12) / 0.09) ** 2)) - 0.1 * across**2
        return np.asarray(spines, np.float32)
    if shape == "head":
        return np.float32(0.9) * np.sqrt(np.clip(1 - across**2, 0, 1)) - np.float32(0.2) + np.float32(0.15) * across
    return np.asarray(0.25 * np.tanh(3 * (-across - 0.35)) - 0.05, np.float32)


def _chord(inward: Array, radius: Array) -> Array:
    """Chord of a cylinder of `radius`, `inward` from its edge; the diameter beyond its middle."""
    share = np.clip(inward / radius, 0, 1)
    return 2 * radius * np.sqrt(share * (2 - share))


def _rounded_minimum(first: Array, second: Array, rounding: float) -> Array:
    """Smooth minimum, with corners rounded over `rounding`."""
    blend = np.clip(0.5 + 0.5 * (second - first) / rounding, 0, 1)
    return second + (first - second) * blend - np.float32(rounding) * blend * (1 - blend)


def _smooth(values: tuple[float, ...], knots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smooth curve through `values`, at equal steps in [-1, 1]."""
    table, kernel = np.interp(knots, np.linspace(-1, 1, len(values)), values), np.hanning(27)
    return np.convolve(np.pad(table, 13, mode="edge"), kernel / kernel.sum(), mode="valid")
