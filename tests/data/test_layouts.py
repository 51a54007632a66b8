"""Which files of a dataset folder are images, masks and splits, and what is passed over."""

import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.data.dataset import inspect_dataset, open_dataset
from pdrunet_jax.data.images import stem
from pdrunet_jax.data.layouts import find_pairs
from pdrunet_jax.data.pairing import match
from pdrunet_jax.data.walk import walk_images
from pdrunet_jax.runtime.errors import DataError, UserError
from tests.support.small_data import SIZE, config, noise, save, shapes, write_dicom

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"


def mask(seed: int = 0) -> np.ndarray:
    return (shapes(seed) > 0).astype(np.uint8) * 255


def dataset(root: Path, images: Iterable[str], masks: Iterable[str]) -> Path:
    for index, name in enumerate(images):
        save(noise(index), root / name)
    for index, name in enumerate(masks):
        save(mask(index), root / name)
    return root


def splits(root: Path) -> dict[str, str | None]:
    found = find_pairs(root)
    assert found.problems == []
    return {pair.id: pair.split for pair in found.pairs}


@pytest.mark.parametrize(
    ("image", "mask_name"),
    [
        ("leg_1.png", name)
        for name in (
            "leg_1_segmentation.png",
            "mask_leg_1.tif",
            "leg_1_gt.png",
            "leg_1_seg_mask.png",
            "leg_1_Mask.png",
            "LEG_1-mask.png",
            "gt leg_1.png",
            "leg_1.ground_truth.png",
            "leg_mask_1.png",
            "leg_1.jpg.png",
        )
    ]
    + [("image_001.png", "mask_001.png"), ("x_img.png", "x_label.gif"), ("Scha\u0308del.png", "Schädel_mask.png")],
)
def test_masks_are_named_in_many_ways(image: str, mask_name: str) -> None:
    found = match([f"images/{image}", "images/other.png"], [f"masks/{mask_name}"], ("images", "masks"))
    assert found.pairs == [(f"images/{image}", f"masks/{mask_name}")]
    assert found.lonely == ["images/other.png"]
    assert found.problems == []


def test_a_name_that_fits_twice_is_a_problem_and_the_same_name_comes_first() -> None:
    masks = [f"m/{name}.png" for name in ("a", "a_gt", "b_mask_1", "b_mask", "c_seg", "c_gt")]
    found = match(["i/a.png", "i/a_gt.png", "i/b.png", "i/c.png"], masks, ("i", "m"))
    assert found.pairs == [("i/a.png", "m/a.png"), ("i/a_gt.png", "m/a_gt.png"), ("i/b.png", "m/b_mask.png")]
    assert found.problems == [
        "i/b.png: several masks: m/b_mask.png, m/b_mask_1.png",
        "i/c.png: several masks: m/c_seg.png, m/c_gt.png",
    ]


def test_folders_inside_images_and_masks_are_the_split(tmp_path: Path) -> None:
    names = ["train/a", "train/sub/b", "valid/c", "Test/d"]
    images = [f"images/{name}.png" for name in names]
    root = dataset(tmp_path / "a", images, [f"masks/{name.replace('valid', 'val')}.png" for name in names])
    assert splits(root) == dict(zip(images, ("train", "train", "val", "test"), strict=True))
    (root / "images/train/a.png").rename(root / "images/a.png")
    assert any("1 images are in none of them: images/a.png" in problem for problem in find_pairs(root).problems)


def test_test_images_without_masks_are_passed_over(tmp_path: Path) -> None:
    inside = dataset(tmp_path / "a", [f"images/{s}/{s}.png" for s in ("train", "test")], ["masks/train/train.png"])
    outside = dataset(tmp_path / "b", [f"{s}/images/{s}.png" for s in ("train", "test")], ["train/masks/train.png"])
    for root in (inside, outside):
        found = find_pairs(root)
        assert [pair.split for pair in found.pairs] == ["train"]
        assert found.problems == []
        assert any("test images without masks" in note and "test.png" in note for note in found.notes)
    (outside / "test").rename(outside / "val")
    assert find_pairs(outside).problems == ["val/masks/ is missing"]


