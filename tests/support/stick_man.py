"""Surfaces of bones made of tubes and balls."""

from pathlib import Path

import numpy as np
import trimesh

from pdrunet_jax.data.phantoms.surfaces.bodies import Bone
from pdrunet_jax.data.phantoms.surfaces.shapes import Mesh, ball, ellipses, tube


def stick_man(side: str = "right") -> list[Bone]:
    """Bones of a leg and a pelvis, made of tubes and balls, in mm."""

    def shaft(x: float, low: float, high: float, radius: float) -> Mesh:
        path = np.column_stack([np.full(12, x), np.zeros(12), np.linspace(low, high, 12)])
        wide = radius * np.interp(np.linspace(0, 1, 12), (0, 0.15, 0.85, 1), (1.7, 1, 1, 1.5))
        return tube(path, ellipses(wide, wide, 24))

    sign = 1 if side == "right" else -1
    parts = [
        ("femur", shaft(0, 0, 420, 17), side),
        ("tibia", shaft(0, -380, -12, 15), side),
        ("fibula", shaft(38 * sign, -385, -30, 6), side),
        ("patella", ball(np.array((0, 40, 5.0)), (20, 9, 22)), side),
        ("pelvis", ball(np.array((-20.0 * sign, 0, 450)), (50, 30, 70)), side),
        ("pelvis", ball(np.array((-150.0 * sign, 0, 450)), (50, 30, 70)), "left" if side == "right" else "right"),
    ]
    return [Bone(name, mesh, of) for name, mesh, of in parts]


def write_bodies(folder: Path, count: int) -> Path:
    """Write the surfaces of `count` bodies of different sizes, body_0 and so on, as PLY files."""
    for number in range(count):
        (folder / f"body_{number}").mkdir(parents=True)
        for place, bone in enumerate(stick_man()):
            shape = trimesh.Trimesh(bone.mesh.vertices * (1 + 0.03 * number), bone.mesh.faces, process=False)
            shape.export(folder / f"body_{number}" / f"{bone.name}_{bone.side}_{place}.ply")
    return folder
