"""A patient in front of the detector: posed bones of one or both legs, soft tissue, foot, implants, cast; the camera.

Everything before the camera is in the frame of `bodies`: x to the patient's right, y forward, z up, the knee at 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.phantoms.surfaces.bodies import Body, Bone
from pdrunet_jax.data.phantoms.surfaces.hardware import IMPLANTS, draw_implant
from pdrunet_jax.data.phantoms.surfaces.meshes import normals
from pdrunet_jax.data.phantoms.surfaces.raster import Camera, Points
from pdrunet_jax.data.phantoms.surfaces.shapes import Mesh
from pdrunet_jax.data.phantoms.surfaces.tissue import (
    Build,
    draw_build,
    foot_bones,
    foot_tissue,
    leg_tissue,
    spine,
    trunk_tissue,
)
from pdrunet_jax.data.phantoms.surfaces.views import (
    FRAMINGS,
    VIEWS,
    WITH_PELVIS,
    Projection,
    View,
    rotation,
    target_of,
    turn_of,
    views_of,
)


@dataclass(frozen=True)
class Placed:
    """A bone in the frame of the camera: u to the right, v down, height above the detector, in mm."""

    name: str
    """The class whose mask it belongs to; empty for bones without a mask."""
    part: str
    """As in `Bone`."""
    mesh: Mesh
    inner: Points | None
    """The inside of the cortex."""
    along: NDArray[np.float64] | None
    """Place of each vertex along a long bone, from 0 to 1; None for short and flat bones."""


@dataclass(frozen=True)
class Skin:
    """Soft tissue in the frame of the camera."""

    skin: Mesh
    fascia: Mesh
    """The inside of the fat."""
    group: int
    """0 and 1: the legs, whose tissues are apart; `TRUNK`: what both join."""


@dataclass
class Scene:
    """All that the X-rays pass through."""

    view: View
    projection: Projection
    side: str
    """right, left or both."""
    build: Build
    camera: Camera
    bones: list[Placed] = field(default_factory=list)
    skins: list[Skin] = field(default_factory=list)
    metal: list[tuple[str, Mesh]] = field(default_factory=list)
    casts: list[tuple[Mesh, Mesh]] = field(default_factory=list)
    """Outside and inside of each cast."""


@dataclass(frozen=True)
class Chances:
    """How often things are drawn that make a radiograph hard to read."""

    implant: float = 0.12
    cast: float = 0.05
    uneven: float = 1.0
    """Factor of what makes bones of one body differ: bumps, and narrow joint spaces."""


TRUNK = 2

Move = Callable[[Points], Points]


@dataclass
class _Leg:
    """A posed right leg, with what it carries."""

    moves: dict[str, Move]
    """Where the points of each class go."""
    joints: Points
    """(3, 3) hip, knee and ankle."""
    bones: list[Placed]
    skins: list[Skin]
    metal: list[tuple[str, Mesh]]
    casts: list[tuple[Mesh, Mesh]]


def draw_scene(
    body: Body, rng: np.random.Generator, size: int, chances: Chances, views: Sequence[View] = VIEWS
) -> Scene:
    """Draw a patient with the shape of `body`, a pose and a camera; the picture's longest side is `size` pixels.

    `views` are those to choose from; at least one must be in `views_of(body)`.
    """
    able = [view for view in views_of(body) if view in views]
    shares = np.array([FRAMINGS[view].share for view in able])
    view = able[int(rng.choice(len(able), p=shares / shares.sum()))]
    framing = FRAMINGS[view]
    projection: Projection = get_args(Projection)[int(rng.choice(3, p=framing.projections))]
    both = view in ("legs", "pelvis", "hip") or (view == "knee" and projection == "ap" and rng.random() < 0.2)
    growth = rng.uniform(0.88, 1.12) * np.array((*rng.uniform(0.93, 1.08, 2), 1.0))
    build = draw_build(rng)
    middle = float(body.middle * growth[0])

    # Both legs, and what is between them.
    flexion = _flexion(view, projection, rng)
    legs = [_draw_leg(body, rng, growth, build, flexion, view, chances)]
    if both:
        legs.append(_mirrored(_draw_leg(body, rng, growth, build, flexion, view, chances), middle))
    everything = _joined(legs)
    if view in WITH_PELVIS:
        _add_pelvis(everything, body, rng, growth, middle, build)

    # Only a picture of both legs shows both sides by right.
    side = "both" if both and view != "hip" else str(rng.choice(["right", "left"]))
    target = target_of(view, everything.joints, middle, both)
    if side == "left" or (side == "both" and rng.random() < 0.5):
        everything, target = _mirrored(everything, 0.0), target * (-1, 1, 1)
    turn = turn_of(projection, rng, both)
    camera, shift = _camera(everything, turn, target, view, both, rng, size)
    return _placed(everything, turn, shift, Scene(view, projection, side, build, camera))


def _flexion(view: View, projection: Projection, rng: np.random.Generator) -> float:
    """Flexion of the knee in degrees."""
    if view == "knee" and projection == "lateral":
        return float(min(abs(rng.normal(20, 28)), 110))
    return float(abs(rng.normal(0, 18 if projection == "lateral" else 5)))


def _draw_leg(
    body: Body,
    rng: np.random.Generator,
    growth: NDArray[np.float64],
    build: Build,
    flexion: float,
    view: View,
    chances: Chances,
) -> _Leg:
    """Draw a right leg in the frame of the body."""
    hip, ankle = body.hip * growth, body.ankle * growth
    knee = np.array((0.0, -4.0, -4.0))
    swing = rotation(rng.normal(0, 3), rng.normal(2, 3), rng.normal(0, 9))

    def at_hip(points: Points) -> Points:
        return np.asarray((points - hip) @ swing.T + hip)

    bent = rotation(-flexion, rng.normal(0, 3), rng.normal(0, 3))
    sunk = np.array((0, -0.06, -0.04)) * flexion  # a bent knee has it nearer to the femur
    worn = np.array((0, 0, chances.uneven * rng.uniform(0, 4) * (rng.random() < 0.3)))  # narrow joint space
    glide = rotation(-0.6 * flexion, rng.normal(0, 3), rng.normal(0, 3))

    def with_shin(points: Points) -> Points:
        return at_hip((points + worn - knee) @ bent.T + knee)

    def with_patella(points: Points) -> Points:
        return at_hip((points - knee) @ glide.T + knee + sunk)

    moves: dict[str, Move] = {"femur": at_hip, "patella": with_patella, "pelvis": lambda points: points}
    moves |= dict.fromkeys(("tibia", "fibula", "foot"), with_shin)

    # Bones: a patient's cortex is thinner or thicker than the body's.
    cortex = float(rng.uniform(0.6, 1.4))
    bumps = _bumps(rng, chances.uneven)
    placed = [
        _place(bone, _after(bumps, moves[bone.name]), growth, cortex)
        for bone in body.bones
        if bone.name != "pelvis" and bone.side != "left"
    ]
    joints = np.stack([at_hip(hip), at_hip(knee), with_shin(ankle)])
    points = np.concatenate([bone.mesh.vertices for bone in placed if bone.name != "foot"])
    with_trunk = view in WITH_PELVIS and "pelvis" in {bone.name for bone in body.bones}
    skin, fascia = leg_tissue(joints, points[:: max(1, len(points) // 1500)], build, rng, below_trunk=with_trunk)
    leg = _Leg(moves, joints, placed, [Skin(skin, fascia, 0)], [], [])
    if view in ("lower-leg", "ankle", "leg", "legs", "foot"):
        _add_foot(leg, body, rng, growth, build)
    if rng.random() < chances.implant:
        place = _place_of(view, hip, ankle)
        kinds = [kind for kind in IMPLANTS if kind != "hip" or view in ("hip", "pelvis", "leg", "legs", "thigh")]
        femur, tibia = (body.bone(name).mesh.vertices * growth for name in ("femur", "tibia"))
        kind = str(rng.choice(kinds))
        for metal, name, mesh in draw_implant(kind, femur, tibia, hip, rng, place):
            leg.metal.append((metal, Mesh(moves[name](mesh.vertices), mesh.faces)))
    if view in ("lower-leg", "ankle", "knee") and rng.random() < chances.cast:
        thick = rng.uniform(4, 10)
        leg.casts.append((Mesh(skin.vertices + thick * normals(skin), skin.faces), skin))
    return leg


def _bumps(rng: np.random.Generator, strength: float) -> Move:
    """A smooth displacement of at most a few mm: six waves of 25 to 150 mm."""
    lengths = rng.uniform(25, 150, 6)
    directions = rng.normal(size=(6, 3))
    waves = 2 * np.pi * (directions / np.linalg.norm(directions, axis=1)[:, None] / lengths[:, None]).T
    phases = rng.uniform(0, 2 * np.pi, 6)
    heights = strength * rng.normal(size=(6, 3)) * (lengths / 150)[:, None]
    return lambda points: np.asarray(points + np.sin(points @ waves + phases) @ heights)


def _after(first: Move, second: Move) -> Move:
    return lambda points: second(first(points))


def _place(bone: Bone, move: Move, growth: NDArray[np.float64], cortex: float, name: str | None = None) -> Placed:
    mesh = bone.mesh
    outer = Mesh(move(mesh.vertices * growth), mesh.faces)
    inner = move((mesh.vertices + cortex * bone.inward) * growth) if bone.part == "whole" else None
    return Placed(bone.name if name is None else name, bone.part, outer, inner, bone.along if bone.is_long else None)


def _unnamed(mesh: Mesh, move: Move, wall: float) -> Placed:
    """A bone without a mask, whose wall is `wall` mm thick."""
    inner = move(mesh.vertices - wall * normals(mesh))
    return Placed("", "whole", Mesh(move(mesh.vertices), mesh.faces), inner, None)


def _add_foot(leg: _Leg, body: Body, rng: np.random.Generator, growth: NDArray[np.float64], build: Build) -> None:
    """Add the foot: its own surfaces have masks, a foot made up has none."""
    ankle = body.ankle * growth
    tibia = body.bone("tibia").mesh.vertices * growth
    under = tibia[np.hypot(*(tibia - ankle)[:, :2].T) < 9]
    dome = np.array((ankle[0], ankle[1], under[:, 2].min() - 2.5))
    pointing = rotation(rng.uniform(-35, 5), rng.normal(0, 4), rng.normal(-6, 6))
    own = any(bone.name == "foot" for bone in body.bones)

    def move(points: Points) -> Points:
        return leg.moves["tibia"](points @ (np.eye(3) if own else pointing.T) * growth.mean() + dome)

    skin, fascia = (Mesh(move(mesh.vertices), mesh.faces) for mesh in foot_tissue(np.zeros(3), build))
    leg.skins.append(Skin(skin, fascia, 0))
    if not own:
        leg.bones += [_unnamed(mesh, move, float(rng.uniform(0.8, 1.4))) for mesh in foot_bones(rng)]


def _add_pelvis(
    legs: _Leg, body: Body, rng: np.random.Generator, growth: NDArray[np.float64], middle: float, build: Build
) -> None:
    """Add the pelvis, the trunk and the lumbar spine."""
    bones = [bone for bone in body.bones if bone.name == "pelvis"]
    if not bones:
        return
    cortex = float(rng.uniform(0.6, 1.2))
    legs.bones += [_place(bone, lambda points: points, growth, cortex) for bone in bones]
    points = np.concatenate([bone.mesh.vertices for bone in bones]) * growth
    femur, hip = body.bone("femur").mesh.vertices, body.hip
    hips = femur[np.abs(femur[:, 2] - hip[2]) < 50] * growth
    skin, fascia = trunk_tissue(points, hips, middle, build)
    legs.skins.append(Skin(skin, fascia, TRUNK))
    centre = points[np.abs(points[:, 0] - middle) < 25]
    top = centre[centre[:, 2] > centre[:, 2].max() - 12].mean(axis=0)
    legs.bones += [_unnamed(mesh, lambda points: points, 1.0) for mesh in spine(np.array((middle, *top[1:])), rng)]


def _mirrored(leg: _Leg, middle: float) -> _Leg:
    """The leg as its mirror image in the plane of x = `middle`: a left one of a right one."""
    offset = np.array((2 * middle, 0.0, 0.0))

    def points(values: Points) -> Points:
        return values * (-1, 1, 1) + offset

    def mesh(value: Mesh) -> Mesh:
        return Mesh(points(value.vertices), value.faces[:, ::-1])

    bones = [
        replace(bone, mesh=mesh(bone.mesh), inner=None if bone.inner is None else points(bone.inner))
        for bone in leg.bones
    ]
    skins = [Skin(mesh(skin.skin), mesh(skin.fascia), skin.group) for skin in leg.skins]
    metal = [(kind, mesh(part)) for kind, part in leg.metal]
    casts = [(mesh(outer), mesh(inner)) for outer, inner in leg.casts]
    return _Leg(leg.moves, points(leg.joints), bones, skins, metal, casts)


def _joined(legs: list[_Leg]) -> _Leg:
    """Both legs as one; their soft tissues are apart."""
    first = legs[0]
    for group, other in enumerate(legs[1:], start=1):
        first.bones += other.bones
        first.skins += [replace(skin, group=group) for skin in other.skins]
        first.metal += other.metal
        first.casts += other.casts
    return first


def _place_of(view: View, hip: Points, ankle: Points) -> float:
    """Height z of what a view shows of an unbent leg, where an implant is worth drawing."""
    places = {"thigh": 0.5 * hip[2], "hip": hip[2], "pelvis": hip[2], "lower-leg": 0.5 * ankle[2], "ankle": ankle[2]}
    return float(places.get(view, 20.0))


def _camera(
    leg: _Leg,
    turn: NDArray[np.float64],
    target: Points,
    view: View,
    both: bool,
    rng: np.random.Generator,
    size: int,
) -> tuple[Camera, Points]:
    """The camera, and how the turned patient (u, v, height) is shifted to lie just above the detector."""
    framing = FRAMINGS[view]
    height = rng.uniform(*framing.height)
    if view in ("leg", "legs"):
        height += float(np.linalg.norm(leg.joints[0] - leg.joints[2])) * 1.08
    aspect = rng.uniform(*framing.aspect)
    if both and view == "knee":
        aspect = rng.uniform(440, 540) / height
    upright = abs(turn[1, 2]) > 0.7  # v is down the leg
    tall, wide = (height, height * aspect) if upright else (height * aspect, height)
    pitch = max(tall, wide) / size
    shape = (max(16, round(tall / pitch)), max(16, round(wide / pitch)))
    lowest = min(float((skin.skin.vertices @ turn[2]).min()) for skin in leg.skins[:1])
    distance = rng.uniform(1800, 3000) if view in ("leg", "legs") else rng.uniform(950, 1400)
    at = turn @ target
    shift = np.array((-at[0], -at[1], rng.uniform(3, 35) - lowest))
    source = rng.normal(0, 20, 2)
    centre = rng.normal(0, 0.05, 2) * (wide, tall)
    return Camera(distance, (centre[0], centre[1]), (source[0], source[1]), pitch, shape), shift


def _placed(leg: _Leg, turn: NDArray[np.float64], shift: Points, scene: Scene) -> Scene:
    """Fill the scene with the leg, turned and shifted to the frame of the camera."""

    def points(values: Points) -> Points:
        return values @ turn.T + shift

    def mesh(value: Mesh) -> Mesh:
        return Mesh(points(value.vertices), value.faces[:, ::-1])  # v goes down: what was anticlockwise is clockwise

    scene.bones = [
        replace(bone, mesh=mesh(bone.mesh), inner=None if bone.inner is None else points(bone.inner))
        for bone in leg.bones
    ]
    scene.skins = [Skin(mesh(skin.skin), mesh(skin.fascia), skin.group) for skin in leg.skins]
    scene.metal = [(kind, mesh(part)) for kind, part in leg.metal]
    scene.casts = [(mesh(outer), mesh(inner)) for outer, inner in leg.casts]
    return scene
