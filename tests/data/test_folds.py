"""Every patient is in the test images of exactly one fold, and a fold is the same on every machine."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrunet_jax.config import Config, check
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.data.folds import assign_folds, too_few
from pdrunet_jax.runtime.errors import DataError
from tests.data.test_split import manifest
from tests.support.small_data import config, noise, save

Folder = Callable[..., Path]


def splits(dataset: Dataset, split: str) -> set[str]:
    return {sample.patient for sample in dataset.of(split)}


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(2, 7), st.integers(0, 3))
def test_groups_are_dealt_evenly(patients: list[int], count: int, seed: int) -> None:
    groups = [f"p{number}" for number in patients]
    shares = [number % 7 / 7 for number in patients]
    drawn = assign_folds(groups, shares, count=count, seed=seed)
    assert drawn.keys() == set(groups)
    sizes = Counter(drawn.values())
    assert set(sizes) == set(range(1, min(count, len(drawn)) + 1))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    order = np.random.default_rng(seed).permutation(len(groups))
    assert drawn == assign_folds([groups[i] for i in order], [shares[i] for i in order], count=count, seed=seed)


def test_each_fold_has_a_patient_of_every_range_of_foreground_share() -> None:
    names = [f"p{i:02}" for i in range(40)]
    drawn = assign_folds(names, [i / 40 for i in range(40)], count=4, seed=3)
    for number in range(1, 5):
        assert [index // 4 for index, name in enumerate(names) if drawn[name] == number] == list(range(10))
    assert drawn != assign_folds(names, [i / 40 for i in range(40)], count=4, seed=4)


def test_the_folds_are_these_everywhere() -> None:
    names = [f"p{i}" for i in range(8)]
    drawn = assign_folds(names, [i / 8 for i in range(8)], count=3, seed=0)
    assert [drawn[name] for name in names] == [2, 3, 1, 2, 1, 3, 2, 1]


def test_every_patient_is_tested_once_and_never_trained_on_in_that_fold(folder: Folder) -> None:
    root = manifest(folder(18), [(f"p{i % 9}",) for i in range(18)], "patient")
    opened = [open_dataset(config(root, fold=f"{number}/3")) for number in (1, 2, 3)]
    tested = [patient for dataset in opened for patient in splits(dataset, "test")]
    assert sorted(tested) == sorted({sample.patient for sample in opened[0].samples})
    for number, dataset in enumerate(opened, 1):
        parts = [splits(dataset, split) for split in ("train", "val", "test")]
        assert all(parts)
        assert sum(map(len, parts)) == 9
        assert all(sample.fold == number for sample in dataset.of("test"))
    assert len({dataset.fingerprint() for dataset in opened}) == 1
    assert open_dataset(config(root, fold="1/4")).fingerprint() != opened[0].fingerprint()
    # The same data elsewhere.
    moved = Path(shutil.copytree(root, root.parent / "patient5" / "elsewhere"))
    assert [each.split for each in open_dataset(config(moved, fold="2/3")).samples] == [
        each.split for each in opened[1].samples
    ]
    save(noise(99), root / "images" / "x003.png")
    assert open_dataset(config(root, fold="1/3")).fingerprint() != opened[0].fingerprint()


def test_declared_test_images_are_held_out_and_said(folder: Folder) -> None:
    rows = [(f"p{i}", "test" if i < 3 else "val" if i < 5 else "train") for i in range(12)]
    root = manifest(folder(12), rows)
    for number in (1, 2, 3):
        dataset = open_dataset(config(root, fold=f"{number}/3"))
        assert splits(dataset, "held-out") == {"p0", "p1", "p2"}
        assert not splits(dataset, "held-out") & (splits(dataset, "train") | splits(dataset, "val"))
        assert len(dataset.of("test")) == 3
    assert "3 declared test images are held out of all folds" in dataset.notes


def test_identical_pixels_share_a_fold(folder: Folder) -> None:
    root = folder(12)
    for index in range(6):
        save(noise(index), root / "images" / f"x{index + 6:03}.png")
    folds = [sample.fold for sample in open_dataset(config(root, fold="1/3")).samples]
    assert folds[:6] == folds[6:]
    assert sorted(Counter(folds).values()) == [4, 4, 4]


def test_too_few_patients_are_refused(folder: Folder) -> None:
    assert [too_few(groups, 2) == "" for groups in (2, 3, 4, 5)] == [False, False, True, True]
    assert [too_few(groups, 5) == "" for groups in (4, 5, 6)] == [False, True, True]
    with pytest.raises(DataError, match=r"data\.fold = 1/7: 6 patients.* too few for 7 folds: it takes 7"):
        open_dataset(config(folder(6), fold="1/7"))
    with pytest.raises(DataError, match=r"data\.fold = 6/5: give K/N"):
        check(Config(data=config(folder(6), fold="6/5")), "the command line")
