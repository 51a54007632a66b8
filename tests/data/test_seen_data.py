"""Datasets in every form of docs/data.md come out right, also from end to end: train, evaluate, predict."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.data.masks import read_mask
from pdrunet_jax.data.split import Sample
from pdrunet_jax.evaluate.__main__ import main as evaluate
from pdrunet_jax.predict.__main__ import main as predict
from pdrunet_jax.train.__main__ import main
from pdrunet_jax.train.options import parse
from tests.support.seen_data import CASES, Seen
from tests.support.tiny import brightness_model, save_model

CONFIG = """
[data]
size = [32]
threads = 1
[model]
name = "unet"
depth = 1
filters = 4
norm = "none"
dropout = 0.0
[train]
steps = 2
batch_size = 2
samples = 1
[tracking]
wandb = "disabled"
"""
"""The data are what is tried here: a network that compiles fast."""


def forms(*quick: str) -> list[object]:
    """Every form of data; those that are not `quick` in the long form only."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.stress) for name in CASES]


@pytest.fixture
def written(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Seen]:
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.chdir(tmp_path)
    Path("fast.toml").write_text(CONFIG)
    return root, CASES[request.param](root)


def settings(root: Path, seen: Seen) -> DataConfig:
    return parse(["--config", "fast.toml", "--data.root", str(root), *seen.options]).settings.data


def truth_of(sample: Sample, seen: Seen) -> np.ndarray:
    (found,) = (mask for name, mask in seen.truth.items() if sample.id.endswith(name))
    return found


def assert_scored_against_the_truth(folder: Path, dataset: Dataset, seen: Seen, split: str) -> None:
    with (folder / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {
        (sample.id, name): int((truth_of(sample, seen) == index).sum())
        for sample in dataset.of(split)
        for index, name in enumerate(seen.classes, start=1)
    }
    assert {(row["image"], row["class"]): int(row["pixels_true"]) for row in rows} == expected


def assert_predicts(weights: Path, dataset: Dataset, seen: Seen, folder: Path) -> None:
    images = [sample.image for sample in dataset.samples]
    predict([*map(str, images), "--weights", str(weights), "--output", str(folder)])
    masks = []
    for path in folder.rglob("*_mask.png"):
        with Image.open(path) as image:
            masks.append(np.array(image))
    assert len(masks) == len(images)
    assert {mask.shape for mask in masks} == {mask.shape for mask in seen.truth.values()}
    assert all(mask.max() <= len(seen.classes) for mask in masks)


@pytest.mark.parametrize("written", CASES, indirect=True)
def test_every_form_is_read_as_it_was_meant(written: tuple[Path, Seen]) -> None:
    root, seen = written
    dataset = open_dataset(settings(root, seen))
    assert dataset.class_names == seen.classes
    assert len(dataset.samples) == len(seen.truth)
    for sample in dataset.samples:
        np.testing.assert_array_equal(read_mask(sample.mask, dataset.coding), truth_of(sample, seen))


@pytest.mark.parametrize("written", forms("ignored_values", "every_mode", "turned_by_exif", "labelme"), indirect=True)
def test_forms_are_scored_and_predicted(written: tuple[Path, Seen], tmp_path: Path) -> None:
    root, seen = written
    dataset = open_dataset(settings(root, seen))
    weights = save_model(brightness_model(dataset.outputs), tmp_path / "w.safetensors", size=[32, 32])
    data = ["--data.root", str(root), "--data.threads", "1", *seen.options]
    evaluate(["--weights", str(weights), *data, "--split", "all", "--output", "scores"])
    assert_scored_against_the_truth(Path("scores"), dataset, seen, "all")
    assert_predicts(weights, dataset, seen, tmp_path / "masks")


@pytest.mark.parametrize("written", forms("palette_indices", "ignored_values", "every_mode"), indirect=True)
def test_forms_train(written: tuple[Path, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, seen = written
    arguments = ["--config", "fast.toml", "--data.root", str(root), "--workdir", str(tmp_path / "run"), *seen.options]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    assert main() == 0
    dataset = open_dataset(settings(root, seen))
    split = "test" if dataset.of("test") else "val"
    assert_scored_against_the_truth(tmp_path / "run" / "evaluation" / split, dataset, seen, split)
