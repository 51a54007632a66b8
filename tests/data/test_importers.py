"""What other tools export comes back exactly; what cannot is refused, and nothing is written."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdrunet_jax.data.__main__ import IMPORTERS
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.masks import read_mask
from pdrunet_jax.data.phantoms.anatomy import BONES
from pdrunet_jax.data.phantoms.phantom import draw
from pdrunet_jax.runtime.errors import UserError
from tests.support import foreign
from tests.support.small_data import SIZE, config, noise, save, shapes


@pytest.fixture(scope="module")
def phantoms() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Images and masks, not square: in each, some bones are the class 1, the others 2."""
    images, masks = {}, {}
    for index in range(3):
        phantom = draw(index, size=200)
        present = sorted(set(np.unique(phantom.bones).tolist()) - {0})
        table = np.zeros(len(BONES) + 1, np.uint8)
        table[present] = [1 + place % 2 for place in range(len(present))]
        images[f"x{index}"], masks[f"x{index}"] = phantom.image[:, 10:140], table[phantom.bones[:, 10:140]]
    return images, masks


def imported(name: str, source: Path, **options: Any) -> list[str]:
    """Import to the folder target beside `source`; returns the remarks."""
    kind, _, function = IMPORTERS[name]
    shutil.rmtree(source.parent / "target", ignore_errors=True)
    return function(kind(source, source.parent / "target", **options))


def refused(name: str, source: Path, **options: Any) -> str:
    """The message of a failing import, which must leave nothing behind."""
    shutil.rmtree(source.parent / "target", ignore_errors=True)
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        imported(name, source, **options)
    assert sorted(source.parent.rglob("*")) == before
    return str(caught.value)


def opened(source: Path) -> Dataset:
    return open_dataset(config(source.parent / "target"))


def dices(source: Path, masks: foreign.Masks) -> list[float]:
    """Dice of every class in every image of the dataset beside `source`."""
    dataset = opened(source)
    assert dataset.class_names == foreign.NAMES
    assert len(dataset.samples) == len(masks)
    result = []
    for sample in dataset.samples:
        mask, truth = read_mask(sample.mask, dataset.coding), masks[sample.image.stem.split("-")[-1]]
        assert mask.shape == truth.shape
        for index in (1, 2):
            ours, theirs = mask == index, truth == index
            if theirs.any():
                result.append(2 * float((ours & theirs).sum()) / float(ours.sum() + theirs.sum()))
    assert len(result) > len(masks)
    return result


