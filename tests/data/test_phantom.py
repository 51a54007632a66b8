import csv
import hashlib
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.images import read_image, read_spacing
from pdrunet_jax.data.importers.labelme import ImportLabelme, import_labelme
from pdrunet_jax.data.labelme.write import labelme_text
from pdrunet_jax.data.masks import read_mask
from pdrunet_jax.data.phantoms.anatomy import BONES
from pdrunet_jax.data.phantoms.files import PhantomOptions, write_phantoms
from pdrunet_jax.data.phantoms.phantom import Difficulty, Phantom, draw
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.train.final import threshold_dice
from tests.support.dicom_phantom import save_dicom


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [draw(index, size=128) for index in range(40)]


def manifest(root: Path) -> list[dict[str, str]]:
    with (root / "manifest.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / max(first.sum() + second.sum(), 1))


def otsu(image: np.ndarray) -> int:
    share = np.bincount(image.ravel(), minlength=256) / image.size
    below, moment = share.cumsum(), (share * np.arange(256)).cumsum()
    spread = (moment[-1] * below - moment) ** 2 / np.maximum(below * (1 - below), 1e-12)
    return int(spread.argmax())


def test_the_same_arguments_give_the_same_bits_in_any_order(phantoms: list[Phantom]) -> None:
    for index in (7, 2, 39):
        again = draw(index, size=128)
        assert np.array_equal(again.image, phantoms[index].image)
        assert np.array_equal(again.mask, phantoms[index].mask)
        assert again.patient == phantoms[index].patient


def test_seeds_and_indices_give_different_pictures(phantoms: list[Phantom]) -> None:
    assert not np.array_equal(draw(0, seed=1, size=128).image, phantoms[0].image)
    assert len({phantom.image.tobytes() for phantom in phantoms}) == len(phantoms)


def test_images_and_masks_have_the_declared_form(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        assert phantom.image.shape == phantom.mask.shape == (128, 128)
        assert phantom.image.dtype == phantom.mask.dtype == np.uint8
        assert set(np.unique(phantom.mask)) == {0, 1}
        assert 0.02 < phantom.mask.mean() < 0.4
        assert phantom.image.std() > 5


def test_a_scene_is_the_same_at_every_size() -> None:
    for index in range(6):
        small, large = draw(index, size=96), draw(index, size=192)
        assert dice(small.mask > 0, large.mask[::2, ::2] > 0) > 0.9
        shrunk = np.asarray(Image.fromarray(large.image).resize((96, 96), Image.Resampling.BOX), float)
        assert np.corrcoef(shrunk.ravel(), small.image.ravel())[0, 1] > 0.97


def test_two_of_three_pictures_share_a_patient(phantoms: list[Phantom]) -> None:
    patients = [phantom.patient for phantom in phantoms[:6]]
    assert patients[0] == patients[1]
    assert patients[3] == patients[4]
    assert len(set(patients)) == 4


def test_no_threshold_finds_the_bones(phantoms: list[Phantom]) -> None:
    images, masks = [phantom.image for phantom in phantoms], [phantom.mask for phantom in phantoms]
    assert threshold_dice(images, masks) < 0.5
    bright = [dice(image > otsu(image), mask > 0) for image, mask in zip(images, masks, strict=True)]
    dark = [dice(image <= otsu(image), mask > 0) for image, mask in zip(images, masks, strict=True)]
    assert max(np.mean(bright), np.mean(dark)) < 0.5


def test_bones_stand_out_from_their_surroundings(phantoms: list[Phantom]) -> None:
    """Just inside its outline nearly every bone is brighter than just outside: there is something to learn."""
    visible = []
    for phantom in phantoms:
        bone = phantom.mask > 0
        inside = bone & ~ndimage.binary_erosion(bone, iterations=3, border_value=1)
        outside = ndimage.binary_dilation(bone, iterations=4) & ~ndimage.binary_dilation(bone)
        visible.append(np.median(phantom.image[inside]) > np.median(phantom.image[outside]) + 3)
    assert np.mean(visible) >= 0.9


def test_threshold_dice_is_the_best_over_both_sides() -> None:
    image = np.array([[10, 10, 200, 250]], np.uint8)
    assert threshold_dice([image], [np.array([[0, 0, 1, 1]], np.uint8)]) == 1
    assert threshold_dice([image], [np.array([[1, 1, 0, 0]], np.uint8)]) == 1
    assert threshold_dice([image], [np.array([[0, 0, 1, 0]], np.uint8)]) == pytest.approx(2 / 3)
    opposite = [np.array([[10, 10, 250, 250]], np.uint8), np.array([[250, 250, 10, 10]], np.uint8)]
    masks = [np.array([[0, 0, 1, 1]], np.uint8)] * 2
    assert threshold_dice(opposite, masks) == pytest.approx(2 / 3)  # only "everything" serves both


def test_a_dataset_folder_holds_what_was_drawn(tmp_path: Path) -> None:
    root = tmp_path / "new" / "phantoms"
    write_phantoms(root, PhantomOptions(9, seed=3, size=48))
    rows = manifest(root)
    assert len(rows) == 9
    for index, row in enumerate(rows):
        phantom = draw(index, seed=3, size=48)
        assert np.array_equal(np.asarray(Image.open(root / row["image"])), phantom.image)
        assert np.array_equal(np.asarray(Image.open(root / row["mask"])), phantom.mask * 255)
        assert row["patient"] == phantom.patient
    declared = tomllib.loads((root / "dataset.toml").read_text(encoding="utf-8"))
    assert declared["classes"] == {"bone": 255}
    assert sorted(path.name for path in root.iterdir()) == ["dataset.toml", "images", "manifest.csv", "masks"]
    assert [path.name for path in root.parent.iterdir()] == ["phantoms"]


def test_splits_part_patients_three_to_one_to_one(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "phantoms", PhantomOptions(45, size=32))
    splits: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for row in manifest(tmp_path / "phantoms"):
        splits[row["split"]].add(row["patient"])
    assert [len(patients) for patients in splits.values()] == [18, 6, 6]
    assert len(set.union(*splits.values())) == 30


@pytest.mark.parametrize(("count", "size", "problem"), [(0, 64, "at least one"), (3, 16, "at least 32")])
def test_nothing_sensible_to_draw_is_refused(tmp_path: Path, count: int, size: int, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        write_phantoms(tmp_path / "phantoms", PhantomOptions(count, size=size))


def test_an_empty_folder_is_filled_and_a_full_one_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "phantoms"
    root.mkdir()
    write_phantoms(root, PhantomOptions(1, size=32))
    before = (root / "manifest.csv").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        write_phantoms(root, PhantomOptions(2, size=32))
    assert (root / "manifest.csv").read_bytes() == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_drawing_leaves_no_dataset(tmp_path: Path, how: signal.Signals) -> None:
    root = tmp_path / "phantoms"
    script = "import signal, sys, pathlib\nfrom pdrunet_jax.data.phantoms.files import PhantomOptions, write_phantoms\n"
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
    script += "write_phantoms(pathlib.Path(sys.argv[1]), PhantomOptions(10**5, size=32))"
    with subprocess.Popen([sys.executable, "-c", script, str(root)], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".phantoms-*/dataset/masks/*.png")):
            assert time.monotonic() < deadline, "nothing was drawn"
            time.sleep(0.02)
        process.send_signal(how)
        assert process.wait(timeout=60) != 0
    assert not root.exists()
    if how is signal.SIGINT:  # it could tidy up
        assert list(tmp_path.iterdir()) == []
    write_phantoms(root, PhantomOptions(1, size=32))
    assert len(manifest(root)) == 1


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="phantoms cannot be written to"):
        write_phantoms(tmp_path / "file" / "phantoms", PhantomOptions(1, size=32))


def test_the_phantoms_of_the_shipped_configuration_are_still_these() -> None:
    """The README states scores that were reached on them."""
    digest = hashlib.sha256()
    for index in range(12):
        phantom = draw(index, size=96)
        digest.update(phantom.mask.tobytes())
        digest.update((phantom.image // 16).tobytes())  # libraries may round the last bits their own way
    assert digest.hexdigest() == "d59fc714e7f8fd3a5d2d50713340ffd8bbed2a9fa9f44d6266ec4f91d3e3fc02"


def test_bones_have_names_and_every_bone_is_seen(phantoms: list[Phantom]) -> None:
    seen = {BONES[value - 1] for phantom in phantoms for value in np.unique(phantom.bones) if value}
    assert seen == set(BONES)
    for phantom in phantoms:
        assert np.array_equal(phantom.bones > 0, phantom.mask > 0)
        names = {BONES[value - 1] for value in np.unique(phantom.bones) if value}
        assert names <= {"femur", "tibia", "fibula"} or names <= {"humerus", "radius", "ulna"}


def test_levels_differ_in_how_well_bones_stand_out() -> None:
    def contrast(difficulty: Difficulty) -> float:
        """Median over pictures: bone less its surroundings, in standard deviations of the grain."""
        values = []
        for index in range(16):
            phantom = draw(index, size=96, difficulty=difficulty)
            bone = phantom.mask > 0
            around = ndimage.binary_dilation(bone, iterations=4) & ~ndimage.binary_dilation(bone)
            image = phantom.brightness
            grain = np.median(np.abs(image - ndimage.median_filter(image, 3))) + 1e-3
            values.append((image[bone].mean() - image[around].mean()) / grain)
        return float(np.median(values))

    easy, standard, hard = (contrast(level) for level in ("easy", "standard", "hard"))
    assert easy > 1.15 * standard
    assert standard > 1.3 * hard


@pytest.mark.parametrize("suffix", ["png", "dcm"])
def test_phantoms_come_back_through_the_labelme_importer(tmp_path: Path, suffix: str) -> None:
    for name in ("images", "annotations"):
        (tmp_path / "drawn" / name).mkdir(parents=True)
    for index in range(9):
        phantom, image = draw(index, size=96), f"images/{index}.{suffix}"
        if suffix == "png":
            Image.fromarray(phantom.image).save(tmp_path / "drawn" / image)
        else:
            save_dicom(phantom, index, 300 / 96, tmp_path / "drawn" / image)
        text = labelme_text(phantom.bones, BONES, f"../{image}")
        (tmp_path / "drawn" / "annotations" / f"{index}.json").write_text(text)
    classes = {name: value for value, name in enumerate(BONES, start=1)}
    import_labelme(ImportLabelme(tmp_path / "drawn", tmp_path / "data", classes=classes))
    dataset = open_dataset(DataConfig(root=str(tmp_path / "data"), threads=1))
    assert len(dataset.samples) == 9
    for index, sample in enumerate(dataset.samples):
        phantom = draw(index, size=96)
        read = np.array([0, *(classes[name] for name in dataset.class_names)])[read_mask(sample.mask, dataset.coding)]
        assert dice(read > 0, phantom.bones > 0) > 0.985
        assert (read == phantom.bones).mean() > 0.99
        seen = read_image(sample.image)[:, :, 0].astype(float)
        assert np.abs(seen - phantom.brightness * 255).max() < (1.01 if suffix == "png" else 0.1) or index % 5 == 4
        if suffix == "dcm":
            assert read_spacing(sample.image) == (300 / 96, 300 / 96)


def test_the_command_draws_every_kind(run: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--count", "5", "--size", "64", "--difficulty", "hard", "--by-bone"]
    assert run("phantom", tmp_path / "p", *options).returncode == 0
    assert "femur" in run("check", tmp_path / "p").stdout
    again = run("phantom", tmp_path / "p", *options)
    assert again.returncode == 2
    assert "not empty" in again.stderr
