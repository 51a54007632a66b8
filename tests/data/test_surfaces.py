"""X-rays drawn from bone surfaces: exact path lengths, masks, and what is drawn, on bodies made of simple shapes."""

import csv
import operator
import tomllib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import inspect_dataset
from pdrunet_jax.data.phantoms.surfaces.bodies import Bone, make_body, read_bodies, surface_files
from pdrunet_jax.data.phantoms.surfaces.drawers import Drawers
from pdrunet_jax.data.phantoms.surfaces.drawing import CLASSES, Drawing, draw_xray
from pdrunet_jax.data.phantoms.surfaces.files import PRECEDENCE, SurfaceOptions, label_image, write_xrays
from pdrunet_jax.data.phantoms.surfaces.meshes import closed, half_thickness
from pdrunet_jax.data.phantoms.surfaces.physics import ENERGIES, MATERIALS, measured, primary, spectrum
from pdrunet_jax.data.phantoms.surfaces.raster import Camera, path_lengths
from pdrunet_jax.data.phantoms.surfaces.shapes import Mesh, ball, rod
from pdrunet_jax.data.phantoms.surfaces.variations import VARIATIONS
from pdrunet_jax.data.phantoms.surfaces.views import VIEWS
from pdrunet_jax.runtime.errors import DataError
from tests.support.stick_man import stick_man
from tests.support.tiny import run_command


