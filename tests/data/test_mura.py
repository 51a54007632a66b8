"""MURA's folders with masks from elsewhere become a dataset in which no patient is in two splits."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.importers.mura import ImportMura, import_mura
from pdrunet_jax.data.masks import read_mask
from pdrunet_jax.runtime.errors import DataError, UserError
from tests.support.labelme_files import annotate, box, shape
from tests.support.small_data import SIZE, config, noise, save, shapes

HUMERUS = ("XR_HUMERUS",)
PATHS = [
    *(f"train/XR_HUMERUS/patient{n:05}/study1_{f}/image{i}" for n in range(8) for i, f in ((1, "positive"),)),
    "train/XR_HUMERUS/patient00000/study1_positive/image2",
    "train/XR_HUMERUS/patient00000/study2_negative/image1",
    "train/XR_FOREARM/patient00000/study1_positive/image1",
    "valid/XR_HUMERUS/patient11185/study1_negative/image1",
    "valid/XR_HUMERUS/patient11186/study1_positive/image1",
]


def odd(index: int) -> Image.Image:
    """An X-ray in one of the modes that MURA has."""
    pixels = noise(index)
    if index % 5 == 0:
        return Image.fromarray(pixels.astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(("L", "RGB", "RGBA", "P")[index % 4])


@pytest.fixture
def mura(tmp_path: Path) -> Path:
    """A tree like MURA's, with what systems leave behind."""
    root = tmp_path / "download" / "MURA-v1.1"
    for index, path in enumerate(PATHS):
        save(odd(index), root / f"{path}.png")
    (root / "train" / "XR_HUMERUS" / "patient00003" / "study1_positive" / "._image1.png").write_bytes(b"\x00\x05")
    (root / "train.csv").write_text("MURA-v1.1/train/XR_HUMERUS/patient00000/study1_positive/,1\n")
    return root


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A mask image for every humerus, in folders as MURA's."""
    for index, path in enumerate(PATHS):
        if "HUMERUS" in path:
            save((shapes(index) > 0).astype(np.uint8) * 255, tmp_path / "masks" / f"{path}.png")
    return tmp_path / "masks"


def rows(target: Path) -> dict[str, dict[str, str]]:
    """The manifest, by MURA's path."""
    with (target / "manifest.csv").open(newline="") as file:
        return {row["image"].split("MURA-v1.1/")[1].removesuffix(".png"): row for row in csv.DictReader(file)}


def refused(mura: Path, masks: Path, **options: Any) -> str:
    target = mura.parent.parent / "target"
    with pytest.raises(DataError) as caught:
        import_mura(ImportMura(mura, target, masks, HUMERUS, **options))
    assert not target.exists()
    assert not list(target.parent.glob(".target-*"))
    return str(caught.value)


@pytest.mark.parametrize("root", ["download/MURA-v1.1", "download"])
def test_muras_own_split_is_kept_by_patient(mura: Path, drawn: Path, root: str, tmp_path: Path) -> None:
    drawn = drawn.rename(mura.parent / "masks")  # which looks like another MURA
    notes = import_mura(ImportMura(tmp_path / root, tmp_path / "target", drawn, HUMERUS, val_fraction=0.25))
    found = rows(tmp_path / "target")
    assert found.keys() == {path for path in PATHS if "HUMERUS" in path}
    patients = {
        split: {row["patient"] for row in found.values() if row["split"] == split} for split in ("train", "val", "test")
    }
    assert patients["test"] == {"patient11185", "patient11186"}
    assert len(patients["val"]) == 2
    assert patients["train"] | patients["val"] == {f"patient{n:05}" for n in range(8)}
    assert not patients["train"] & patients["val"]
    assert any(note.endswith("2 images of 2 patients in test") for note in notes)


