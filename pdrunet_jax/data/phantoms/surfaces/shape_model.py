"""Write bodies drawn from the statistical shape model LLP26 as a folder of surfaces.

    pip download musculoskeletal-models==0.2.4 --no-deps
    python -m pdrunet_jax.data.phantoms.surfaces.shape_model musculoskeletal_models-0.2.4-py3-none-any.whl bodies

The model (MPL-2.0) describes pelvis, femur, tibia, fibula and patella of 26 lower limbs: a mean shape, and the ways in
which limbs differ from it. Its bones are made of curved patches whose points lie on a grid.
"""

import io
import json
import pickle
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pdrunet_jax.data.phantoms.phantom import generator
from pdrunet_jax.data.phantoms.surfaces.raster import Faces, Points
from pdrunet_jax.data.phantoms.surfaces.shapes import Mesh
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.extras import how_to_install
from pdrunet_jax.runtime.files import new_folder

_ROOT = "musculoskeletal/models/"
_MODEL = _ROOT + "shape_models/LLP26_rigid.pc"
_MESHES = ("pelvis_combined_cubic_flat", "femur_left_quartic_flat", "patella_11_left", "tibia_fibula_left_cubic_flat")
"""In the order of their points in the model."""
_STREAM = 9  # of random numbers
_MOST = 2.5  # standard deviations from the mean, beyond which shapes are not those of persons


@dataclass(frozen=True)
class ShapeModelOptions:
    """Draw bodies from the shape model of the package musculoskeletal-models."""

    wheel: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WHEEL")]
    """The package's file, musculoskeletal_models-0.2.4-py3-none-any.whl."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; must be empty or not exist. Each body is a subfolder of PLY files."""
    count: int = 40
    """Number of bodies; the first is the mean."""
    seed: int = 0
    """Seed of the random shapes."""
    modes: int = 20
    """Number of ways in which shapes differ, the strongest first; at most 25."""


def write_bodies(options: ShapeModelOptions) -> None:
    """Write the bodies. Raises `UserError` if the file is not the package, or the folder is not empty."""
    try:
        import trimesh
    except ModuleNotFoundError:
        raise UserError(f"surfaces are written by trimesh: {how_to_install('surfaces')}") from None
    if options.count < 1 or not 1 <= options.modes <= 25:
        raise UserError(f"--count {options.count} --modes {options.modes}: at least 1 body, and 1 to 25 modes")
    try:
        with zipfile.ZipFile(options.wheel) as wheel:
            model = _Arrays(io.BytesIO(wheel.read(_MODEL))).load()
            patches = [_patches(json.loads(wheel.read(f"{_ROOT}atlas_meshes/{name}.mesh"))) for name in _MESHES]
        mean, modes, variances = (np.asarray(model[key], np.float64) for key in ("mean", "modes", "weights"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(
            f"{options.wheel}: not musculoskeletal-models 0.2.4 ({error}); get it with "
            "pip download musculoskeletal-models==0.2.4 --no-deps"
        ) from None
    with new_folder(options.out, "surfaces") as folder:
        for index in range(options.count):
            rng = generator(options.seed, _STREAM, index)
            away = np.clip(rng.standard_normal(options.modes), -_MOST, _MOST) * (index > 0)
            shape = mean + modes[:, : options.modes] @ (away * np.sqrt(variances[: options.modes]))
            body = folder / f"body_{index:03d}"
            body.mkdir()
            for name, mesh in _bones(shape.reshape(3, -1).T, patches):
                trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).export(body / f"{name}.ply")
    print(f"{options.out}: {options.count} bodies")


class _Arrays(pickle.Unpickler):
    """Reads NumPy arrays and plain containers from a pickle, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of an array; raises `pickle.UnpicklingError` for every other."""
        if (module.replace("_core", "core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.zeros(0).__reduce__()[0]  # the same function, by whichever name this NumPy has for it
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


@dataclass(frozen=True)
class _Patches:
    """The curved patches of a mesh."""

    points: int
    """Number of its points."""
    grids: list[list[NDArray[np.int64]]]
    """Rows of point numbers of each patch; a triangle's rows become shorter by one."""


def _patches(mesh: dict[str, Any]) -> _Patches:
    """Number the points: patches in order, points that several share once."""
    number: dict[str, int] = {}
    count, grids = 0, []
    for patch in sorted(mesh["elements"], key=int):
        kind = str(mesh["elements"][patch]).split()[-1]
        rows = {
            "quad55": [5] * 5,
            "quad54": [5] * 4,
            "quad44": [4] * 4,
            "tri15": [5, 4, 3, 2, 1],
            "tri10": [4, 3, 2, 1],
        }[kind]
        numbers = []
        for point in range(sum(rows)):
            key = f"{patch}_{point}"
            known = [number[other] for other in mesh["connectivity"].get(key, "").split() if other in number]
            number[key] = known[0] if known else count
            count += not known
            numbers.append(number[key])
        grids.append(np.split(np.array(numbers), np.cumsum(rows)[:-1]))
    if count != mesh["number_of_points"]:
        raise ValueError(f"{count} points in place of {mesh['number_of_points']}")
    return _Patches(count, grids)


def _bones(points: Points, meshes: list[_Patches]) -> list[tuple[str, Mesh]]:
    """The named bones of a shape (N, 3): pelvis and lower leg are taken apart into what is not joined."""
    bones: list[tuple[str, Mesh]] = []
    start = 0
    for file, patches in zip(_MESHES, meshes, strict=True):
        own = points[start : start + patches.points]
        start += patches.points
        faces = np.concatenate([_triangles(rows) for rows in patches.grids])
        parts = [_smoothed(Mesh(own, part).outward()) for part in _apart(faces, len(own))]
        if file.startswith("tibia"):
            parts.sort(key=lambda mesh: mesh.volume)
            names = ["fibula_L", "tibia_L"]
        elif file.startswith("pelvis"):  # x goes to the patient's left
            parts.sort(key=lambda mesh: float(mesh.vertices[:, 0].mean()))
            names = ["hip_R", "sacrum", "hip_L"]
        else:
            names = [f"{file.partition('_')[0]}_L"]
        bones += zip(names, parts, strict=True)
    return bones


def _triangles(rows: list[NDArray[np.int64]]) -> Faces:
    """The triangles between the rows of a patch."""
    faces = []
    for upper, lower in pairwise(rows):
        square = len(upper) == len(lower)
        for k in range(len(upper) - 1):
            faces.append((upper[k], upper[k + 1], lower[k]))
            if square or k < len(lower) - 1:
                faces.append((upper[k + 1], lower[k + 1], lower[k]))
    return np.array(faces, np.int64)


def _apart(faces: Faces, count: int) -> list[Faces]:
    """The faces of each connected part of a mesh."""
    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    graph = coo_array((np.ones(len(edges)), edges.T), (count, count))
    part = connected_components(graph, directed=False)[1][faces[:, 0]]
    return [faces[part == each] for each in np.unique(part)]


def _smoothed(mesh: Mesh) -> Mesh:
    """The mesh with every triangle divided into sixteen, its corners rounded (Loop's rule)."""
    import trimesh

    used, faces = np.unique(mesh.faces, return_inverse=True)
    vertices, faces = trimesh.remesh.subdivide_loop(mesh.vertices[used], faces.reshape(-1, 3), iterations=2)
    return Mesh(np.asarray(vertices, np.float64), np.asarray(faces, np.int64))


def main() -> None:
    """Write the bodies that the command line asks for."""
    write_bodies(tyro.cli(ShapeModelOptions))


if __name__ == "__main__":
    cli.run(main)