def test_images_and_masks_may_share_a_folder(tmp_path: Path) -> None:
    root = dataset(
        tmp_path / "a", ["train/x_jpg.rf.0a.jpg", "valid/y.jpg"], ["train/x_jpg.rf.0a_mask.png", "valid/y_mask.png"]
    )
    (root / "train/_classes.csv").write_text("Pixel Value, Class\n")
    assert splits(root) == {"train/x_jpg.rf.0a.jpg": "train", "valid/y.jpg": "val"}
    flat = dataset(tmp_path / "b", ["benign/b (1).png", "p1/s_1.tif"], ["benign/b (1)_mask.png", "p1/s_1_mask.tif"])
    assert splits(flat) == {"benign/b (1).png": None, "p1/s_1.tif": None}
    save(mask(1), flat / "benign/b (1)_mask_1.png")
    assert "several masks" in find_pairs(flat).problems[0]
    assert find_pairs(dataset(tmp_path / "c", ["a.png", "b.png"], [])).layout == ""


def test_litter_and_loops_are_passed_over_and_counted(tmp_path: Path) -> None:
    root = dataset(tmp_path, [f"images/{i}.png" for i in range(3)], [f"masks/{i}.png" for i in range(3)])
    for part in ("images", "masks"):
        for name in ("@eaDir/0.png/thumb.jpg", ".thumbnails/0.png", "__MACOSX/0.png"):
            save(noise(9), root / part / name)
        (root / part / "Thumbs.db").write_bytes(b"x")
        for number, target in enumerate((".", "..", "/", ".")):
            os.symlink(target, root / part / f"link{number}")
    found = find_pairs(root)
    assert len(found.pairs) == 3
    assert found.problems == []
    assert any("thumbnails (8): images/.thumbnails" in note for note in found.notes)
    assert any("folder above (8)" in note for note in found.notes)


def test_linked_folders_and_files_are_read_like_others(tmp_path: Path) -> None:
    root = dataset(tmp_path / "data", ["images/a.png"], ["masks/a.png"])
    dataset(tmp_path / "store", ["images/b.png", "c.png"], ["masks/b.png", "m.png"])
    for part in ("images", "masks"):
        os.symlink(tmp_path / "store" / part, root / part / "hospital")
    os.symlink("../../store/c.png", root / "images/c.png")
    os.symlink("../../store/m.png", root / "masks/c.png")
    found = find_pairs(root)
    assert [pair.id for pair in found.pairs] == ["images/a.png", "images/c.png", "images/hospital/b.png"]
    assert any("2 images are outside the dataset folder" in note for note in found.notes)