def test_images_stay_where_they_are_and_every_mode_reads(mura: Path, drawn: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in mura.rglob("*")}
    import_mura(ImportMura(mura, tmp_path / "target", drawn, HUMERUS))
    assert {path: path.stat().st_mtime_ns for path in mura.rglob("*")} == before
    assert {path.name for path in (tmp_path / "target").iterdir()} == {"manifest.csv", "dataset.toml", "masks"}
    dataset = open_dataset(config(tmp_path / "target"))
    assert (dataset.name, len(dataset.samples)) == ("mura_humerus", len(PATHS) - 1)
    modes = set()
    for sample in dataset.samples:
        index = PATHS.index(sample.id.split("MURA-v1.1/")[1].removesuffix(".png"))
        with Image.open(sample.image) as file:
            modes.add(file.mode)
        image = read_image(sample.image)[:, :, 0].astype(float)
        assert np.corrcoef(image.ravel(), noise(index).ravel())[0, 1] > 0.99
        assert (read_mask(sample.mask, dataset.coding) == (shapes(index) > 0)).all()
    assert modes == {"L", "RGB", "RGBA", "P", "I;16"}


@pytest.mark.parametrize(
    "rename",
    [
        lambda path: path,
        lambda path: f"MURA-v1.1/{path}_mask",
        lambda path: path.removeprefix("train/").removeprefix("valid/"),
        lambda path: path.replace("/", "_"),
        lambda path: path.replace("/", "-") + "_seg",
        lambda path: path.split("HUMERUS/")[1].replace("/", "_"),
        lambda path: path.split("HUMERUS/")[1].replace("_positive", "").replace("_negative", "").replace("/", "."),
    ],
)
def test_masks_go_by_muras_paths_in_folders_or_in_one_name(mura: Path, tmp_path: Path, rename: Any) -> None:
    for index, path in enumerate(PATHS):
        if "HUMERUS" in path:
            save((shapes(index) > 0).astype(np.uint8), tmp_path / "masks" / (rename(path) + ".png"))
    import_mura(ImportMura(mura, tmp_path / "target", tmp_path / "masks", HUMERUS))
    for path, row in rows(tmp_path / "target").items():
        written = np.array(Image.open(tmp_path / "target" / row["mask"]))
        assert (written == (shapes(PATHS.index(path)) > 0)).all()


def test_labelme_files_beside_the_images_are_the_masks(mura: Path, tmp_path: Path) -> None:
    for path in (PATHS[0], PATHS[1], PATHS[-1]):
        annotate(mura / f"{path}.json", "image1.png", [shape("humerus", box(2, 3, 9, 12))], SIZE)
    annotate(mura / "mine.json", f"..\\elsewhere\\{PATHS[2]}.png", [shape("__ignore__", box(0, 0, 1, 1))], SIZE)
    notes = import_mura(ImportMura(mura, tmp_path / "target", mura, HUMERUS, classes={"humerus": 1}))
    assert rows(tmp_path / "target").keys() == {PATHS[0], PATHS[1], PATHS[2], PATHS[-1]}
    dataset = open_dataset(config(tmp_path / "target"))
    assert dataset.class_names == ("humerus",)
    mask = read_mask(tmp_path / "target" / "masks" / f"{PATHS[0]}.png", dataset.coding)
    assert (mask[3:13, 2:10] == 1).all()
    assert mask.sum() == 80
    assert f"{len(PATHS) - 5} of {len(PATHS) - 1} images have no mask and are left out" in notes


def test_classes_of_mask_images_are_declared(mura: Path, tmp_path: Path) -> None:
    for index, path in enumerate(PATHS):
        colours = np.array([[0, 0, 0], [0, 255, 0], [255, 0, 0]], np.uint8)[shapes(index)]
        save(colours, tmp_path / "masks" / f"{path}.png")
    undeclared = refused(mura, tmp_path / "masks")
    assert "no classes are declared" in undeclared
    options = {"classes": {"bone": "#00ff00"}, "ignore": "#ff0000"}
    notes = import_mura(ImportMura(mura, tmp_path / "target", tmp_path / "masks", ("humerus", "forearm"), **options))
    dataset = open_dataset(config(tmp_path / "target"))
    assert (dataset.name, dataset.class_names) == ("mura_humerus_forearm", ("bone",))
    mask = read_mask(tmp_path / "target" / "masks" / f"{PATHS[0]}.png", dataset.coding)
    assert (mask == np.array([0, 1, 255])[shapes(0)]).all()
    assert any("classes bone" in note for note in notes)


