"""The statistical shape model is read from its package without running any of it."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pdrunet_jax.data.phantoms.surfaces.bodies import read_bodies
from pdrunet_jax.data.phantoms.surfaces.shape_model import _MESHES, _MODEL, _ROOT, ShapeModelOptions, write_bodies
from pdrunet_jax.runtime.errors import UserError

Box = tuple[tuple[float, float, float], tuple[float, float, float]]
BOXES: dict[str, list[Box]] = {
    _MESHES[0]: [((0, 0, 480), (20, 20, 20)), ((-90, 0, 470), (50, 30, 60)), ((90, 0, 470), (50, 30, 60))],
    _MESHES[1]: [((90, 0, 210), (17, 17, 210))],
    _MESHES[2]: [((90, -40, 0), (20, 9, 20))],  # the model's front is at negative y
    _MESHES[3]: [((90, 0, -200), (15, 15, 185)), ((130, 0, -200), (6, 6, 180))],
}
"""Middles and half sides of boxes in place of bones."""


def box_mesh(boxes: list[Box]) -> tuple[dict[str, object], np.ndarray]:
    """Boxes as the model's meshes have them, of six patches of 4x4 points each; their points (N, 3), each once."""
    kinds, at, points = {}, {}, []
    for middle, half in boxes:
        for axis in range(3):
            for sign in (-1, 1):
                across, along = np.eye(3)[(axis + 1) % 3], np.eye(3)[(axis + 2) % 3] * sign
                patch = str(len(kinds))
                kinds[patch] = f"{patch} quad44"
                for place, (row, column) in enumerate(np.ndindex(4, 4)):
                    corner = np.eye(3)[axis] * sign + across * (column / 1.5 - 1) + along * (row / 1.5 - 1)
                    at[f"{patch}_{place}"] = tuple(np.round(np.array(middle) + corner * half, 3))
    for point in at.values():
        if point not in points:
            points.append(point)
    same = {key: " ".join(other for other in at if other != key and at[other] == at[key]) for key in at}
    return {"connectivity": same, "elements": kinds, "number_of_points": len(points)}, np.array(points)


def wheel(path: Path, model: bytes | None = None) -> Path:
    meshes = {name: box_mesh(boxes) for name, boxes in BOXES.items()}
    mean = np.concatenate([points for _, points in meshes.values()]).T.ravel()
    longer = mean.copy().reshape(3, -1)
    longer[:2] = 0
    modes = np.stack([longer.ravel() / np.linalg.norm(longer), np.zeros(mean.size)], axis=1)
    arrays = {"modes": modes, "mean": mean, "weights": np.array([np.linalg.norm(longer) ** 2 * 0.01, 0.0]), "SD": None}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(_MODEL, pickle.dumps(arrays, protocol=4) if model is None else model)
        for name, (mesh, _) in meshes.items():
            file.writestr(f"{_ROOT}atlas_meshes/{name}.mesh", json.dumps(mesh))
    return path


def test_bodies_have_the_shape_of_the_model_and_differ_in_its_modes(tmp_path: Path) -> None:
    package = wheel(tmp_path / "model.whl")
    write_bodies(ShapeModelOptions(package, tmp_path / "bodies", count=3, modes=1))
    bodies = read_bodies(tmp_path / "bodies")
    assert [body.name for body in bodies] == ["body_000", "body_001", "body_002"]
    heights = [np.ptp(body.bone("femur").mesh.vertices[:, 2]) for body in bodies]
    assert heights[0] == pytest.approx(420, rel=0.03)  # smoothing rounds the ends
    assert len({round(height) for height in heights}) == 3
    for body in bodies:
        assert sorted(bone.name for bone in body.bones) == ["femur", "fibula", "patella", *["pelvis"] * 3, "tibia"]
        assert body.bone("fibula").mesh.vertices[:, 0].mean() > 20
        assert body.bone("patella").mesh.vertices[:, 1].mean() > 20
    write_bodies(ShapeModelOptions(package, tmp_path / "fewer", count=2, modes=1))
    for path in (tmp_path / "fewer").rglob("*.ply"):
        assert path.read_bytes() == (tmp_path / "bodies" / path.relative_to(tmp_path / "fewer")).read_bytes()


class _Command:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made_by_pickle",)


def test_a_package_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    harmful = wheel(tmp_path / "harmful.whl", pickle.dumps({"mean": _Command()}))
    (tmp_path / "other.whl").write_bytes(b"not a zip file")
    for path in (harmful, tmp_path / "other.whl", tmp_path / "none.whl"):
        with pytest.raises(UserError, match="not musculoskeletal-models"):
            write_bodies(ShapeModelOptions(path, tmp_path / "bodies"))
    assert not (tmp_path / "made_by_pickle").exists()
    assert not (tmp_path / "bodies").exists()
