"""Bodies from a folder of surfaces: which bone each surface is, closed, in mm, in one frame, with its cortex.

The frame of every body is the same: x to the patient's right, y forward, z up, the middle of the knee at 0. Its leg is
a right one; a left leg is mirrored.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.phantoms.surfaces.meshes import averaged, closed, half_thickness, merged, normals
from pdrunet_jax.data.phantoms.surfaces.raster import Points
from pdrunet_jax.data.phantoms.surfaces.shapes import Mesh
from pdrunet_jax.data.walk import files_below
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.extras import how_to_install

FORMATS = (".glb", ".gltf", ".ply", ".stl", ".obj")

_NAMES = {
    "femur": "femur",
    "tibia": "tibia",
    "fibula": "fibula",
    "patella": "patella",
    **dict.fromkeys(("pelvis", "hip", "hipbone", "ilium", "ischium", "pubis", "sacrum", "coccyx"), "pelvis"),
    **dict.fromkeys(("foot", "talus", "calcaneus", "navicular", "cuboid", "cuneiform", "metatarsal"), "foot"),
}
"""Words that name a bone, and the class it belongs to."""
_PARTS = {"of", "cartilage", "meniscus", "fossa", "condyle", "enthesis", "marrow", "ligament"}
_INNER, _WALL = {"spongy", "trabecular", "cancellous"}, {"compact", "cortical"}
_SIDES = {"l": "left", "left": "left", "r": "right", "right": "right"}
_LENGTHS = {"femur": 440.0, "tibia": 370.0, "fibula": 370.0, "patella": 45.0, "pelvis": 220.0, "foot": 220.0}
"""Usual longest sides in mm, to tell metres, centimetres and millimetres apart."""
_MOST_OPEN = {"whole": 0.01, "wall": 0.01, "inner": 0.25}  # share of the area; spongy bone may be open at joints
_MOST_FACES, _GRID = 9000, 2.0  # surfaces finer than this are coarsened to cells of `_GRID` mm


@dataclass(frozen=True)
class Bone:
    """One surface of a body."""

    name: str
    """A class: femur, tibia, fibula, patella, pelvis or foot."""
    mesh: Mesh
    side: str = ""
    """right or left; empty for a bone in the middle, or where nothing tells."""
    part: str = "whole"
    """whole: the outside of a bone; wall: compact bone that has an inside of its own; inner: its spongy bone."""

    @cached_property
    def along(self) -> NDArray[np.float64]:
        """(N,) Place of each vertex along the longest axis of the bone, from 0 to 1."""
        centred = self.mesh.vertices - self.mesh.vertices.mean(axis=0)
        axis = np.linalg.svd(centred, full_matrices=False)[2][0]
        axis *= 1 if axis[np.abs(axis).argmax()] > 0 else -1
        place = centred @ axis
        return np.asarray((place - place.min()) / np.ptp(place))

    @cached_property
    def inward(self) -> Points:
        """(N, 3) Way in mm from each vertex to the inside of the cortex, of an adult in good health.

        The wall of a shaft is nearly half of its radius thick and thins out to about 1 mm at the ends; flat and short
        bones have walls of 1 to 2 mm. No wall is thicker than 0.6 of the bone's half thickness at that point.
        """
        outward, radius = normals(self.mesh), half_thickness(self.mesh)
        shaft = _smoothstep((np.minimum(self.along, 1 - self.along) - 0.08) / 0.2)
        wall = 1.2 + shaft * (0.45 * np.median(radius) - 1.2) if self.is_long else np.full(len(radius), 1.3)
        wall = np.minimum(wall, 0.6 * radius)
        for _ in range(3):
            wall = averaged(wall, self.mesh)
        return np.asarray(-outward * np.minimum(wall, 0.7 * radius)[:, None])

    @property
    def is_long(self) -> bool:
        """Whether the bone has a shaft."""
        return self.name in ("femur", "tibia", "fibula")


@dataclass(frozen=True)
class Body:
    """The bones of one person, in the frame of this module."""

    name: str
    bones: tuple[Bone, ...]

    def bone(self, name: str) -> Bone:
        """The bone of the leg with this name."""
        return next(bone for bone in self.bones if bone.name == name and bone.side != "left")

    @cached_property
    def hip(self) -> Points:
        """(3,) Centre of the head of the femur: of the ball that fits its inner upper end best."""
        vertices = self.bone("femur").mesh.vertices
        upper = vertices[vertices[:, 2] > vertices[:, 2].max() - 60]
        inner = upper[upper[:, 0] < upper[:, 0].min() + 30]
        system = np.column_stack([2 * inner, np.ones(len(inner))])
        centre = np.linalg.lstsq(system, (inner**2).sum(axis=1), rcond=None)[0][:3]
        far = np.linalg.norm(centre - inner.mean(axis=0)) > 30
        return np.asarray(inner.mean(axis=0) if far else centre)

    @cached_property
    def ankle(self) -> Points:
        """(3,) Middle of the lower end of the tibia."""
        vertices = self.bone("tibia").mesh.vertices
        return np.asarray(vertices[vertices[:, 2] < vertices[:, 2].min() + 20].mean(axis=0))

    @cached_property
    def middle(self) -> float:
        """The x of the plane that parts right from left."""
        pelvis = [bone.mesh.vertices for bone in self.bones if bone.name == "pelvis"]
        if not pelvis:
            return float(self.hip[0] - 88)
        whole = np.concatenate(pelvis)
        return float((whole[:, 0].min() + whole[:, 0].max()) / 2)


def read_bodies(folder: Path) -> list[Body]:
    """Read the bodies of a folder of surfaces, sorted by name.

    A body is a subfolder, or all files whose names are the same but for bones and sides: `A_knee_L.glb` and
    `A_pelvis.glb`. A bone's name is in the name of its node (glTF) or file. Raises `DataError` with every problem.
    """
    files: dict[str, list[Path]] = {}
    if not folder.is_dir():
        raise UserError(f"surfaces {folder}: no such folder; docs/phantoms.md tells where to get surfaces")
    for path in surface_files(folder):
        within = path.relative_to(folder).parts
        files.setdefault(within[0] if len(within) > 1 else _body_of(path.stem), []).append(path)
    if not files:
        raise UserError(f"surfaces {folder}: no file of surfaces there ({', '.join(FORMATS)})")
    problems: list[str] = []

    def read(name: str) -> Body | None:
        try:
            return make_body(name, [bone for path in files[name] for bone in _read(path)])
        except DataError as error:
            problems.extend(error.problems)
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bodies = [body for body in pool.map(read, files) if body is not None]
    if problems:
        raise DataError(f"surfaces {folder}", sorted(problems))
    return sorted(bodies, key=lambda body: body.name)


def surface_files(folder: Path) -> list[Path]:
    """The files of a folder of surfaces and of its subfolders, sorted. Raises `DataError` for what cannot be read."""
    return [path for path in files_below(folder) if path.suffix.lower() in FORMATS]


def make_body(name: str, bones: list[Bone]) -> Body:
    """A body from bones in any unit and frame. Raises `DataError` if a bone that gives the frame is missing."""
    missing = [needed for needed in ("femur", "tibia", "patella") if needed not in {bone.name for bone in bones}]
    if missing:
        named = f"name a node or file of its surface so, {missing[0]}_R for instance"
        raise DataError(name, [f"body {name}: no {' and no '.join(missing)}; {named}"])
    legs = {bone.side for bone in bones if bone.name == "femur"}
    if "right" in legs:  # of two legs the right one; the other is its mirror image in pictures of both
        bones = [bone for bone in bones if bone.name == "pelvis" or bone.side != "left"]
    found = {name: [b for b in bones if b.name == name] for name in _NAMES.values()}
    if any(len(found[name]) > 1 for name in ("femur", "tibia", "patella")):
        raise DataError(name, [f"body {name}: several surfaces of one bone on one side; put each body into a folder"])
    bones = _coarsened(_pelvis_straight(_in_frame(bones)))
    for bone in bones:
        _, _ = bone.along, bone.inward if bone.part == "whole" else None  # computed once, for all pictures
    return Body(name, tuple(bones))


def _read(path: Path) -> list[Bone]:
    """Read the bones of a file. Raises `DataError` that names it."""
    try:
        import trimesh
    except ModuleNotFoundError:
        raise UserError(f"{path.name} needs trimesh: {how_to_install('surfaces')}") from None
    try:
        scene = trimesh.load_scene(path)
        found = {
            str(node): scene.geometry[key].copy().apply_transform(matrix)
            for node in sorted(map(str, scene.graph.nodes_geometry))
            for matrix, key in [scene.graph[node]]
        }
        below = {node: sorted(map(str, scene.graph.transforms.successors(node))) for node in found}
    except Exception as error:  # trimesh raises errors of many kinds for damaged files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(str(path), [f"{path}: cannot be read as a surface ({reason}); export it again"]) from None
    found = {node: geometry for node, geometry in found.items() if isinstance(geometry, trimesh.Trimesh)}
    bones, problems = [], []
    for node in found:
        text = path.stem if len(found) == 1 and _bone_of(node) is None else node
        if (name := _bone_of(text)) is None:
            continue
        words = set(_words(text))
        part = "inner" if words & _INNER else "wall" if words & _WALL else "whole"
        # The joint surfaces of a bone may be nodes of their own below it.
        family = [each for each in below[node] if each in found and (each == node or _bone_of(each) is None)]
        choices = [closed(_mesh([found[each] for each in group])) for group in ([node], family)]
        mesh, holes = min(choices, key=lambda choice: choice[1])
        if not len(mesh.faces) or not np.isfinite(mesh.vertices).all():
            problems.append(f"{path}: {text} has no surface")
        elif holes > _MOST_OPEN[part]:
            problems.append(f"{path}: {text} is not closed ({holes:.0%} of its surface is missing); close it")
        else:
            side = next((_SIDES[word] for word in (*_words(text), *_words(path.stem)) if word in _SIDES), "")
            bones.append(Bone(name, mesh, "" if words & {"sacrum", "coccyx", "pelvis"} else side, part))
    if problems:
        raise DataError(str(path), problems)
    return bones


def _mesh(geometries: list[Any]) -> Mesh:
    """One surface of several of trimesh's."""
    counts = np.cumsum([0, *(len(geometry.vertices) for geometry in geometries)])
    vertices = np.concatenate([np.asarray(geometry.vertices, np.float64) for geometry in geometries])
    faces = [np.asarray(each.faces, np.int64) + start for each, start in zip(geometries, counts[:-1], strict=True)]
    return Mesh(*merged(vertices, np.concatenate(faces)))


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _bone_of(name: str) -> str | None:
    """The class of the bone that a node's or file's name names; None if it names none, or a part of one."""
    words = _words(name)
    named = {_NAMES[word] for word in words if word in _NAMES}
    return named.pop() if len(named) == 1 and not _PARTS & set(words) else None