WRITERS: dict[str, tuple[str, Callable[[Path, foreign.Masks], object], str, float, dict[str, Any]]] = {
    "coco polygons": (
        "import-coco",
        lambda root, masks: foreign.coco(root / "a.json", masks, "polygon"),
        "",
        0.995,
        {},
    ),
    "coco counts": ("import-coco", lambda root, masks: foreign.coco(root / "a.json", masks, "counts"), "images", 1, {}),
    "coco compressed": (
        "import-coco",
        lambda root, masks: foreign.coco(root / "a.json", masks, "compressed"),
        "images/sub",
        1,
        {},
    ),
    "label studio brush": (
        "import-label-studio",
        lambda root, masks: foreign.label_studio(root / "a.json", masks, "brush"),
        "",
        1,
        {},
    ),
    "label studio min": (
        "import-label-studio",
        lambda root, masks: foreign.label_studio(root / "a.json", masks, "min"),
        "images",
        1,
        {},
    ),
    "label studio polygons": (
        "import-label-studio",
        lambda root, masks: foreign.label_studio(root / "a.json", masks, "polygon"),
        "",
        0.995,
        {},
    ),
    "voc labelmap": ("import-voc", lambda root, masks: foreign.voc(root, masks, labelmap=True), "JPEGImages", 1, {}),
    "voc palette": (
        "import-voc",
        lambda root, masks: foreign.voc(root, masks, labelmap=False),
        "JPEGImages",
        1,
        {"classes": {"femur": 1, "tibia": 2}},
    ),
    "cvat": ("import-cvat", lambda root, masks: foreign.cvat(root / "annotations.xml", masks), "images", 0.995, {}),
    "supervisely": ("import-supervisely", lambda root, masks: foreign.supervisely(root / "ann", masks), "img", 1, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_round_trip_keeps_the_masks(
    name: str, phantoms: tuple[dict[str, np.ndarray], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    images, masks = phantoms
    command, write, folder, least, options = WRITERS[name]
    source = tmp_path / "source"
    for image, pixels in images.items():
        save(pixels, source / folder / f"{image}.png")
    write(source, masks)
    notes = imported(command, source, **options)
    assert min(dices(source, masks)) >= least
    assert any(note.startswith("class 2   tibia: in ") for note in notes)
    assert (read_image(opened(source).samples[1].image)[:, :, 0] == images["x1"]).all()


def test_splits_of_files_and_folders_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    masks = {f"x{index}": shapes(index) for index in range(4)}
    for index, name in enumerate(masks):
        save(noise(index), source / "JPEGImages" / f"{name}.png")
    foreign.voc(source, masks, labelmap=True, splits={"train": ["x0", "x1"], "val": ["x2"], "test": ["x3"]})
    imported("import-voc", source)
    assert [sample.split for sample in opened(source).samples] == ["train", "train", "val", "test"]
    (source / "ImageSets/Segmentation/test.txt").write_text("x2\nx3\n")
    assert "x2 is in test too" in refused("import-voc", source)

    other = tmp_path / "coco" / "source"
    for number, (split, name) in enumerate((("train", "x0"), ("val", "x1"), ("test", "x2"))):
        save(noise(number), other / f"{split}2017" / f"{name}.png")
        foreign.coco(other / "annotations" / f"instances_{split}2017.json", {name: masks[name]}, "counts")
    imported("import-coco", other)
    assert [sample.split for sample in opened(other).samples] == ["test", "train", "val"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_of_names_may_be_letters_of_their_own(tmp_path: Path, form: str) -> None:
    ours, theirs = (unicodedata.normalize(each, "Fuß_Röntgen") for each in ("NFC" if form == "NFD" else "NFD", form))
    shape = {"label": "femur", "points": [[1, 1], [9, 1], [9, 9], [1, 9]], "shape_type": "polygon"}
    labelme = {"version": "5.0", "imagePath": f"{theirs}.png", "shapes": [shape]}
    coco = {"images": [{"id": 1, "file_name": f"{theirs}.png", "height": SIZE[0], "width": SIZE[1]}]}
    coco["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]}]
    coco["categories"] = [{"id": 1, "name": "femur"}]
    for number, (name, file, content) in enumerate(
        (("import-labelme", "a.json", labelme), ("import-coco", "a.json", coco), ("import-masks", "", None))
    ):
        source = tmp_path / str(number) / "source"
        save(noise(0), source / f"images/{ours}.png")
        if content:
            (source / "images" / file).write_text(json.dumps(content), encoding="utf-8")
        else:
            save((shapes(0) > 0).astype(np.uint8), source / f"masks/{theirs}_mask.png")
        imported(name, source)
        assert [sample.id for sample in opened(source).samples] == [f"images/{ours}.png"]


def test_labels_that_differ_in_capitals_alone_are_told_and_background_is_none(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for index, label in enumerate(("Bone", "bone", "Background")):
        save(noise(index), source / f"{index}.png")
        shape = {"label": label, "points": [[1, 1], [9, 1], [9, 9], [1, 9]], "shape_type": "polygon"}
        labelme = {"version": "5.0", "imagePath": f"{index}.png", "shapes": [shape]}
        (source / f"{index}.json").write_text(json.dumps(labelme), encoding="utf-8")
    assert any(
        "Bone and bone are different classes; --classes Bone=Bone,bone 1" in n
        for n in imported("import-labelme", source)
    )
    assert opened(source).class_names == ("Bone", "bone")
    imported("import-labelme", source, classes={"Bone=Bone,bone": 1})
    assert opened(source).class_names == ("Bone",)


def test_a_folder_of_each_image_may_hold_an_image_and_a_mask(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for index in range(3):
        save(noise(index), source / f"p{index}/image.png")
        save((shapes(index) > 0).astype(np.uint8), source / f"p{index}/mask.png")
    imported("import-masks", source)
    dataset = opened(source)
    for index, sample in enumerate(sorted(dataset.samples, key=lambda each: each.id)):
        np.testing.assert_array_equal(read_mask(sample.mask, dataset.coding), shapes(index) > 0)


def test_overlapping_classes_are_said_and_the_later_counts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(np.zeros((40, 50), np.uint8), source / "x.png")
    path = foreign.coco(source / "a.json", {"x": np.zeros((40, 50), np.uint8)}, "polygon")
    content = json.loads(path.read_text())
    box = [[5, 5, 20, 5, 20, 20, 5, 20]], [[10, 10, 30, 10, 30, 30, 10, 30]]
    content["annotations"] = [
        {"id": i, "image_id": 1, "category_id": i + 1, "segmentation": box[i], "iscrowd": 0} for i in range(2)
    ]
    path.write_text(json.dumps(content))
    notes = imported("import-coco", source)
    assert any(note.startswith("shapes of several classes overlap in 1 images (121 pixels)") for note in notes)
    dataset = opened(source)
    assert read_mask(dataset.samples[0].mask, dataset.coding)[15, 15] == 2


def test_several_mask_files_are_joined(tmp_path: Path) -> None:
    names, masks = ["benign (1)", "benign (10)", "x_2"], [shapes(i) for i in range(3)]

    def write(folder: str, place: Callable[[str, int], str]) -> Path:
        source = tmp_path / folder / "source"
        for name, mask in zip(names, masks, strict=True):
            save(noise(names.index(name)), source / f"images/{name}.png")
            for index in (1, 2):
                save((mask == index).astype(np.uint8) * 255, source / place(name, index))
        return source

    for folder, place in {
        "folders": lambda name, index: f"masks/{foreign.NAMES[index - 1]}/{name}.png",
        "names": lambda name, index: f"masks/{name}_{foreign.NAMES[index - 1]}_mask.png",
        "files": lambda name, index: f"masks/{name}/{foreign.NAMES[index - 1]}.png",
        "outer": lambda name, index: f"{foreign.NAMES[index - 1]}/masks/{name}.png",
    }.items():
        source = write(folder, place)
        imported("import-masks", source)
        assert dices(source, dict(zip(names, masks, strict=True))) == [1] * 6, folder
    source = write("sides", lambda name, index: f"ManualMask/{('left', 'right')[index - 1]}Mask/{name}.png")
    (source / "images").rename(source / "CXR_png")
    notes = imported("import-masks", source)
    assert "classes are named by files or folders: left, right" in notes
    assert opened(source).class_names == ("left", "right")
    source = write("numbers", lambda name, index: f"masks/{name}_mask{'' if index == 1 else '_1'}.png")
    imported("import-masks", source, classes={"bone": 7})
    dataset = opened(source)
    assert dataset.class_names == ("bone",)
    assert all(
        (read_mask(s.mask, dataset.coding) == (m > 0)).all() for s, m in zip(dataset.samples, masks, strict=True)
    )


def test_masks_with_other_names_are_paired_with_their_images(tmp_path: Path) -> None:
    mask = (shapes(1) > 0).astype(np.uint8) * 255
    for number, (image, file) in enumerate(
        {
            "a.jpg": "a.jpg.png",
            "b.png": "mask_b.png",
            "c.png": "c-mask.png",
            "d.png": "d_segmentation.png",
            "train/e.png": "train/e_gt.png",
            "images/f.png": "gt/f.png",
            "g/images/g.png": "g/masks/0f3a.png",
            "ds/img/h.png": "ds/masks_machine/h.png",
            "CXR_png/i.png": "masks/i_mask.png",
            "cxr/j.png": "ManualMask/j.png",
            "k.PNG": "K_Mask.png",
        }.items()
    ):
        source = tmp_path / str(number) / "source"
        save(noise(number), source / image)
        save(mask, source / file if file != "a.jpg.png" else source / "masks" / file)
        imported("import-masks", source)
        dataset = opened(source)
        assert (read_mask(dataset.samples[0].mask, dataset.coding) == (mask > 0)).all(), image


def test_masks_that_could_be_misread_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for index in range(3):
        save(noise(index), source / f"images/x{index}.png")
        save(shapes(index), source / f"masks/x{index}.png")
    assert "name them with --classes" in refused("import-masks", source)
    for index in range(3):  # each has one value, but not the same
        save((shapes(index) > 0).astype(np.uint8) * (index + 1), source / f"masks/x{index}.png")
    assert "masks have the values 1 (in masks/x0.png), 2 (in masks/x1.png), 3" in refused("import-masks", source)
    for index in range(3):
        save((shapes(index) > 0).astype(np.uint8) * 255, source / f"masks/x{index}.png")
    save(noise(5), source / "masks/x0_1.png")
    save(shapes(0), source / "masks/x1_left_mask.png")
    save(shapes(0), source / "masks/y.png")
    message = refused("import-masks", source)
    assert "masks/x0_1.png: grey values all over" in message
    assert "left is either a class (declare it with --classes) or an image that is missing" in message
    assert "masks/y.png: a mask without an image" in message
    (source / "masks/x0_1.png").unlink()
    (source / "masks/x0_1.png").symlink_to(tmp_path / "elsewhere.png")
    save(shapes(0), tmp_path / "elsewhere.png")
    assert "a link that leads out of the folder" in refused("import-masks", source)


def test_pngs_of_label_studio_are_paired_in_order_only_when_asked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    masks = {f"x{index}": shapes(index) for index in range(3)}
    for number, (name, mask) in enumerate(masks.items(), start=9):  # 9, 10, 11: not in the order of their texts
        save(noise(number), source / f"{name}.png")
        for index, label in enumerate(foreign.NAMES, start=1):
            part = (mask == index).astype(np.uint8) * 255
            save(part, source / f"task-{number}-annotation-{number}-by-1-tag-{label}-0.png")
    assert "--pair-in-order" in refused("import-label-studio", source)
    notes = imported("import-label-studio", source, pair_in_order=True)
    assert "tasks were paired with images in order: 9 = x0.png, 10 = x1.png, 11 = x2.png" in notes
    assert dices(source, masks) == [1] * 6
    (source / "x2.png").unlink()
    assert "masks of 3 tasks, but 2 images" in refused("import-label-studio", source, pair_in_order=True)


def test_regions_of_label_studio_are_drawn_where_they_are(tmp_path: Path) -> None:
    source, size = tmp_path / "source", (100, 200)
    save(np.zeros(size, np.uint8), source / "x.png")
    box = {"x": 10, "y": 20, "width": 20, "height": 30, "rotation": 0}
    turned = {"x": 60, "y": 20, "width": 10, "height": 40, "rotation": 90}  # about its upper left corner
    ellipse = {"x": 80, "y": 75, "radiusX": 10, "radiusY": 20, "rotation": 0}
    regions = [
        foreign.region("rectanglelabels", "femur", size, box),
        foreign.region("rectanglelabels", "femur", size, turned),
        foreign.region("ellipselabels", "tibia", size, ellipse),
        foreign.region("keypointlabels", "tibia", size, {"x": 1, "y": 1, "width": 1}),
    ]
    task = {"id": 1, "data": {"image": "s3://bucket/x.png"}, "annotations": [{"result": regions}]}
    path = source / "a.json"
    path.write_text(json.dumps([task]))
    notes = imported("import-label-studio", source)
    assert "skipped: 1 keypointlabels without an area" in notes
    dataset = opened(source)
    mask = read_mask(dataset.samples[0].mask, dataset.coding)
    assert (mask[21:49, 21:59] == 1).all()
    assert (mask[21:39, 81:119] == 1).all()  # 40 to the left of x = 120, 20 high
    assert [mask[75, 160], mask[75, 142], mask[57, 160], mask[60, 145]] == [2, 2, 2, 0]
    for change, reason in (
        ({"annotations": [{"result": []}, {"result": []}]}, "2 annotations; leave one, or give --several last"),
        ({"annotations": [{"result": [{**regions[0], "original_width": 10**9}]}]}, "refused as a bomb"),
        ({"annotations": [{"result": [{**regions[0], "original_width": 100}]}]}, "drawn on 100x100 pixels"),
        ({"annotations": [{"result": [{**regions[0], "image_rotation": 90}]}]}, "rotated"),
        ({"data": {"image": "/etc/passwd.png"}}, "does not exist in the source"),
    ):
        path.write_text(json.dumps([{**task, **change}]))
        assert reason in refused("import-label-studio", source), reason


def test_every_problem_of_a_coco_file_is_reported_at_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    masks = {f"x{index}": shapes(index) for index in range(12)}
    for index, name in enumerate(masks):
        save(noise(index), source / f"{name}.png")
    content = json.loads(foreign.coco(source / "a.json", masks, "counts").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"image_id": 99}, "image_id 99 is not in images"),
        ({"category_id": "7"}, "category_id '7' is not in categories"),
        ({"segmentation": {"size": [20, 24], "counts": [5, 10**12]}}, "its runs cover 1000000000005 pixels of 480"),
        ({"segmentation": {"size": [20, 24], "counts": "~"}}, "not compressed run lengths"),
        ({"segmentation": {"size": [10**6, 10**6], "counts": [1]}}, "refused as a bomb"),
        ({"segmentation": [[1, 2, 3]]}, "at least three pairs"),
        ({"segmentation": [], "bbox": [1, 2, 3, 4]}, "--boxes fill draws such boxes"),
        ({"segmentation": {"size": [24, 20], "counts": [480]}}, "was drawn on 20x24 pixels, not 24x20"),
    ]
    for place, (change, _) in enumerate(changes):
        content["annotations"][2 * place] |= change  # of the image with that place
    content["images"][8]["file_name"] = "../../secret.png"
    content["images"][9]["file_name"] = "x0.png"
    content["images"][10]["height"] = 21
    save(noise(0), tmp_path.parent / "secret.png")
    (source / "a.json").write_text(json.dumps(content))
    message = refused("import-coco", source)
    for reason in (*(reason for _, reason in changes), "'../../secret.png' does not exist in the source"):
        assert reason in message
    assert "x0.png is already annotated in a.json" in message
    assert "drawn on 24x21 pixels, but x10.png has 24x20" in message