def test_dicom_files_are_found_by_content(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for index, name in enumerate(("IM0000", "1.2.840.1", "1.2.840.2", "x.ima")):
        (root / "images").mkdir(parents=True, exist_ok=True)
        write_dicom(root / "images" / name, noise(index).astype(np.uint16) * 16)
        save(mask(index), root / "masks" / f"{stem(name)}.png")
    write_dicom(root / "images/seg.dcm", mask(9).astype(np.uint16), SOPClassUID=SEGMENTATION)
    (root / "images/notes").write_text("no image")
    found = find_pairs(root)
    assert found.problems == []
    assert len(found.pairs) == 4
    assert any("hold no image but Segmentation (1): images/seg.dcm" in note for note in found.notes)
    assert any("content (1): images/notes" in note for note in found.notes)


def test_masks_of_a_format_that_is_not_read_are_called_that(tmp_path: Path) -> None:
    root = dataset(tmp_path / "a", ["images/x.png", "images/y.png", "images/z.png"], [])
    (root / "masks").mkdir()
    for name in ("x.nii.gz", "y_seg.seg.nrrd", "z.txt"):
        (root / "masks" / name).write_bytes(b"x")
    problems = "\n".join(find_pairs(root).problems)
    for name in ("x.nii.gz", "y_seg.seg.nrrd", "z.txt"):
        assert f"its mask masks/{name} is in a format that is not read" in problems
    for path in (root / "images").iterdir():
        path.rename(path.with_suffix(".nrrd"))
    assert any("images/x.nrrd" in problem for problem in find_pairs(root).problems)
    dicom = dataset(tmp_path / "b", ["images/x.png"], [])
    (dicom / "masks").mkdir()
    write_dicom(dicom / "masks/x.dcm", mask().astype(np.uint16))
    with pytest.raises(DataError, match=r"masks/x\.dcm: a DICOM file"):
        open_dataset(config(dicom))


def test_accents_may_be_letters_of_their_own_in_a_manifest(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "Schädel")
    root = dataset(tmp_path, [f"images/{apart}.png"], ["masks/Schädel.png"])
    (root / "manifest.csv").write_text(f"image,mask\nimages/Schädel.png,masks/{apart}.png\n", encoding="utf-8")
    assert splits(root) == {"images/Schädel.png": None}
    (root / "manifest.csv").write_text(f"image,mask\nImages/SCHÄDEL.PNG,masks/{apart}.png\n", encoding="utf-8")
    assert splits(root) == {"Images/SCHÄDEL.PNG": None}


def test_tables_that_say_less_than_they_seem_to_are_told(folder: Callable[..., Path]) -> None:
    root = folder()
    path = root / "manifest.csv"
    path.write_text("\n;;\nimage;mask\nimages/x000.png;masks/x000.png\nimages/x001.png;masks/x000.png\n")
    found = find_pairs(root)
    assert [pair.id for pair in found.pairs] == ["images/x000.png", "images/x001.png"]
    assert any("2 images have the same mask, masks/x000.png" in note for note in found.notes)
    path.write_text("image,mask\nimages/x000.png,masks/x000.png\nIMAGES/X000.PNG,masks/x000.png\n")
    assert "line 3: image IMAGES/X000.PNG is already listed in line 2" in find_pairs(root).problems[0]
    path.write_text("\nimage,mask\nimages/gone.png,masks/x000.png\n")
    assert find_pairs(root).problems == ["manifest.csv line 3: image images/gone.png does not exist, or is no file"]
    for content, words in ((b"image,mask\n", "lists no image"), ("image,mask\n".encode("utf-16-le"), "NUL")):
        path.write_bytes(content)
        assert words in find_pairs(root).problems[0]


def test_what_is_no_file_does_not_count_as_absent_nor_do_unreadable_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = dataset(tmp_path, ["images/a.png"], ["masks/a.png"])
    for name in ("manifest.csv", "dataset.toml"):
        os.symlink("gone", root / name)
        with pytest.raises(UserError, match=f"{name} is a broken link to gone; restore its target"):
            open_dataset(config(root))
        (root / name).unlink()
        os.mkfifo(root / name)
        with pytest.raises(UserError, match=f"{name}: a pipe, not a file"):
            open_dataset(config(root))
        (root / name).unlink()
    scandir = os.scandir

    def denied(path: Path) -> object:  # the tests may run as root, whom no permission stops
        if Path(path).name == "masks":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match="masks: Permission denied"):
        open_dataset(config(root))


def test_folders_of_a_split_have_many_names(tmp_path: Path) -> None:
    folders = ("train2017", "training_set", "Val", "dev", "test-2019")
    names = [f"{folder}/x{index}.png" for index, folder in enumerate(folders)]
    outer = dataset(tmp_path / "outer", [f"images/{name}" for name in names], [f"masks/{name}" for name in names])
    wanted = ["train", "train", "val", "val", "test"]
    assert [splits(outer)[f"images/{name}"] for name in names] == wanted
    inner = [(f"{folder}/images/x.png", f"{folder}/masks/x.png") for folder in folders]
    root = dataset(tmp_path / "inner", [image for image, _ in inner], [each for _, each in inner])
    assert [splits(root)[image] for image, _ in inner] == wanted


