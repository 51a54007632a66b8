"""`python -m pdrunet_jax.data` as a user types it."""

import csv
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.overlay import colour_of
from tests.support.small_data import config, save, shapes

Folder = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]


def test_check_reports_what_is_there(folder: Folder) -> None:
    command = [sys.executable, "-m", "pdrunet_jax.data", "check", str(folder(6)), "--classes", "bone", "255"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    for words in ("6, 24 to 24 pixels wide", "6 L", "bone", "patients  unknown; each of 6", "in val"):
        assert words in result.stdout


def test_check_of_a_bad_folder_says_everything_and_exits_with_2(run: Run, folder: Folder) -> None:
    root = folder(4)
    (root / "masks" / "x000.png").unlink()
    (root / "images" / "x001.png").write_bytes(b"")
    result = run("check", root)
    assert result.returncode == 2
    assert "images/x000.png" in result.stderr
    assert "images/x001.png" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("columns", [None, "image,mask,note"])
def test_split_writes_the_split_that_training_uses(run: Run, folder: Folder, columns: str | None) -> None:
    root = folder(8)
    if columns:
        rows = [f"./images/x{i:03}.png,masks/x{i:03}.png,n{i}" for i in reversed(range(8))]
        (root / "manifest.csv").write_text(columns + "\n" + "\n".join(rows) + "\n")
    before = {sample.id: sample.split for sample in open_dataset(config(root)).samples}
    assert run("split", root).returncode == 0
    with (root / "manifest.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert {row["image"].removeprefix("./"): row["split"] for row in written} == before
    if columns:
        assert [row["note"] for row in written] == [f"n{i}" for i in reversed(range(8))]
    assert {sample.id: sample.split for sample in open_dataset(config(root, split_seed=5)).samples} == before
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    again = run("split", root)
    assert again.returncode == 2
    assert "has a split" in again.stderr


def test_a_grown_dataset_keeps_the_splits_of_the_earlier_one(run: Run, folder: Folder, tmp_path: Path) -> None:
    old = shutil.copytree(folder(8), tmp_path / "old")
    assert run("split", old, "--split-seed", "3").returncode == 0
    new = folder(20)
    (new / "images/x000.png").rename(new / "images/renamed.png")
    (new / "masks/x000.png").rename(new / "masks/renamed.png")
    result = run("split", new, "--keep", old)
    assert result.returncode == 0, result.stderr
    assert "8 of 20 images have the split of their patient" in result.stdout
    before, after = ({sample.id: sample.split for sample in open_dataset(config(root)).samples} for root in (old, new))
    assert after["images/renamed.png"] == before.pop("images/x000.png")
    assert {image: after[image] for image in before} == before
    drawn = Counter(split for image, split in after.items() if image not in before and "renamed" not in image)
    assert drawn == {"train": 8, "val": 2, "test": 2}


def test_a_patient_whose_images_were_in_two_splits_is_named(run: Run, folder: Folder, tmp_path: Path) -> None:
    old = shutil.copytree(folder(4), tmp_path / "old")
    pairs = [f"images/x00{i}.png,masks/x00{i}.png" for i in range(4)]
    lines = [f"{pair},{split}" for pair, split in zip(pairs, ("train", "test", "val", "train"), strict=True)]
    (old / "manifest.csv").write_text("image,mask,split\n" + "\n".join(lines))
    new = folder(4)
    lines = [f"{pair},{patient}" for pair, patient in zip(pairs, ("anna", "anna", "bert", "carl"), strict=True)]
    (new / "manifest.csv").write_text("image,mask,patient\n" + "\n".join(lines))
    result = run("split", new, "--keep", old)
    assert result.returncode == 2
    assert "anna: test and train" in result.stderr
    assert "bert" not in result.stderr


def test_the_help_of_check_has_the_settings_of_training_that_matter(run: Run) -> None:
    shown = run("check", "--help").stdout
    assert "usage: python -m pdrunet_jax.data check [-h] [CHECK OPTIONS] FOLDER" in shown
    for option in (
        "--classes",
        "--ignore",
        "--threshold",
        "--soft-masks",
        "--patient-regex",
        "--test-fraction",
        "--size",
    ):
        assert option in shown
    for option in ("--cache", "--phantoms"):
        assert option not in shown


def test_check_draws_masks_over_images_on_a_page_that_needs_nothing_else(
    run: Run, folder: Folder, tmp_path: Path
) -> None:
    root = folder(9, lambda i: np.array([0, 1, 2], np.uint8)[shapes(i)] * np.uint8(i != 4))
    (root / "dataset.toml").write_text("name = 'legs <b>'\nclasses = { femur = 1, tibia = 2 }")
    result = run("check", root, "--output", tmp_path / "seen" / "here", "--pictures", "6")
    assert result.returncode == 0, result.stderr
    assert "check.html" in result.stdout
    assert "twins     no images" in result.stdout
    page = (tmp_path / "seen" / "here" / "check.html").read_text()
    assert "legs &lt;b&gt;" in page
    assert "class 2   tibia" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    with Image.open(tmp_path / "seen" / "here" / "contact_sheet.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    assert len(re.findall("<figcaption>[1-6]  images/x00", page)) == page.count("data:image/png;base64,") == 6
    cells = sheet[6:156, 6 : 6 + 4 * 366].reshape(150, 4, 366, 3)  # the upper row: four of six, the emptiest first
    for index in (1, 2):  # femur and tibia, each outlined in its colour
        outlined = (cells[:, :, 180:] == colour_of(index)).all(axis=-1).any(axis=(0, 2))
        assert outlined.tolist() == [False, True, True, True]
    assert not (cells[:, :, :180] == colour_of(1)).all(axis=-1).any()  # the image beside it is bare


def test_names_beyond_ascii_and_slender_images_are_legible(run: Run, tmp_path: Path) -> None:
    names, shape = ("Röntgen", "膝关节", "wide"), {"wide": (30, 240)}
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 99, shape.get(name, (240, 30)), dtype=np.uint8)
        pixels[10:20, 10:20] = 255
        save(pixels, tmp_path / "data/images" / f"{name}.png")
        save((pixels > 99).astype(np.uint8), tmp_path / "data/masks" / f"{name}.png")
    result = run(
        "check", tmp_path / "data", "--output", tmp_path / "seen", "--classes", "fémur", "1", "--size", "240", "30"
    )
    assert "squeezes 1 of 3 images" in result.stdout
    page = (tmp_path / "seen" / "check.html").read_text()
    assert all(f"  images/{name}.png<br>" in page for name in names)
    assert "fémur 1.4%" in page
    with Image.open(tmp_path / "seen" / "contact_sheet.png") as sheet:
        assert sheet.height > 500  # the short sides have 72 pixels


def test_check_takes_a_threshold_and_several_values_for_a_class(run: Run, folder: Folder) -> None:
    root = folder(4, lambda i: np.array([0, 90, 200], np.uint8)[shapes(i)])
    large = f"bone: {np.mean([(shapes(i) == 2).mean() for i in range(4)]):.1%}"
    assert large in run("check", root, "--classes", "bone", "200", "--threshold", "100").stdout
    both = run("check", root, "--classes", "bone", "90,200").stdout
    assert f"bone: {np.mean([(shapes(i) > 0).mean() for i in range(4)]):.1%}" in both


def test_a_split_that_cannot_be_written_is_one_message_and_exit_code_1(run: Run, folder: Folder) -> None:
    root = folder(5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        result = run("split", root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {root / 'manifest.csv'}: cannot be written (")
    assert not (root / "manifest.csv").exists()
