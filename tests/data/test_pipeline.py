"""Batches come in an order that depends on the seed alone, and go on exactly where they were."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.images import read_image, resize_image
from pdrunet_jax.data.masks import IGNORE, read_mask, resize_mask
from pdrunet_jax.data.pipeline import Batch, epoch_order, eval_batches, position_after, train_batches
from pdrunet_jax.runtime.errors import DataError, UserError
from tests.support import ROOT
from tests.support.small_data import config, shapes

Folder = Callable[..., Path]


def take(root: Path, count: int, state: dict[str, object] | None = None, **settings: object) -> list[Batch]:
    options = config(root, test_fraction=0.0, **{key: settings.pop(key) for key in list(settings) if key != "seed"})
    batches = train_batches(open_dataset(options), options, batch_size=4, channels=1, seed=settings.get("seed", 0))
    if state is not None:
        batches.set_state(state)
    result = list(islice(batches, count))
    batches.close()
    return result


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


def test_batches_hold_the_resized_files(folder: Folder) -> None:
    root = folder(10)
    dataset = open_dataset(config(root))
    samples = dataset.of("train")
    batch = next(train_batches(dataset, config(root), batch_size=3, channels=1, seed=0))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((3, 16, 16, 1), np.uint8),
        "mask": ((3, 16, 16), np.uint8),
        "index": ((3,), np.int32),
        "epoch": ((3,), np.int32),
    }
    for row, index in enumerate(batch["index"]):
        sample = samples[index]
        np.testing.assert_array_equal(batch["image"][row], resize_image(read_image(sample.image), (16, 16)))
        np.testing.assert_array_equal(batch["mask"][row], resize_mask(read_mask(sample.mask, dataset.coding), (16, 16)))


def test_an_epoch_has_every_sample_once_and_the_next_another_order(folder: Folder) -> None:
    batches = take(folder(9), 21, val_fraction=0.2)  # 7 train: 12 epochs
    index = np.concatenate([batch["index"] for batch in batches]).reshape(12, 7)
    epoch = np.concatenate([batch["epoch"] for batch in batches]).reshape(12, 7)
    assert (np.sort(index, axis=1) == np.arange(7)).all()
    assert (epoch == np.arange(12)[:, None]).all()
    assert len({tuple(row) for row in index.tolist()}) > 9


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("cache", ["memory", "none"])
def test_the_order_depends_neither_on_threads_nor_on_the_cache(folder: Folder, threads: int, cache: str) -> None:
    root = folder(9)
    assert_equal(take(root, 6, threads=threads, cache=cache), take(root, 6))


def test_the_order_is_this_one_everywhere() -> None:
    assert epoch_order(7, 0, 0).tolist() == [0, 3, 5, 1, 2, 6, 4]
    assert epoch_order(7, 0, 1).tolist() != epoch_order(7, 1, 0).tolist()


def test_the_order_depends_on_the_seed(folder: Folder) -> None:
    root = folder(12)
    orders = [np.concatenate([batch["index"] for batch in take(root, 10, seed=seed)]).tolist() for seed in (0, 1, -1)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] == np.concatenate([batch["index"] for batch in take(root, 10)]).tolist()


@pytest.mark.parametrize("done", [1, 5])
@pytest.mark.parametrize("threads", [0, 3])
def test_resume_is_exact_in_the_middle_of_an_epoch(folder: Folder, done: int, threads: int) -> None:
    root = folder(9)
    options = config(root, test_fraction=0.0, threads=threads)
    batches = train_batches(open_dataset(options), options, batch_size=4, channels=1, seed=0)
    whole = list(islice(batches, done))
    state = json.loads(json.dumps(batches.get_state()))
    whole += list(islice(batches, 4))
    batches.close()
    assert_equal(take(root, 4, state, threads=2), whole[done:])


def test_positions_of_earlier_checkpoints_are_accepted(folder: Folder) -> None:
    root = folder(9)
    old = {"images": 7, "batch_size": 4, "seed": 0, "position": {"next_index": 3}}
    assert_equal(take(root, 4, old), take(root, 7)[3:])
    assert_equal(take(root, 4, position_after(3)), take(root, 7)[3:])


def test_seeking_stops_the_threads_that_read_ahead(folder: Folder) -> None:
    options = config(folder(9), threads=3)
    batches = train_batches(open_dataset(options), options, batch_size=4, channels=1, seed=0)
    before = threading.active_count()
    for done in range(10):
        batches.set_state(position_after(done))
        next(batches)
    batches.close()
    deadline = time.monotonic() + 10  # threads end on their own once they are told to
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_going_back_is_exact_too(folder: Folder) -> None:
    options = config(folder(9), threads=2)
    batches = train_batches(open_dataset(options), options, batch_size=4, channels=1, seed=0)
    start = batches.get_state()
    first = list(islice(batches, 5))
    batches.set_state(start)
    assert_equal(list(islice(batches, 5)), first)
    batches.close()


def test_another_runs_position_is_refused(folder: Folder) -> None:
    options = config(folder(9))
    dataset = open_dataset(options)
    state = train_batches(dataset, options, batch_size=4, channels=1, seed=0).get_state()
    with pytest.raises(UserError, match="batch_size 4, this run has 2"):
        train_batches(dataset, options, batch_size=2, channels=1, seed=0).set_state(state)


def test_fewer_images_than_a_batch_still_fill_it(folder: Folder) -> None:
    options = config(folder(3), test_fraction=0.0, val_fraction=0.5)
    dataset = open_dataset(options)
    batch = next(train_batches(dataset, options, batch_size=5, channels=3, seed=0))
    assert len(dataset.of("train")) == 1
    assert batch["image"].shape == (5, 16, 16, 3)
    assert batch["epoch"].tolist() == [0, 1, 2, 3, 4]


def test_evaluation_has_every_sample_once_in_order_and_marks_the_rest(folder: Folder) -> None:
    options = config(folder(7), size=(16, 8), threads=2)
    dataset = open_dataset(options)
    for _ in range(2):  # the second time from memory
        batches = list(eval_batches(dataset, "all", options, batch_size=3, channels=1))
        assert [batch["valid"].tolist() for batch in batches] == [[True] * 3, [True] * 3, [True, False, False]]
        assert np.concatenate([batch["index"] for batch in batches])[:7].tolist() == list(range(7))
        assert batches[-1]["image"].shape == (3, 16, 8, 1)
        assert (batches[-1]["mask"][1:] == IGNORE).all()
        expected = resize_image(read_image(dataset.samples[6].image), (16, 8))
        np.testing.assert_array_equal(batches[-1]["image"][0], expected)


def test_an_empty_split_has_no_batches_and_no_training(folder: Folder) -> None:
    root = folder(2)
    rows = "".join(f"images/x{i:03}.png,masks/x{i:03}.png,test\n" for i in range(2))
    (root / "manifest.csv").write_text("image,mask,split\n" + rows)
    dataset = open_dataset(config(root))
    assert list(eval_batches(dataset, "val", config(root), batch_size=2, channels=1)) == []
    with pytest.raises(UserError, match="no training images: 0 images"):
        train_batches(dataset, config(root), batch_size=2, channels=1, seed=0)


def test_soft_masks_are_shares(folder: Folder) -> None:
    root = folder(4, mask=lambda i: ((shapes(i) > 0) * 255).astype(np.uint8))
    options = config(root, soft_masks=True)
    masks = [batch["mask"] for batch in eval_batches(open_dataset(options), "all", options, batch_size=4, channels=1)]
    assert masks[0].max() == 255
    assert len(np.unique(masks[0])) > 4  # bilinear edges are kept


def test_the_cache_decodes_each_file_once(folder: Folder) -> None:
    root = folder(5)
    options = config(root, cache="memory")
    dataset = open_dataset(options)
    first = list(eval_batches(dataset, "all", options, batch_size=5, channels=3))
    for path in (root / "images").iterdir():
        path.unlink()
    assert_equal(list(eval_batches(dataset, "all", options, batch_size=5, channels=3)), first)


@pytest.mark.parametrize("kind", ["grey", "palette", "colour", "deep", "undeclared"])
def test_what_the_check_keeps_is_what_the_pipeline_would_read(folder: Folder, kind: str) -> None:
    colours = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 0]], np.uint8)
    masks: dict[str, Callable[[int], np.ndarray]] = {
        "grey": lambda i: shapes(i),
        "palette": lambda i: shapes(i),
        "colour": lambda i: colours[shapes(i)],
        "deep": lambda i: shapes(i).astype(np.uint16) * 300,
        "undeclared": lambda i: np.array([[0, 0, 0], [255, 255, 0]], np.uint8)[(shapes(i) > 0) * (i != 2) * 1],
    }
    classes: dict[str, dict[str, int | str]] = {
        "colour": {"a": "#00ff00", "b": "#ff0000"},
        "deep": {"a": 300, "b": 600},
        "undeclared": {},
    }
    root = folder(7, masks[kind])
    for size in ((16,), (7, 33), (64,)):
        settings = {"size": size, "classes": classes.get(kind, {"a": 1, "b": 2})}
        read = [
            list(eval_batches(open_dataset(options), "all", options, batch_size=3, channels=1))
            for options in (config(root, cache=cache, **settings) for cache in ("memory", "none"))
        ]
        assert_equal(*read)


def test_nothing_is_decoded_after_the_check(folder: Folder) -> None:
    root = folder(5)
    options = config(root, cache="memory")
    dataset = open_dataset(options)
    for path in (*(root / "images").iterdir(), *(root / "masks").iterdir()):
        path.unlink()
    assert len(list(eval_batches(dataset, "all", options, batch_size=5, channels=1))) == 1
    with pytest.raises(DataError, match="No such file"):
        list(eval_batches(dataset, "all", options, batch_size=5, channels=3))


@pytest.mark.stress
def test_the_benchmark_compares_every_variant(tmp_path: Path) -> None:
    options = ["--images", "8", "--source", "64", "--size", "32", "--batch-size", "4", "--epochs", "2", "--rounds", "1"]
    path = tmp_path / "kept" / "pipeline.json"
    command = [sys.executable, "-m", "benchmarks.pipeline", *options, "--output", str(path)]
    home = ROOT
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=home)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert len(result["images_per_second"]) == 7
    assert all(rate > 0 for rates in result["images_per_second"].values() for rate in rates.values())
    assert str(home) not in path.read_text()