def test_a_declaration_under_another_name_is_not_ignored(tmp_path: Path) -> None:
    root = dataset(tmp_path, ["images/a.png"], ["masks/a.png"])
    for name in ("Manifest.csv", "manifest.csv.txt", "Dataset.toml", "dataset.toml.txt"):
        (root / name).write_text("x", encoding="utf-8")
        with pytest.raises(UserError, match=f"{name} would be ignored: rename it"):
            open_dataset(config(root))
        (root / name).unlink()
    (root / "manifest.xlsx").write_bytes(b"PK")
    assert any("outside this layout (1): manifest.xlsx" in note for note in find_pairs(root).notes)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["legs/images/x.png", "legs/masks/x.png"], "The dataset seems to be in legs/"),
        (["JPEGImages/x.jpg", "SegmentationClass/x.png"], "import-voc"),
        (["images/x.png", "masks/task-1-annotation-1-by-1-tag-Bone-0.png"], "import-label-studio"),
        (["images/x.png", "masks/femur/x.png", "masks/tibia/x.png"], "import-masks.*data.multilabel = true"),
        (["images/x.png", "masks/x_mask.png", "masks/x_mask_1.png"], "import-masks"),
        (["x.jpg", "_annotations.coco.json"], "import-coco"),
        (["imagesTr/x_0000.nii.gz", "labelsTr/x.nii.gz"], "import-volumes"),
    ],
)
def test_what_is_no_dataset_folder_is_told_by_its_files(tmp_path: Path, names: list[str], words: str) -> None:
    for index, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(("png", "jpg")):
            save(noise(index), tmp_path / name)
        else:
            (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=words):
        open_dataset(config(tmp_path))


def test_an_image_that_is_its_own_mask_is_remarked(folder: Callable[..., Path]) -> None:
    root = folder()
    (root / "images/x000.png").write_bytes((root / "masks/x000.png").read_bytes())
    notes = open_dataset(config(root)).notes
    assert "warning: 1 images: the image has the content of its mask: images/x000.png" in notes


def test_names_that_are_not_utf8_are_problems(tmp_path: Path) -> None:
    save(noise(0), tmp_path / "a.png")
    (tmp_path / os.fsdecode(b"\xe4.png")).write_bytes(b"x")
    found = walk_images(tmp_path)
    assert [path.name for path in found.files] == ["a.png"]
    assert "not UTF-8" in found.problems[0][1]


def test_a_git_lfs_pointer_is_called_that(folder: Callable[..., Path]) -> None:
    root = folder(3)
    (root / "images/x001.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (root / "images/x002.png").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(DataError, match=r"(?s)x001.png: .*git lfs pull.*x002.png: .*an HTML page"):
        open_dataset(config(root))


@pytest.mark.parametrize(("orientation", "word"), [(6, "EXIF"), (3, "EXIF")])
def test_exif_on_one_side_is_named(tmp_path: Path, orientation: int, word: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for index in range(4):
        save(Image.fromarray(noise(index)), tmp_path / f"images/{index}.jpg", exif=exif)
        save(mask(index), tmp_path / f"masks/{index}.png")
    if orientation == 6:
        with pytest.raises(DataError, match=word):
            open_dataset(config(tmp_path))
    else:
        assert any(f"{word} turns" in note for note in open_dataset(config(tmp_path)).notes)


def test_constant_and_nearly_constant_images_are_remarked(folder: Callable[..., Path]) -> None:
    root = folder(4)
    save(np.full(SIZE, 7, np.uint8), root / "images/x000.png")
    save(noise(1) // 20, root / "images/x001.png")
    notes = "\n".join(inspect_dataset(config(root)).dataset.notes)
    assert "1 images: every pixel has the same grey level: images/x000.png" in notes
    assert "lie within 16 of 256 grey levels: images/x001.png" in notes
