"""Folders are paired by name, and everything wrong with one is said at once, before training starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.fit import Fit
from pdrunet_jax.runtime.errors import DataError, UserError
from tests.support.small_data import SIZE, config, noise, save, shapes

Folder = Callable[..., Path]


def mask(seed: int = 0) -> np.ndarray:
    return (shapes(seed) > 0).astype(np.uint8) * 255


def pairs(root: Path) -> dict[str, str]:
    dataset = open_dataset(config(root))
    return {sample.id: sample.mask.relative_to(root).as_posix() for sample in dataset.samples if sample.mask}


def test_flat_folders_pair_by_stem_suffix_and_extension_never_by_order(tmp_path: Path) -> None:
    for index, name in enumerate(("a.png", "b.jpg", "c.TIF", "sub/d.bmp")):
        save(noise(index), tmp_path / "images" / name)
    for index, name in enumerate(("b_mask.png", "c_seg.png", "sub/d_label.tif", "a.png")):
        save(mask(index), tmp_path / "masks" / name)
    for junk in ("._a.png", ".DS_Store", ".keep", "__MACOSX/a.png", "Thumbs.db"):
        path = tmp_path / "images" / junk
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"junk")
    (tmp_path / "images" / "notes.txt").write_text("hello")
    assert pairs(tmp_path) == {
        "images/a.png": "masks/a.png",
        "images/b.jpg": "masks/b_mask.png",
        "images/c.TIF": "masks/c_seg.png",
        "images/sub/d.bmp": "masks/sub/d_label.tif",
    }
    assert any("images/notes.txt" in note for note in open_dataset(config(tmp_path)).notes)


def test_nnunet_names_pair(tmp_path: Path) -> None:
    for index in range(3):
        save(noise(index), tmp_path / "imagesTr" / f"case_{index:03}_0000.png")
        save(mask(index), tmp_path / "labelsTr" / f"case_{index:03}.png")
    assert pairs(tmp_path)["imagesTr/case_001_0000.png"] == "labelsTr/case_001.png"


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "femur": 1, "tibia": [2], "ignore": 3},
        {"0": "background", "1": "femur", "2": "tibia", "3": "ignore"},
    ],
)
def test_nnunets_description_declares_classes_in_either_version(tmp_path: Path, labels: dict[str, object]) -> None:
    for index in range(3):
        save(noise(index), tmp_path / "imagesTr" / f"x{index}_0000.png")
        drawn = shapes(index)
        drawn[0, 0] = 3
        save(drawn, tmp_path / "labelsTr" / f"x{index}.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "legs", "labels": labels}))
    dataset = open_dataset(config(tmp_path))
    assert (dataset.name, dataset.class_names, dataset.coding.ignore) == ("legs", ("femur", "tibia"), (3,))


def test_nnunets_test_folders_are_the_test_split(tmp_path: Path) -> None:
    for index in range(6):
        part = "Ts" if index > 3 else "Tr"
        save(noise(index), tmp_path / f"images{part}" / f"x{index}_0000.png")
        save(mask(index), tmp_path / f"labels{part}" / f"x{index}.png")
    dataset = open_dataset(config(tmp_path))
    assert [sample.id for sample in dataset.of("test")] == ["imagesTs/x4_0000.png", "imagesTs/x5_0000.png"]
    assert len(dataset.of("val")) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"labels": [1]}', "labels must be an object"),
        (
            '{"labels": {"background": 0, "whole": [1, 2], "core": [2]}}',
            r"json: classes: 2 is declared 2 times",
        ),
        ('{"labels": {"background": 0, "bone": -1}}', "neither a number"),
    ],
)
def test_nnunet_descriptions_that_cannot_be_meant_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    save(noise(0), tmp_path / "imagesTr" / "x_0000.png")
    save(mask(0), tmp_path / "labelsTr" / "x.png")
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        open_dataset(config(tmp_path))


def test_split_folders_are_the_split(tmp_path: Path) -> None:
    for index, split in enumerate(("train", "train", "valid", "test")):
        save(noise(index), tmp_path / split / "images" / f"{index}.png")
        save(mask(index), tmp_path / split / "masks" / f"{index}.png")
    dataset = open_dataset(config(tmp_path))
    assert {sample.id.split("/")[0]: sample.split for sample in dataset.samples} == {
        "train": "train",
        "valid": "val",
        "test": "test",
    }
    assert "2 images of 2 patients in train, 1 image of 1 patient in val, 1 image of 1 patient in test" in dataset.notes


def test_a_manifest_gives_patients_and_splits(folder: Folder) -> None:
    root = folder(4)
    rows = [f"images/x{i:03}.png,masks/x{i:03}.png,p{i // 2},{'train' if i < 2 else 'val'}" for i in range(4)]
    (root / "manifest.csv").write_text("image,mask,patient,split\n" + "\n".join(rows) + "\n", encoding="utf-8-sig")
    dataset = open_dataset(config(root))
    assert [sample.patient for sample in dataset.samples] == ["p0", "p0", "p1", "p1"]
    assert [sample.split for sample in dataset.samples] == ["train", "train", "val", "val"]
    assert dataset.of("test") == ()


def test_every_problem_is_reported_at_once(folder: Folder) -> None:
    root = folder(6)
    (root / "masks" / "x000.png").unlink()
    save(mask(), root / "masks" / "lonely.png")
    save(noise(70), root / "images" / "x001.jpg")
    save(mask()[:10], root / "masks" / "x002.png")
    (root / "images" / "x003.png").write_bytes(b"")
    (root / "images" / "x004.png").write_bytes((root / "images" / "x004.png").read_bytes()[:200])
    (root / "images" / "x005.png").write_text("not an image")
    save(mask(), root / "masks" / "x005_mask.png")
    for index in (6, 7):
        save(noise(index), root / "images" / f"x{index:03}.png")
        save((shapes(index) > 0).astype(np.uint8) * (255 if index == 6 else 77), root / "masks" / f"x{index:03}.png")
    with pytest.raises(DataError) as caught:
        open_dataset(config(root, classes={"bone": 255}))
    problems = "\n".join(caught.value.problems)
    for expected in (
        "images/x000.png: no mask named masks/x000.*",
        "masks/lonely.png: a mask without an image",
        "images/x001.jpg, images/x001.png: several images with the same name",
        "images/x002.png: 24x20 pixels, but its mask masks/x002.png has 24x10",
        "images/x003.png: the file is empty",
        "images/x004.png: damaged or truncated",
        "images/x005.png: several masks: masks/x005.png, masks/x005_mask.png",
        "masks/x007.png: undeclared mask value 77",
    ):
        assert expected in problems
    assert caught.value.exit_code == 2


def test_an_unreadable_image_among_good_ones_is_named(folder: Folder) -> None:
    root = folder(4)
    (root / "images" / "x002.png").write_text("not an image")
    with pytest.raises(DataError, match=r"images/x002\.png: no PNG, .* or DICOM image"):
        open_dataset(config(root))


@pytest.mark.parametrize(
    ("image", "mask_path", "reason"),
    [
        ("../outside.png", "masks/x000.png", "leads out"),
        ("images/../../outside.png", "masks/x000.png", "leads out"),
        ("..\\outside.png", "masks/x000.png", "leads out"),
        ("images/x000.png", "../outside.png", "leads out"),
        ("images/x000.png", "/etc/hostname", "is absolute"),
        ("images/x000.png", "C:\\masks\\x.png", "is absolute"),
        ("images/none.png", "masks/x000.png", "does not exist"),
        ("", "masks/x000.png", "is missing"),
    ],
)
def test_a_manifest_reaches_nothing_outside(folder: Folder, image: str, mask_path: str, reason: str) -> None:
    root = folder(2)
    save(noise(0), root.parent / "outside.png")
    (root / "manifest.csv").write_text(f"image,mask\n{image},{mask_path}\nimages/x001.png,masks/x001.png\n")
    with pytest.raises(DataError, match=reason) as caught:
        open_dataset(config(root))
    assert "manifest.csv line 2" in str(caught.value)


def test_absolute_image_paths_are_followed_and_said(folder: Folder) -> None:
    root = folder(2)
    elsewhere = save(noise(40), root.parent / "elsewhere.png")
    (root / "manifest.csv").write_text(f"image,mask\n{elsewhere},masks/x000.png\nimages/x001.png,masks/x001.png\n")
    dataset = open_dataset(config(root))
    assert any("1 images of manifest.csv are outside" in note for note in dataset.notes)


def test_manifests_that_are_no_table_are_refused(folder: Folder) -> None:
    root = folder(2)
    for content, reason in (
        (b"picture,label\na,b\n", "no column image and mask"),
        (b"", "no column"),
        (b"image,mask,Mask\nimages/x000.png,masks/x000.png,masks/x001.png\n", "several columns are named mask"),
        (b"\xff\xfe\x00binary", "not valid UTF-16"),
        (b"image,mask\n\x81\n", "neither UTF-8, UTF-16 nor Windows-1252"),
        (b"image,mask,split\nimages/x000.png,masks/x000.png,tset\n", 'split "tset" is not'),
        (b"image,mask,patient\nimages/x000.png,masks/x000.png,\n", "the patient is missing"),
        (b"image,mask\n" + b"images/x000.png,masks/x000.png\n" * 2, "already listed in line 2"),
    ):
        (root / "manifest.csv").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            open_dataset(config(root))


def test_manifests_of_spreadsheets_are_read(folder: Folder) -> None:
    root = folder(3)
    save(noise(1), root / "images" / "Knöchel.png")
    save((shapes(1) > 0).astype(np.uint8) * 255, root / "masks" / "Knöchel.png")
    (root / "images" / "x001.png").unlink()
    rows = [("Image", " Mask", "split", "Note")]
    for name, split in (("x000", "train"), ("Knöchel", "val")):
        rows.append((f"images/{name}.png", f" masks/{name}.png ", split, "x"))
    for separator, encoding, begin, note in (
        (",", "utf-8-sig", "", False),
        (";", "cp1252", "", True),
        ("\t", "utf-16", "", False),
        (";", "utf-8", "sep=;\r\n", False),
    ):
        lines = [separator.join(row) for row in rows]
        text = begin + "\r\n".join([lines[0], lines[1], separator * 3, lines[2], "", separator * 3, ""])
        (root / "manifest.csv").write_bytes(text.encode(encoding))
        dataset = open_dataset(config(root))
        assert [sample.id for sample in dataset.samples] == ["images/Knöchel.png", "images/x000.png"]
        assert [sample.split for sample in dataset.samples] == ["val", "train"]
        assert any("read as Windows-1252" in remark for remark in dataset.notes) == note
    wrong = "\n".join(["image;mask", "", "images/x000.png;masks/x000.png", ";;", "images/gone.png;masks/x000.png"])
    (root / "manifest.csv").write_text(wrong)
    with pytest.raises(DataError, match=r"manifest.csv line 5: image images/gone.png does not exist"):
        open_dataset(config(root))


def test_descriptions_that_cannot_be_meant_are_refused(folder: Folder) -> None:
    root = folder(2)
    for content, reason in (
        ("clases = { a = 1 }", "did you mean classes"),
        ("classes = 255", "classes must be a table"),
        ("name = ", "not valid TOML"),
        ("spacing = [0.1, -1]", "spacing"),
        ("threshold = 0", "threshold"),
        ("swap_on_flip = ['a', 'b']", "must be a list of pairs"),
        ("swap_on_flip = [['foreground', 'other']]", "there is no class 'other'; the classes are foreground"),
        ("classes = { a = 1, b = 2 }\nthreshold = 100", "threshold needs exactly one class"),
    ):
        (root / "dataset.toml").write_text(content)
        with pytest.raises(UserError, match=reason):
            open_dataset(config(root))


def test_spacing_is_kept(folder: Folder) -> None:
    root = folder(2)
    (root / "dataset.toml").write_text("spacing = 0.15")
    assert open_dataset(config(root)).spacing == (0.15, 0.15)


def test_a_missing_or_empty_root_says_where_data_comes_from(tmp_path: Path) -> None:
    for root in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError) as caught:
            open_dataset(config(root))
        for words in ("--data.root", str(root), "registration", "FleXray", "CC BY 4.0", "import-mura", "phantom"):
            assert words in str(caught.value)


def test_a_folder_of_another_kind_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "something.txt").write_text("x")
    with pytest.raises(UserError, match=r"manifest\.csv"):
        open_dataset(config(tmp_path))


def test_soft_masks_refuse_an_ignore_value(folder: Folder) -> None:
    root = folder(4, mask=lambda i: np.array([0, 255, 127], np.uint8)[shapes(i)])
    with pytest.raises(DataError, match="soft_masks"):
        open_dataset(config(root, classes={"bone": 255}, ignore=127, soft_masks=True))


def test_the_fingerprint_follows_files_and_coding_but_not_the_place(folder: Folder, tmp_path: Path) -> None:
    root = folder(5)
    before = open_dataset(config(root)).fingerprint()
    shutil.copytree(root, tmp_path / "copy")
    assert open_dataset(config(tmp_path / "copy", threads=3)).fingerprint() == before
    assert open_dataset(config(root, classes={"bone": 255})).fingerprint() != before
    assert open_dataset(config(root, split_seed=1)).fingerprint() != before
    save(Image.fromarray(np.zeros(SIZE, np.uint8)), root / "masks" / "x001.png")
    assert open_dataset(config(root)).fingerprint() != before


def test_phantoms_are_drawn_where_there_is_nothing_and_only_there(folder: Folder, tmp_path: Path) -> None:
    drawn = open_dataset(config(tmp_path / "new", phantoms=5, size=(64,)))
    assert len(drawn.samples) == 5
    assert len(open_dataset(config(folder(3), phantoms=5, size=(64,))).samples) == 3


def remarks_on(root: Path, **settings: object) -> str:
    return "\n".join(open_dataset(config(root, **settings)).notes)


def test_classes_of_either_side_are_declared_or_found_by_name(folder: Folder) -> None:
    root = folder(mask=shapes)
    dataset = open_dataset(config(root, classes={"femur_left": 1, "femur_right": 2}))
    assert dataset.swap_on_flip == (("femur_left", "femur_right"),)
    assert any("by their names, femur_left and femur_right change places" in note for note in dataset.notes)
    (root / "dataset.toml").write_text("classes = { a = 1, b_left = 2 }")
    alone = open_dataset(config(root))
    assert alone.swap_on_flip is None
    assert any("no class is the other side of b_left: training will not mirror images" in note for note in alone.notes)
    (root / "dataset.toml").write_text("classes = { a = 1, b_left = 2 }\nswap_on_flip = [['a', 'b_left']]")
    assert open_dataset(config(root)).swap_on_flip == (("a", "b_left"),)
    assert open_dataset(config(root, swap_on_flip=())).swap_on_flip == ()
    assert "mirror" not in remarks_on(root, swap_on_flip=())
    with pytest.raises(UserError, match=r"data.swap_on_flip: 'a' is named 2 times"):
        open_dataset(config(root, swap_on_flip=(("a", "a"),)))


def test_a_threshold_of_the_description_is_not_for_classes_given_as_an_option(folder: Folder) -> None:
    root = folder(mask=lambda i: np.array([0, 200, 255], np.uint8)[shapes(i)])
    (root / "dataset.toml").write_text("classes = { bone = 255 }\nthreshold = 100")
    assert open_dataset(config(root)).coding.threshold == 100
    assert open_dataset(config(root, classes={"a": 200, "b": 255})).coding.threshold is None


def test_classes_absent_from_a_split_are_remarked(folder: Folder) -> None:
    root = folder(6, lambda i: shapes(i) * np.uint8(shapes(i) < 2) if i < 4 else shapes(i))
    rows = [f"images/x{i:03}.png,masks/x{i:03}.png,{split}" for i, split in enumerate(["train"] * 4 + ["val", "test"])]
    (root / "manifest.csv").write_text("\n".join(["image,mask,split", *rows]))
    remarks = remarks_on(root, classes={"femur": 1, "tibia": 2, "patella": 3})
    assert "class tibia is in no mask of train" in remarks
    assert "class patella is in no mask\n" in remarks + "\n"
    assert "femur" not in remarks


def test_images_squeezed_by_more_than_two_to_one_are_remarked(folder: Folder) -> None:
    root = folder()
    assert "squeezes" not in remarks_on(root)
    assert "squeezes 6 of 6 images by more than 2:1, images/x000.png by 3.0:1 in width" in remarks_on(
        root, size=(32, 13)
    )
    assert "by 3.3:1 in height" in remarks_on(root, size=(8, 32))


def test_an_image_that_exif_turns_without_its_mask_is_named(folder: Folder) -> None:
    root = folder()
    exif = Image.Exif()
    exif[0x0112] = 3
    save(noise(50), root / "images" / "x000.png", exif=exif)
    assert "EXIF turns the image or its mask, but not both: images/x000.png;" in remarks_on(root)
    exif[0x0112] = 6
    save(noise(50), root / "images" / "x000.png", exif=exif)
    with pytest.raises(DataError, match="the image is turned by its EXIF orientation, and the mask has none"):
        open_dataset(config(root))


def test_case_numbers_of_four_digits_are_no_channels(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(noise(number), tmp_path / "imagesTr" / f"hand_{number:04}.png")
        save(shapes(number), tmp_path / "labelsTr" / f"hand_{number:04}.png")
    assert len(open_dataset(config(tmp_path, classes={"a": 1, "b": 2})).samples) == 3


def test_pixels_kept_from_the_check_are_those_read_again(folder: Folder) -> None:
    colours = np.array([(0, 0, 255), (0, 255, 0), (255, 0, 0)], np.uint8)
    for mask, classes in ((shapes, {"b": 2, "a": 1}), (lambda i: colours[shapes(i)], {"a": "#00ff00", "b": "#ff0000"})):
        root = folder(mask=mask)
        index = np.arange(6)
        kept, read = (
            open_dataset(config(root, classes=classes, cache=cache)).cache(Fit((16, 16)), 1, soft=False)
            for cache in ("memory", "none")
        )
        with pytest.raises(ZeroDivisionError):
            read.take(index, lambda _: 1 // 0)
        images, masks = kept.take(index, lambda _: 1 // 0)
        for row in index:
            image = Image.open(root / "images" / f"x{row:03}.png").resize((16, 16), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(images[row, ..., 0], np.asarray(image))
            order = np.array([0, 2, 1] if "#" not in str(classes) else [0, 1, 2], np.uint8)[shapes(row)]
            np.testing.assert_array_equal(masks[row], Image.fromarray(order).resize((16, 16), Image.Resampling.NEAREST))
