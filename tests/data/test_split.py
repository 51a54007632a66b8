"""No patient is in two splits, and a split is the same on every machine."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.split import assign
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.train.run import require_validation
from tests.support.small_data import config, noise, save, shapes

Folder = Callable[..., Path]


def manifest(root: Path, rows: list[tuple[str, str]], columns: str = "patient,split") -> Path:
    """Rows of (patient, split) for the images x000, x001, ..."""
    lines = [f"images/x{i:03}.png,masks/x{i:03}.png,{','.join(row)}" for i, row in enumerate(rows)]
    (root / "manifest.csv").write_text(f"image,mask,{columns}\n" + "\n".join(lines) + "\n")
    return root


@settings(deadline=None)  # other processes may hold the machine
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=40),
    st.floats(0, 0.4),
    st.floats(0, 0.4),
    st.integers(-5, 5),
)
def test_shares_are_of_groups_and_train_keeps_one(groups: list[int], val: float, test: float, seed: int) -> None:
    names = [f"p{group}" for group in groups]
    shares = [group / 13 for group in groups]
    chosen = assign(names, shares, val=val, test=test, seed=seed)
    assert chosen.keys() == set(names)
    assert chosen == assign(names[::-1], shares[::-1], val=val, test=test, seed=seed)
    counts = {split: list(chosen.values()).count(split) for split in ("train", "val", "test")}
    assert counts["train"] >= 1
    for split, fraction in (("val", val), ("test", test)):
        assert counts[split] <= max(1, fraction * len(chosen) + 0.5)
        if len(chosen) >= 5 and fraction:
            assert counts[split] >= max(1, fraction * len(chosen) - 0.5)


def test_the_split_is_this_one_everywhere() -> None:
    names = [f"p{i}" for i in range(10)]
    chosen = assign(names, [i / 10 for i in range(10)], val=0.2, test=0.2, seed=0)
    assert sorted(name for name in names if chosen[name] == "val") == ["p3", "p8"]
    assert sorted(name for name in names if chosen[name] == "test") == ["p4", "p7"]
    assert chosen != assign(names, [i / 10 for i in range(10)], val=0.2, test=0.2, seed=1)


def test_splits_are_drawn_evenly_along_the_foreground_share() -> None:
    names = [f"p{i:02}" for i in range(40)]
    chosen = assign(names, [i / 40 for i in range(40)], val=0.25, test=0, seed=3)
    picked = [index for index, name in enumerate(names) if chosen[name] == "val"]
    assert [index // 4 for index in picked] == list(range(10))


def test_images_of_one_patient_stay_together(folder: Folder) -> None:
    root = manifest(folder(12), [(f"p{i % 5}",) for i in range(12)], "patient")
    dataset = open_dataset(config(root))
    for patient in {sample.patient for sample in dataset.samples}:
        assert len({sample.split for sample in dataset.samples if sample.patient == patient}) == 1
    assert dataset.of("val")
    assert dataset.of("test")
    assert [sample.split for sample in open_dataset(config(root, threads=3)).samples] == [
        sample.split for sample in dataset.samples
    ]


def test_mura_paths_name_the_patient(tmp_path: Path) -> None:
    for index in range(6):
        name = f"patient{index // 2:05}/study1_positive/image{index % 2}.png"
        save(noise(index), tmp_path / "images" / name)
        save((shapes(index) > 0).astype(np.uint8), tmp_path / "masks" / name)
    dataset = open_dataset(config(tmp_path))
    assert {sample.patient for sample in dataset.samples} == {"patient00000", "patient00001", "patient00002"}


@pytest.mark.parametrize("word", ["Patient{}", "patient_{}", "PATIENT {}", "patient-{}"])
def test_the_word_patient_may_be_written_in_many_ways(tmp_path: Path, word: str) -> None:
    for index in range(6):
        for kind, pixels in (("images", noise(index)), ("masks", (shapes(index) > 0).astype(np.uint8) * 255)):
            save(pixels, tmp_path / kind / f"{word.format(index // 2)}_view{index % 2}.png")
    samples = open_dataset(config(tmp_path)).samples
    assert len({sample.patient for sample in samples}) == 3
    assert len({(sample.patient, sample.split) for sample in samples}) == 3


def test_a_regular_expression_names_the_patient(folder: Folder) -> None:
    dataset = open_dataset(config(folder(6), patient_regex=r"x(00[0-9])"))
    assert dataset.samples[3].patient == "003"
    with pytest.raises(DataError, match=r"images/x005\.png: data\.patient_regex"):
        open_dataset(config(folder(6), patient_regex=r"x00[0-4]"))
    with pytest.raises(UserError, match="not a regular expression"):
        open_dataset(config(folder(6), patient_regex="("))


def test_unknown_patients_are_said(folder: Folder) -> None:
    dataset = open_dataset(config(folder(6)))
    assert any("no patients are known" in note for note in dataset.notes)


def test_a_patient_in_two_declared_splits_is_refused(folder: Folder) -> None:
    root = manifest(folder(4), [("p0", "train"), ("p1", "train"), ("p0", "val"), ("p2", "test")])
    with pytest.raises(DataError, match=r"patient p0 is in train and val: images/x000\.png, images/x002\.png"):
        open_dataset(config(root))


def test_identical_pixels_in_two_declared_splits_are_refused(folder: Folder) -> None:
    root = manifest(folder(3), [("p0", "train"), ("p1", "train"), ("p2", "val")])
    save(noise(0), root / "images" / "x002.png", compress_level=1)  # other bytes, the same pixels
    with pytest.raises(DataError, match=r"identical pixels in train and val: images/x000\.png, images/x002\.png"):
        open_dataset(config(root))


def test_identical_pixels_share_a_drawn_split(folder: Folder) -> None:
    root = folder(10)
    for index in range(5):
        save(noise(index), root / "images" / f"x{index + 5:03}.png")
    dataset = open_dataset(config(root))
    for index in range(5):
        assert dataset.samples[index].split == dataset.samples[index + 5].split
    assert any("images/x000.png = images/x005.png" in note for note in dataset.notes)


def test_a_missing_validation_split_is_taken_from_train_by_patient(folder: Folder) -> None:
    rows = [(f"p{i // 2}", "test" if i > 9 else "train") for i in range(12)]
    dataset = open_dataset(config(manifest(folder(12), rows)))
    assert len(dataset.of("val")) == 2
    assert len({sample.patient for sample in dataset.of("val")}) == 1
    assert len(dataset.of("test")) == 2
    assert any("no validation split is declared" in note for note in dataset.notes)


def test_a_folder_of_test_images_only_can_be_opened(folder: Folder) -> None:
    dataset = open_dataset(config(manifest(folder(2), [("p0", "test"), ("p1", "test")])))
    assert len(dataset.of("test")) == len(dataset.of("all")) == 2


def test_a_drawn_split_does_not_depend_on_where_absolute_images_are(folder: Folder, tmp_path: Path) -> None:
    root = folder(20)
    masks = [f"masks/x{index:03}.png" for index in range(20)]
    drawn = []
    for place in ("a", "patient7/mounted/elsewhere"):
        shutil.copytree(root / "images", tmp_path / place)
        rows = [f"{tmp_path / place / Path(mask).name},{mask}" for mask in masks]
        (root / "manifest.csv").write_text("\n".join(["image,mask", *rows]))
        drawn.append([(Path(sample.id).name, sample.split) for sample in open_dataset(config(root)).samples])
    assert drawn[0] == drawn[1]
    assert {split for _, split in drawn[0]} == {"train", "val", "test"}


def test_patients_below_the_common_folder_of_absolute_images_are_found(folder: Folder, tmp_path: Path) -> None:
    root = folder(6)
    (root / "manifest.csv").write_text("image,mask\n")
    with (root / "manifest.csv").open("a") as manifest:
        for index in range(6):
            image = save(noise(index), tmp_path / "inpatient2024" / f"patient{index // 2}" / f"{index}.png")
            manifest.write(f"{image},masks/x{index:03}.png\n")
    dataset = open_dataset(config(root))
    assert {sample.patient for sample in dataset.samples} == {"patient0", "patient1", "patient2"}
    assert dataset.patients_from == "the word patient with digits in the path"


def test_images_of_a_single_patient_say_so_with_the_way_out(folder: Folder, tmp_path: Path) -> None:
    root = folder()
    (root / "images").rename(root / "all")
    (root / "masks").rename(root / "drawn")
    shutil.move(root / "all", root / "images" / "patient7")
    shutil.move(root / "drawn", root / "masks" / "patient7")
    dataset = open_dataset(config(root))
    (remark,) = [note for note in dataset.notes if "one patient" in note]
    assert "all 6 images count as one patient, patient7, by the word patient with digits" in remark
    with pytest.raises(UserError, match=r"no validation images, .* --data.patient-regex '.\+' for a split by images"):
        require_validation(dataset)
    require_validation(open_dataset(config(root, patient_regex=".+")))