def _body_of(stem: str) -> str:
    other = {*_NAMES, *_SIDES, "knee", "leg", "bone", "joint"}
    return "_".join(word for word in re.split(r"[\W_]+", stem) if word.lower() not in other) or "body"


def _coarsened(bones: list[Bone]) -> list[Bone]:
    """Bones whose finer surfaces have their vertices joined in cells: a closed surface stays closed."""
    result = []
    for bone in bones:
        mesh = bone.mesh
        if len(mesh.faces) > _MOST_FACES:
            cells = np.unique(np.floor(mesh.vertices / _GRID), axis=0, return_inverse=True)[1].reshape(-1)
            counts = np.bincount(cells)
            middles = np.stack([np.bincount(cells, mesh.vertices[:, axis]) / counts for axis in range(3)], 1)
            mesh = Mesh(*merged(middles, cells[mesh.faces])).outward()
        result.append(replace(bone, mesh=mesh))
    return result


def _in_frame(bones: list[Bone]) -> list[Bone]:
    """The bones in mm in the common frame, as those of a right leg."""
    middle = {bone.name: bone.mesh.vertices.mean(axis=0) for bone in bones}
    units = [
        _LENGTHS[bone.name] / np.ptp(bone.mesh.vertices, axis=0).max()
        for bone in bones
        if bone.name in ("femur", "tibia", "fibula", "patella")
    ]
    unit = 10 ** round(float(np.log10(np.median(units))))
    femur = next(bone.mesh.vertices for bone in bones if bone.name == "femur")
    up = middle["femur"] - middle["tibia"]
    up /= np.linalg.norm(up)
    lower = femur[femur @ up < (femur @ up).min() + 0.1 * np.ptp(femur @ up)].mean(axis=0)
    forward = middle["patella"] - lower
    forward -= up * (forward @ up)
    forward /= np.linalg.norm(forward)
    axes = np.stack([np.cross(forward, up), forward, up], axis=1) * unit
    sides = {bone.side for bone in bones if bone.name == "femur"}
    outer = (middle["fibula"] - middle["tibia"]) @ axes[:, 0] if "fibula" in middle else 0.0
    left = outer < 0 or (not outer and sides == {"left"})
    mirror = np.array((-1.0 if left else 1.0, 1.0, 1.0))
    swapped = {"left": "right", "right": "left", "": ""}
    moved = []
    for bone in bones:
        vertices = (bone.mesh.vertices - lower) @ axes * mirror
        side = swapped[bone.side] if left else bone.side
        moved.append(replace(bone, mesh=Mesh(vertices, bone.mesh.faces).outward(), side=side))
    return moved


def _pelvis_straight(bones: list[Bone]) -> list[Bone]:
    """The bones with the pelvis turned about the hip until its right and left are those of the frame."""
    hips = {
        side: np.concatenate(found).mean(axis=0)
        for side in ("right", "left")
        if (found := [bone.mesh.vertices for bone in bones if bone.name == "pelvis" and bone.side == side])
    }
    if len(hips) < 2:
        return bones
    across = hips["right"] - hips["left"]
    first = across / np.linalg.norm(across)
    third = np.array((0.0, 0.0, 1.0)) - first * first[2]
    third /= np.linalg.norm(third)
    turn = np.stack([first, np.cross(third, first), third])
    centre = Body("", tuple(bones)).hip
    return [
        replace(bone, mesh=Mesh((bone.mesh.vertices - centre) @ turn.T + centre, bone.mesh.faces))
        if bone.name == "pelvis"
        else bone
        for bone in bones
    ]


def _smoothstep(value: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.clip(value, 0, 1)
    return np.asarray(inside * inside * (3 - 2 * inside))