def sphere(radius: float, centre: tuple[float, float, float], subdivisions: int = 4) -> Mesh:
    shape = trimesh.creation.icosphere(subdivisions, radius)
    return Mesh(np.asarray(shape.vertices, np.float64) + centre, np.asarray(shape.faces, np.int64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Surfaces of three bodies: a folder of STL files in metres, a glTF scene, and PLY files named for their body."""
    root = tmp_path_factory.mktemp("surfaces")
    (root / "first").mkdir()
    scene = trimesh.Scene()
    for number, bone in enumerate(stick_man("left")):
        shape = trimesh.Trimesh(bone.mesh.vertices, bone.mesh.faces, process=False)
        shape.copy().apply_scale(0.001).export(root / "first" / f"{bone.name}_{bone.side}_{number}.stl")
        shape.export(root / f"third_{bone.name}_{bone.side[0].upper()}.ply")
        scene.add_geometry(shape, node_name=f"X_{bone.name}_{bone.side[0].upper()}")
    scene.add_geometry(trimesh.creation.box((5, 5, 5)), node_name="X_condyle_of_femur_L")
    scene.export(root / "second_knee_L.glb")
    return root


def picture(mesh: Mesh, camera: Camera) -> np.ndarray:
    window, lengths = path_lengths(camera.project(mesh.vertices), mesh.faces, camera.shape)
    whole = np.zeros(camera.shape, np.float32)
    whole[window] = lengths
    return whole


def test_a_ray_through_a_sphere_is_as_long_as_its_chord() -> None:
    camera = Camera(1e6, (3.0, 5.0), (3.0, 5.0), 0.5, (130, 120))  # nearly parallel rays
    seen = picture(sphere(25, (3, 5, 40), 5), camera)
    rows, columns = np.mgrid[:130, :120]
    distance = np.hypot((columns - 59.5) * 0.5, (rows - 64.5) * 0.5)
    chord = 2 * np.sqrt(np.maximum(25**2 - distance**2, 0))
    assert np.abs(seen - chord)[distance < 23].max() < 0.1  # facets lie at most 0.02 mm inside
    clear = np.abs(distance - 25) > 0.1
    assert np.array_equal((seen > 0.02)[clear], (distance < 25)[clear])
    assert seen[distance > 25.1].max() < 1e-6


def test_path_lengths_in_perspective_are_those_of_every_single_ray() -> None:
    """A tetrahedron, against the rays cut by its four planes."""
    corners = np.array([[0, 0, 10], [30, 5, 20], [4, 28, 15], [11, 9, 60]], np.float64)
    mesh = Mesh(corners, np.array([[0, 1, 2], [0, 3, 1], [1, 3, 2], [2, 3, 0]])).outward()
    camera = Camera(400.0, (10.0, 12.0), (-5.0, 3.0), 0.7, (60, 70))
    fine = trimesh.Trimesh(mesh.vertices, mesh.faces).subdivide().subdivide().subdivide().subdivide()
    seen = picture(Mesh(np.asarray(fine.vertices), np.asarray(fine.faces, np.int64)), camera)
    source = np.array((-5.0, 3.0, 400.0))
    for row, column in ((20, 30), (30, 33), (35, 40), (25, 45), (5, 5)):
        pixel = np.array((10 + (column - 34.5) * 0.7, 12 + (row - 29.5) * 0.7, 0.0))
        way = (pixel - source) / np.linalg.norm(pixel - source)
        enter, leave = 0.0, np.inf
        for a, b, c in corners[mesh.faces]:
            normal = np.cross(b - a, c - a)
            across, rest = way @ normal, (a - source) @ normal
            enter, leave = (max(enter, rest / across), leave) if across < 0 else (enter, min(leave, rest / across))
        assert seen[row, column] == pytest.approx(max(leave - enter, 0), abs=0.02)
    assert seen.max() > 10


def test_parts_outside_the_picture_change_nothing() -> None:
    mesh = sphere(25, (0, 0, 40), 3)
    wide = picture(mesh, Camera(900.0, (0, 0), (0, 0), 0.5, (140, 140)))
    narrow = picture(mesh, Camera(900.0, (5, -5), (0, 0), 0.5, (60, 50)))
    assert np.allclose(wide[30:90, 55:105], narrow, atol=1e-4)
    assert not picture(mesh, Camera(900.0, (500, 0), (0, 0), 0.5, (20, 20))).any()


def test_shapes_are_closed_and_have_their_volume() -> None:
    assert ball(np.zeros(3), (3, 4, 5), rings=41).volume == pytest.approx(4 / 3 * np.pi * 60, rel=0.05)
    for way in ((10, 0, 0), (0, 10, 0), (0, 0, 10)):
        assert rod(np.zeros(3), np.array(way, np.float64), 1, 2).volume == pytest.approx(20 * np.pi, rel=0.06)
    mesh = sphere(10, (0, 0, 0), 3)
    same, holes = closed(mesh)
    assert holes == 0
    assert same.volume == pytest.approx(mesh.volume)
    for missing in (slice(5, None), slice(None, -40)):
        mended, holes = closed(Mesh(mesh.vertices, mesh.faces[missing][:, ::-1]))
        assert 0 < holes < 0.1
        assert mended.volume == pytest.approx(mesh.volume, rel=0.05)
    assert half_thickness(mesh) == pytest.approx(10, abs=1.5)


def test_attenuation_is_that_of_each_energy_summed() -> None:
    for peak in (45, 70, 100):
        shares = spectrum(peak, 3.0)
        assert shares.sum() == pytest.approx(1)
        assert not shares[np.array(ENERGIES) >= peak].any()
    lengths = {"muscle": np.full((1, 2), 120, np.float32), "bone": np.array([[0, 15]], np.float32)}
    expected = [
        sum(
            s * np.exp(-0.1 * (1.05 * 120 * m + 1.92 * b * length))
            for s, m, b in zip(spectrum(70, 3.0), MATERIALS["muscle"][1], MATERIALS["bone"][1], strict=True)
        )
        for length in (0, 15)
    ]
    assert primary(lengths, spectrum(70, 3.0))[0] == pytest.approx(expected, rel=1e-4)


def test_noise_is_poissons() -> None:
    signal = np.full((128, 128), 0.25, np.float32)
    for grain in (0.0, 1.0):
        seen = measured(signal, np.random.default_rng(0), scatter=0.2, spread=20, blur=0.5, grain=grain, quanta=1000)
        assert seen.mean() == pytest.approx(0.25, rel=0.01)
        assert seen.std() == pytest.approx(np.sqrt(0.25 / 1000), rel=0.15)


def test_bodies_are_the_same_from_every_format_unit_and_frame(folder: Path) -> None:
    bodies = read_bodies(folder)
    assert [body.name for body in bodies] == ["first", "second", "third"]
    for body in bodies:
        assert sorted(bone.name for bone in body.bones) == [
            "femur", "fibula", "patella", "pelvis", "pelvis", "tibia",
        ]  # fmt: skip
        for name, height in (("femur", 420), ("tibia", 368), ("patella", 44)):
            assert np.ptp(body.bone(name).mesh.vertices[:, 2]) == pytest.approx(height, rel=0.02)
        assert body.bone("fibula").mesh.vertices[:, 0].mean() > 25  # a right leg, though drawn as a left one
        assert body.bone("patella").mesh.vertices[:, 1].mean() > 25
        assert all(bone.mesh.volume > 0 for bone in body.bones)
        wall = np.linalg.norm(body.bone("femur").inward, axis=1)
        assert 5 < np.median(wall[np.abs(body.bone("femur").along - 0.5) < 0.2]) < 9
        assert wall.min() > 0.3
    turned = [
        Bone(bone.name, Mesh(bone.mesh.vertices[:, [1, 2, 0]] * 0.1 + 7, bone.mesh.faces), bone.side)
        for bone in stick_man()
    ]
    straight, other = make_body("a", stick_man()), make_body("b", turned)
    for one, two in zip(straight.bones, other.bones, strict=True):
        assert np.allclose(one.mesh.vertices, two.mesh.vertices, atol=0.01)


def test_surfaces_that_cannot_serve_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken_femur.glb").write_bytes(b"glTF" + bytes(40))
    femur = stick_man()[0].mesh
    half = trimesh.Trimesh(femur.vertices, femur.faces[: len(femur.faces) // 2], process=False)
    (tmp_path / "half").mkdir()
    half.export(tmp_path / "half" / "femur_L.stl")
    (tmp_path / "short").mkdir()
    trimesh.Trimesh(femur.vertices, femur.faces).export(tmp_path / "short" / "femur_L.stl")
    with pytest.raises(DataError) as error:
        read_bodies(tmp_path)
    message = str(error.value)
    assert "broken_femur.glb: cannot be read as a surface" in message
    assert "is not closed (" in message
    assert "body short: no tibia and no patella" in message


def test_surfaces_are_found_in_linked_folders(tmp_path: Path) -> None:
    for name in ("elsewhere", "surfaces"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "femur_L.stl").touch()
    (tmp_path / "surfaces" / "body [1]").symlink_to(tmp_path / "elsewhere")
    assert surface_files(tmp_path / "surfaces") == [tmp_path / "surfaces" / "body [1]" / "femur_L.stl"]


@pytest.fixture(scope="module")
def drawings(folder: Path) -> list[Drawing]:
    bodies = read_bodies(folder)
    return [draw_xray(bodies, index, seed=5, size=72, difficulty="hard") for index in range(90)]


def test_everything_is_drawn_at_least_once(drawings: list[Drawing]) -> None:
    assert {drawing.view for drawing in drawings} == set(VIEWS) - {"foot"}
    drawn = {trait for drawing in drawings for trait in drawing.traits}
    kinds = "ap lateral oblique right left both implant cast collimated shutter marker ruler ball stitched grid text"
    assert drawn >= {*kinds.split(), "film", "plain", "enhanced", "flat", "inverted", "16-bit", "jpeg"}
    assert {name for drawing in drawings for name in drawing.masks} == set(CLASSES) - {"foot"}
    for drawing in drawings:
        assert max(drawing.image.shape) == 72
        assert drawing.image.dtype == (np.uint16 if "16-bit" in drawing.traits else np.uint8)
        assert all(mask.shape == drawing.image.shape and mask.any() for mask in drawing.masks.values())
    shown = [drawing for drawing in drawings if drawing.masks]
    assert len(shown) > 0.97 * len(drawings)


def test_a_drawing_depends_on_seed_and_number_alone(folder: Path, drawings: list[Drawing]) -> None:
    bodies = read_bodies(folder)
    for index in (40, 3):
        again = draw_xray(bodies, index, seed=5, size=72, difficulty="hard")
        assert np.array_equal(again.image, drawings[index].image)
        assert all(np.array_equal(again.masks[name], mask) for name, mask in drawings[index].masks.items())
        assert again.traits == drawings[index].traits
    assert draw_xray(bodies, 3, seed=6, size=72, difficulty="hard").traits != drawings[3].traits


def test_each_variation_can_be_left_out(folder: Path) -> None:
    bodies = read_bodies(folder)
    hard: dict[str, Any] = {"size": 48, "difficulty": "hard", "views": ("knee", "legs")}
    usual = [draw_xray(bodies, index, **hard) for index in range(14)]
    gone = {
        "implants": {"implant", "cast"},
        "collimation": {"collimated", "shutter"},
        "objects": {"marker", "ruler", "ball", "cushion", "text"},
        "exposure": {"inverted", "jpeg", "16-bit", "grid", "film", "plain", "enhanced", "flat"},
        "seams": {"stitched"},
    }
    for name in VARIATIONS:
        without = [draw_xray(bodies, index, **hard, without=(name,)) for index in range(14)]
        changed = [not np.array_equal(first.image, then.image) for first, then in zip(usual, without, strict=True)]
        assert any(changed), name
        seen = {trait for drawing in usual for trait in drawing.traits}
        assert seen & gone.get(name, seen), name
        assert not {trait for drawing in without for trait in drawing.traits} & gone.get(name, set()), name
        # What is no matter of geometry moves no bone.
        if name in ("cortex", "soft-tissue", "noise", "exposure"):
            assert all(
                np.array_equal(first.masks[bone], then.masks[bone])
                for first, then in zip(usual, without, strict=True)
                if first.view == "knee"
                for bone in first.masks
            ), name
    alike = draw_xray(bodies, 0, size=48, without=VARIATIONS)
    assert np.array_equal(alike.image, draw_xray(bodies, 0, size=48, without=VARIATIONS[::-1]).image)
    assert set(alike.traits) <= {"ap", "lateral", "oblique", "right", "left", "both"}


def test_the_fibula_is_on_the_outer_side_of_either_leg(folder: Path) -> None:
    bodies, sides = read_bodies(folder), set()
    for index in range(24):
        drawing = draw_xray(bodies, index, size=64, views=("lower-leg",))
        if drawing.traits[0] != "ap" or not {"tibia", "fibula"} <= drawing.masks.keys():
            continue
        tibia, fibula = (np.argwhere(drawing.masks[name]).mean(axis=0) for name in ("tibia", "fibula"))
        apart = fibula - tibia
        if np.hypot(*apart) > 3 and abs(apart[1]) > 2 * abs(apart[0]):
            sides.add((drawing.traits[1], apart[1] < 0))
    assert {side for side, _ in sides} == {"right", "left"}


def test_bones_that_share_pixels_have_an_order() -> None:
    assert sorted(PRECEDENCE) == sorted(CLASSES)
    left, right = np.array([[1, 1, 0]], bool), np.array([[0, 1, 1]], bool)
    labels = label_image({"patella": left, "femur": right}, ("femur", "patella"), (1, 3))
    assert labels.tolist() == [[2, 2, 1]]
    assert label_image({"tibia": left, "fibula": right}, ("tibia", "fibula"), (1, 3)).tolist() == [[1, 1, 2]]


def test_the_command_writes_every_layout(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    common = ["--surfaces", folder, "--count", "14", "--size", "48", "--seed", "2"]
    for name, options in (("one", []), ("bones", ["--by-bone"]), ("layers", ["--layers"])):
        result = run("phantom", tmp_path / name, *common, *options)
        assert result.returncode == 0, result.stderr
        assert "3 bodies: first, second, third" in result.stdout
    for name, classes in (("one", {"bone"}), ("bones", set(CLASSES) - {"foot"}), ("layers", set(CLASSES) - {"foot"})):
        config = DataConfig(root=str(tmp_path / name), threads=1, multilabel=name == "layers")
        dataset = inspect_dataset(config).dataset
        assert set(dataset.class_names[-len(classes) :]) == classes
        assert len(dataset.samples) == 14
        splits = {(Path(sample.id).stem, sample.split) for sample in dataset.samples}
        if name == "one":
            expected = splits
        assert splits == expected
    # The union of the layers is the mask of bone, and the label image has the same pixels.
    bone = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "one" / "masks").iterdir()}
    for stem, mask in bone.items():
        layers = [np.asarray(Image.open(path)) for path in (tmp_path / "layers").glob(f"*/masks/*/{stem}.png")]
        assert np.array_equal(np.maximum.reduce(layers), mask)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "bones" / "masks" / f"{stem}.png")) > 0, mask > 0)
    with (tmp_path / "one" / "drawn.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).stem for row in rows] == [f"xray_{index:05d}" for index in range(14)]
    assert "attribution" in tomllib.loads((tmp_path / "one" / "dataset.toml").read_text(encoding="utf-8"))["licence"]
    # Fewer of them are the same ones.
    assert run("phantom", tmp_path / "few", *common[:2], "--count", "2", *common[4:]).returncode == 0
    for path in (tmp_path / "few" / "images").iterdir():
        assert path.read_bytes() == (tmp_path / "one" / "images" / path.name).read_bytes()


def test_processes_write_the_folder_that_one_process_writes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--surfaces", folder, "--count", 34, "--seed", 5, "--size", 32)
    drawn = run_command("data", "phantom", "several", *given, cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    monkeypatch.setattr("pdrunet_jax.data.phantoms.surfaces.files._FEW", 35)
    write_xrays(tmp_path / "one", SurfaceOptions(34, 5, 32, surfaces=folder))
    several, one = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "several", tmp_path / "one")
    )
    assert len(one) == 2 * 34 + 3
    assert several == one


def test_what_fails_in_a_process_that_draws_is_raised_where_it_was_asked_for() -> None:
    with closing(Drawers(operator.truediv, 1)) as divide:
        assert divide(3, 2) == 1.5
        with pytest.raises(ZeroDivisionError):
            divide(3, 0)
        assert divide(1, 2) == 0.5


def test_options_that_do_not_go_together_are_refused(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    for options, problem in (
        (["--layers"], "need --surfaces"),
        (["--without", "noise"], "need --surfaces"),
        (["--surfaces", folder, "--layers", "--by-bone"], "choose one"),
        (["--surfaces", tmp_path / "none"], "no such folder"),
        (["--surfaces", folder, "--views", "foot"], "has no bones for any of them"),
        (["--surfaces", folder, "--count", "0"], "at least one"),
    ):
        result = run("phantom", tmp_path / "out", *options)
        assert result.returncode == 2
        assert problem in result.stderr
        assert not (tmp_path / "out").exists()