def test_masks_of_other_regions_are_left_out_and_counted(mura: Path, drawn: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(np.zeros(SIZE, np.uint8), drawn / f"train/XR_WRIST/patient0000{number}/study1_positive/image1.png")
    notes = import_mura(ImportMura(mura, tmp_path / "target", drawn, HUMERUS))
    assert "3 masks of XR_WRIST are left out: not in --region" in notes


def test_every_problem_is_reported_at_once(mura: Path, drawn: Path) -> None:
    mask = (shapes() > 0).astype(np.uint8) * 255
    save(mask, drawn / "train/XR_HUMERUS/patient00999/study1_positive/image1.png")
    save(mask, drawn / "valid_XR_HUMERUS_patient00001_study1_positive_image1.png")
    save(mask, drawn / "notes.png")
    save(mask, drawn / f"{PATHS[0].replace('/', '-')}.png")
    save(mask[:10], drawn / f"{PATHS[1]}.png")
    save(mask // 3, drawn / f"{PATHS[2]}.png")
    (drawn / f"{PATHS[3]}.png").write_bytes(b"")
    (mura / f"{PATHS[4]}.png").write_bytes((mura / f"{PATHS[4]}.png").read_bytes()[:60])
    message = refused(mura, drawn, classes={"bone": 255})
    for words in (
        "patient00999/study1_positive/image1.png: a mask without an image",
        "valid_XR_HUMERUS_patient00001_study1_positive_image1.png: a mask without an image",
        "notes.png: notes is not the path of an image in MURA",
        f"{PATHS[0]} already has a mask: train",
        f"{PATHS[1]}: 24x20 pixels, but its mask {PATHS[1]}.png has 24x10",
        f"{PATHS[2]}.png: undeclared mask value 85",
        f"{PATHS[3]}.png: the file is empty",
        f"{PATHS[4]}: damaged or truncated",
    ):
        assert words in message


def test_bad_labelme_files_are_reported_together(mura: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    annotate(masks / f"{PATHS[0]}.json", "x.png", [shape("humerus", box(1, 1, 5, 5))], (99, 99))
    annotate(masks / f"{PATHS[1]}.json", "x.png", [shape("humerus", [[1, 1], [1e8, 1], [1, 5]])], SIZE)
    annotate(masks / f"{PATHS[2]}.json", "x.png", [shape("ulna", box(1, 1, 5, 5))], SIZE)
    annotate(masks / "stray.json", "../../etc/passwd", [shape("humerus", box(1, 1, 5, 5))], SIZE)
    annotate(masks / f"{PATHS[3]}.json", "x.png", []).write_text("{")
    annotate(masks / f"{PATHS[4]}.json", "x.png", []).write_text(json.dumps({"annotations": []}))
    message = refused(mura, masks, classes={"humerus": 1})
    for words in (
        f"{PATHS[0]}.json: drawn on 99x99 pixels",
        f"{PATHS[1]}.json: shape 1 (humerus) reaches to",
        f'label "ulna" (in {PATHS[2]}.json) is not declared',
        "stray.json: ../../etc/passwd is not the path",
        f"{PATHS[3]}.json: not valid JSON",
        f"{PATHS[4]}.json: JSON, but not a LabelMe file",
    ):
        assert words in message


def test_a_patient_in_train_and_valid_is_an_error(mura: Path, drawn: Path) -> None:
    save(noise(90), mura / "valid/XR_HUMERUS/patient00002/study3_negative/image1.png")
    message = refused(mura, drawn)
    assert (
        "patient in MURA's train and valid: train/XR_HUMERUS/patient00002/study1_positive/image1 and valid/" in message
    )


def test_a_name_that_fits_two_images_is_an_error(mura: Path, drawn: Path) -> None:
    save(noise(91), mura / "train/XR_HUMERUS/patient00000/study2_positive/image1.png")
    mask = drawn / "train/XR_HUMERUS/patient00000/study2_negative/image1.png"
    mask.rename(drawn / "patient00000_study2_image1.png")
    assert "patient00000_study2_image1.png: fits several images" in refused(mura, drawn)


def test_an_image_that_is_in_valid_too_does_not_train(mura: Path, drawn: Path, tmp_path: Path) -> None:
    (mura / f"{PATHS[3]}.png").write_bytes((mura / f"{PATHS[-1]}.png").read_bytes())
    notes = import_mura(ImportMura(mura, tmp_path / "target", drawn, HUMERUS))
    assert any(note.startswith("left out of train") and PATHS[3] in note for note in notes)
    open_dataset(config(tmp_path / "target"))
    assert PATHS[3] not in rows(tmp_path / "target")


def test_what_is_no_mura_or_no_mask_is_said(mura: Path, drawn: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for arguments, words in (
        ((drawn / "train", target, drawn, HUMERUS), "is not MURA"),
        ((tmp_path / "absent", target, drawn, HUMERUS), "is not MURA"),
        ((mura, target, drawn, ("XR_KNEE",)), "XR_HUMERUS"),
        ((mura, target, drawn, ("XR_HAND",)), "has no images of XR_HAND"),
        ((mura, target, tmp_path / "absent", HUMERUS), "--masks"),
        ((mura, target, mura, HUMERUS), "no LabelMe file and no mask image"),
        ((mura, drawn, drawn, HUMERUS), "not empty"),
    ):
        with pytest.raises(UserError, match=words):
            import_mura(ImportMura(*arguments))
    assert not target.exists()


def test_the_command_imports_and_its_help_says_where_data_comes_from(
    run: Callable[..., Any], mura: Path, drawn: Path, tmp_path: Path
) -> None:
    words = ("registration", "FleXray", "CC BY 4.0", "--region", "--masks", "import-mura MURA-v1.1 data/mura")
    help_text = run("import-mura", "--help").stdout
    assert [word for word in words if word not in help_text] == []
    good = run("import-mura", mura, tmp_path / "target", "--region", "XR_HUMERUS", "--masks", drawn)
    assert (good.returncode, good.stderr) == (0, "")
    assert "255 was taken as foreground" in good.stdout
    bad = run("import-mura", mura, tmp_path / "target", "--masks", drawn)
    assert bad.returncode == 2
    assert "exists and is not empty" in bad.stderr


def test_soft_masks_are_cut_at_the_threshold(mura: Path, tmp_path: Path) -> None:
    for index, path in enumerate(PATHS):
        if "HUMERUS" in path:
            soft = (shapes(index) > 0) * np.uint8(255)
            soft[0, :20] = np.arange(20) * 12
            save(soft, tmp_path / "masks" / f"{path}.png")
    import_mura(
        ImportMura(mura, tmp_path / "target", tmp_path / "masks", HUMERUS, classes={"humerus": 255}, threshold=200)
    )
    dataset = open_dataset(config(tmp_path / "target"))
    mask = read_mask(tmp_path / "target" / "masks" / f"{PATHS[0]}.png", dataset.coding)
    assert mask[0].tolist() == [0] * 17 + [1] * 3 + [0] * 4
    with pytest.raises(UserError, match="--threshold 0"):
        import_mura(
            ImportMura(mura, tmp_path / "other", tmp_path / "masks", HUMERUS, classes={"humerus": 255}, threshold=0)
        )
