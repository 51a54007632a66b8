"""From a scene to path lengths through each material, and the silhouette of each bone."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pdrunet_jax.data.phantoms.surfaces.lead import bowel_gas
from pdrunet_jax.data.phantoms.surfaces.raster import Camera, Picture, path_lengths, resized
from pdrunet_jax.data.phantoms.surfaces.scene import TRUNK, Placed, Scene
from pdrunet_jax.data.phantoms.surfaces.shapes import Mesh
from pdrunet_jax.data.phantoms.surfaces.variations import Variation

_SOLID = 0.3  # share of mineral in bones that are of one density
_TOUCH = 0.02  # length in mm from which a ray counts as passing through a bone


@dataclass(frozen=True)
class Rendered:
    """What the rays of a scene pass through."""

    lengths: dict[str, Picture]
    """Path length (H, W) in mm through each material of `physics.MATERIALS`."""
    masks: dict[str, NDArray[np.bool_]]
    """Silhouette (H, W) of each named bone; silhouettes overlap."""
    body: NDArray[np.bool_]
    """Where the patient is."""


def render(scene: Scene, rng: np.random.Generator, without: Collection[Variation] = ()) -> Rendered:
    """Cast the rays of a scene; `rng` draws the density of spongy bone and the texture of bone and muscle."""
    shape = scene.camera.shape
    bone, solid = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    marrow = np.zeros(shape, np.float32)
    masks: dict[str, NDArray[np.bool_]] = {}
    trabeculae = _trabeculae(shape, rng, scene.camera.pitch)
    ends, canal = float(rng.uniform(0.1, 0.24)), float(rng.uniform(0.0, 0.03))
    density = float(rng.uniform(0.8, 1.1))
    plates = _growth_plates(rng) if rng.random() < 0.08 and "growth" not in without else None
    for each in scene.bones:
        window, outer, inner, along = _cast_bone(each, scene.camera)
        if not outer.size:
            continue
        if each.part == "wall" and "cortex" not in without:
            bone[window] += outer * np.float32(density)
            inner = np.zeros_like(outer)
        elif inner is None:  # spongy bone with a surface of its own
            inner = outer
        spongy = np.full_like(outer, ends) if along is None else _spongy_share(along, ends, canal)
        spongy *= 1 + trabeculae[window]
        if "cortex" in without:
            inner, spongy = outer, np.full_like(outer, _SOLID)
        if each.part != "wall" or "cortex" in without:
            mineral = np.float32(density) * ((outer - inner) + spongy * inner)
            bone[window] += mineral if plates is None or along is None else mineral * plates(along)
        marrow[window] += (1 - spongy) * inner
        solid[window] += outer
        if each.name:
            mask = masks.setdefault(each.name, np.zeros(shape, np.bool_))
            mask[window] |= outer > _TOUCH

    # Soft tissue fills what the bones leave; marrow is mostly fat.
    skin, fascia = (_tissue(scene, kind) for kind in ("skin", "fascia"))
    planes = _cloud(shape, rng, 14, 6)
    streaks = np.clip(planes - 0.6, 0, 0.5) * np.float32(0.35)
    inside = np.maximum(fascia - solid, 0) * (1 + np.float32(0.02) * _cloud(shape, rng, 5, 5))
    lengths = {
        "muscle": inside * (1 - streaks),
        "fat": np.maximum(skin - np.maximum(fascia, solid), 0) + inside * streaks + np.maximum(marrow, 0),
        "bone": np.maximum(bone, 0),
    }
    if "soft-tissue" in without:
        lengths |= {"muscle": np.zeros(shape, np.float32), "fat": np.zeros(shape, np.float32)}
    trunk = [skin for skin in scene.skins if skin.group == TRUNK]
    if trunk:
        depth = _whole(trunk[0].fascia, scene.camera)
        gas = bowel_gas(shape, scene.camera.pitch, rng) * np.clip((depth - 150) / 60, 0, 1)
        lengths["muscle"] = np.maximum(lengths["muscle"] - gas, 0)
    for kind, mesh in scene.metal:
        window, part = _cast_rays(mesh, scene.camera)
        lengths.setdefault(kind, np.zeros(shape, np.float32))[window] += part
    for outside, within in scene.casts:
        wall = _whole(outside, scene.camera) - _whole(within, scene.camera)
        lengths["plaster"] = np.maximum(wall, 0) * (1 + np.float32(0.06) * _cloud(shape, rng, 90, 90))
    return Rendered(lengths, masks, skin > 0)


def _cast_bone(bone: Placed, camera: Camera) -> tuple[tuple[slice, slice], Picture, Picture | None, Picture | None]:
    """A bone's window in the picture; there, the lengths inside its outer and inner surface and the place along it."""
    projected = camera.project(bone.mesh.vertices)
    window, outer = path_lengths(projected, bone.mesh.faces, camera.shape)
    inner = None
    if bone.inner is not None and outer.size:
        inner = np.zeros_like(outer)
        part, lengths = _cast_rays(Mesh(bone.inner, bone.mesh.faces), camera)
        rows, columns = window
        top, left = part[0].start - rows.start, part[1].start - columns.start
        up, across = max(top, 0), max(left, 0)
        shown = lengths[up - top :, across - left :][: outer.shape[0] - up, : outer.shape[1] - across]
        inner[up : up + shown.shape[0], across : across + shown.shape[1]] = shown
        inner = np.minimum(inner, outer)
    if bone.along is None or not outer.size:
        return window, outer, inner, None
    # The place along the bone, as the linear function of column and row that fits its vertices best.
    some = slice(None, None, max(1, len(projected) // 500))
    system = np.column_stack([projected[some, :2], np.ones(len(projected[some]))])
    to_right, down, constant = np.linalg.lstsq(system, bone.along[some], rcond=None)[0]
    row, column = (np.arange(part.start, part.stop, dtype=np.float32) for part in window)
    along = np.float32(to_right) * column + (np.float32(down) * row + np.float32(constant))[:, None]
    return window, outer, inner, along


def _cast_rays(mesh: Mesh, camera: Camera) -> tuple[tuple[slice, slice], Picture]:
    return path_lengths(camera.project(mesh.vertices), mesh.faces, camera.shape)


def _whole(mesh: Mesh, camera: Camera) -> Picture:
    window, lengths = _cast_rays(mesh, camera)
    picture = np.zeros(camera.shape, np.float32)
    picture[window] = lengths
    return picture


def _tissue(scene: Scene, kind: str) -> Picture:
    """Length (H, W) inside skin or fascia; parts of the body that join overlap there."""
    groups: dict[int, Picture] = {}
    for skin in scene.skins:
        whole = _whole(getattr(skin, kind), scene.camera)
        groups[skin.group] = np.maximum(groups[skin.group], whole) if skin.group in groups else whole
    trunk = groups.pop(TRUNK, None)
    first, *others = groups.values()
    for other in others:  # where thighs meet, they press on each other
        first = np.maximum(first, other) + np.float32(0.25) * np.minimum(first, other)
    return first if trunk is None else np.maximum(first, trunk)


def _spongy_share(along: Picture, ends: float, canal: float) -> Picture:
    """Share of mineral inside the cortex of a long bone: spongy ends, marrow in the shaft."""
    end = np.clip((np.float32(0.26) - np.minimum(along, 1 - along)) / np.float32(0.2), 0, 1)
    return np.asarray(canal + (ends - canal) * end * end * (3 - 2 * end), np.float32)


def _growth_plates(rng: np.random.Generator) -> Callable[[Picture], Picture]:
    """What is left of the mineral, given the place along a long bone: little in a plate near either end."""
    places, width = rng.uniform(0.03, 0.075, 2), float(rng.uniform(0.003, 0.006))
    lost, turns = np.float32(rng.uniform(0.4, 0.8)), float(rng.uniform(4, 9))

    def left(along: Picture) -> Picture:
        """The plates undulate along the rows."""
        bent = along + np.float32(width) * np.sin(np.linspace(0, turns, along.shape[1], dtype=np.float32))
        nearest = np.minimum(np.abs(bent - places[0]), np.abs(1 - bent - places[1])) / width
        return np.asarray(1 - lost * np.exp(-(nearest**2)), np.float32)

    return left


def _trabeculae(shape: tuple[int, int], rng: np.random.Generator, pitch: float) -> Picture:
    """Relative differences in density: streaks of less than a mm by some mm along rows or columns, and patches."""
    fine = max(0.5, 0.35 / pitch)
    noise = rng.standard_normal(shape, np.float32)
    upright = shape[0] >= shape[1] or rng.random() < 0.5
    widths = (2.5 * fine, fine) if upright else (fine, 2.5 * fine)
    smooth = ndimage.gaussian_filter(noise, widths, truncate=2.5)
    patches = _cloud(shape, rng, 26, 26)
    strength, patchy = rng.uniform(0.04, 0.16), rng.uniform(0.02, 0.12)
    return np.asarray(smooth * (strength / max(float(smooth.std()), 1e-6)) + patches * patchy, np.float32)


def _cloud(shape: tuple[int, int], rng: np.random.Generator, rows: int, columns: int) -> Picture:
    """Smooth noise of about unit variance: a coarse random grid, interpolated."""
    return resized(rng.standard_normal((rows, columns), np.float32) * np.float32(1.3), shape)
