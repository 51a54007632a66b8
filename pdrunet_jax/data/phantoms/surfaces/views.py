"""Views of radiography: how often each is taken, from where, and how it is framed."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.phantoms.surfaces.bodies import Body
from pdrunet_jax.data.phantoms.surfaces.raster import Points

View = Literal["knee", "lower-leg", "thigh", "leg", "legs", "ankle", "hip", "pelvis", "foot"]
VIEWS: tuple[View, ...] = get_args(View)
WITH_PELVIS = ("thigh", "leg", "legs", "hip", "pelvis")
"""Views that may show the pelvis."""
Projection = Literal["ap", "lateral", "oblique"]


@dataclass(frozen=True)
class Framing:
    """How pictures of a view are framed."""

    share: float
    """How often it is drawn, of the views that a body's bones allow."""
    height: tuple[float, float]
    """Least and largest height of the field in mm; for leg and legs, of what is added to the length of the leg."""
    aspect: tuple[float, float]
    """Least and largest width of the field relative to its height."""
    projections: tuple[float, float, float]
    """How often it is taken from the front, from the side and obliquely."""
    needs: str = "femur"
    """The bone without which there is no such view."""


FRAMINGS: dict[View, Framing] = {
    "knee": Framing(0.36, (200, 380), (0.55, 1.1), (0.5, 0.32, 0.18)),
    "lower-leg": Framing(0.12, (330, 470), (0.35, 1.0), (0.55, 0.35, 0.1)),
    "thigh": Framing(0.08, (330, 470), (0.4, 1.0), (0.55, 0.35, 0.1)),
    "leg": Framing(0.12, (-120, 120), (0.25, 0.45), (0.85, 0.15, 0.0)),
    "legs": Framing(0.16, (20, 200), (0.38, 0.52), (1.0, 0.0, 0.0)),
    "ankle": Framing(0.06, (180, 300), (0.6, 1.1), (0.5, 0.35, 0.15)),
    "hip": Framing(0.05, (240, 380), (0.7, 1.2), (0.85, 0.0, 0.15), "pelvis"),
    "pelvis": Framing(0.04, (320, 420), (1.05, 1.35), (1.0, 0.0, 0.0), "pelvis"),
    "foot": Framing(0.01, (220, 320), (0.7, 1.2), (0.2, 0.5, 0.3), "foot"),
}


def views_of(body: Body) -> list[View]:
    """The views that the bones of a body allow."""
    names = {bone.name for bone in body.bones}
    return [view for view in VIEWS if FRAMINGS[view].needs in names]


def target_of(view: View, joints: Points, middle: float, both: bool) -> Points:
    """(3,) The point that is in the middle of the picture, but for chance."""
    hip, knee, ankle = joints
    between = np.array((middle, 0.0, 0.0))
    across = np.array((0.0, 1.0, 1.0))
    targets = {
        "knee": knee,
        "thigh": (hip + knee) / 2,
        "lower-leg": 0.4 * knee + 0.6 * ankle,
        "ankle": ankle,
        "leg": (hip + ankle) / 2,
        "legs": (hip + ankle) / 2,
        "hip": hip + np.array((-15, 0, -10)),
        "pelvis": hip + np.array((0, 0, 35)),
        "foot": ankle + np.array((0, 50, -35)),
    }
    target = targets[view]
    return np.asarray(target * across + between if both and view != "hip" else target)


def turn_of(projection: Projection, rng: np.random.Generator, both: bool) -> NDArray[np.float64]:
    """(3, 3) Turns the patient towards the source: the frame of the body to u, v and height."""
    about = {
        "ap": rng.normal(0, 4 if both else 7) + 180 * (rng.random() < 0.12),
        "lateral": rng.choice([-90, 90]) + rng.normal(0, 5),
        "oblique": rng.choice([-1, 1]) * rng.uniform(25, 65),
    }[projection]
    to_camera = np.array([[-1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    tilted = rotation(rng.normal(0, 4), 0, 0) @ rotation(0, 0, about)
    chance = rng.random()
    roll = rng.normal(0, 5) if chance < 0.86 or both else rng.choice([-90, 90, 180]) + rng.normal(0, 5)
    roll = rng.uniform(-180, 180) if chance > 0.96 and not both else roll
    return np.asarray(rotation(0, 0, roll) @ to_camera @ tilted)


def rotation(x: float, y: float, z: float) -> NDArray[np.float64]:
    """(3, 3) Rotation by degrees about x, then y, then z."""
    (sx, sy, sz), (cx, cy, cz) = np.sin(np.radians((x, y, z))), np.cos(np.radians((x, y, z)))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)
