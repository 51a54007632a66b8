"""Batches for the device, by Grain: decoded once, shuffled anew each epoch, and at an exact, restorable position."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import grain
import numpy as np

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.cache import Resized, keeps
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.images import read_image, resize_image
from pdrunet_jax.data.masks import IGNORE, read_mask, read_soft_mask, resize_mask, resize_soft_mask
from pdrunet_jax.data.partition import Sample, split_counts
from pdrunet_jax.errors import UserError

Batch = dict[str, np.ndarray]


class TrainBatches(Iterator[Batch]):
    """An endless iterator over training batches, whose position can be read and set."""

    def __init__(self, batches: grain.MapDataset[Batch], threads: int, identity: dict[str, Any]) -> None:
        self._iterator = batches.to_iter_dataset(_read_options(threads)).__iter__()
        self._identity = identity

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out, as plain JSON values."""
        return {**self._identity, "position": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `get_state` was called. Raises `UserError` if that was another order of samples."""
        for key, value in self._identity.items():
            if state.get(key, value) != value:
                raise UserError(f"the saved data position is for {key} {state[key]}, this run has {value}")
        self._iterator.set_state(state["position"])

    def close(self) -> None:
        """Stop the threads that read ahead."""
        self._iterator.close()


def train_batches(dataset: Dataset, config: DataConfig, *, batch_size: int, channels: int, seed: int) -> TrainBatches:
    """Endless batches of `dataset.of("train")`, each epoch in a new order that depends on `seed` alone.

    Each batch: image uint8 (N, H, W, C); mask uint8 (N, H, W), class indices, or shares of 255 with
    `config.soft_masks`; index int32 (N,) into `dataset.of("train")`; epoch int32 (N,). A batch may span two epochs,
    so that every one is full. Raises `UserError` without training images.
    """
    samples = dataset.of("train")
    if not samples:
        raise UserError(f"--data.root {config.root}: no training images: {split_counts(dataset.samples)}")
    source = _Source(dataset, samples, config, channels)
    count = len(samples)

    @lru_cache(maxsize=4)  # reading ahead spans a few epochs at most, unless they are tiny
    def order(epoch: int) -> np.ndarray:
        return epoch_order(count, seed, epoch)

    def load(number: int, _: int) -> Batch:
        places = [divmod(position, count) for position in range(number * batch_size, (number + 1) * batch_size)]
        index = np.array([order(epoch)[place] for epoch, place in places])
        image, mask = source[index]
        return {
            "image": image,
            "mask": mask,
            "index": index.astype(np.int32),
            "epoch": np.array([epoch for epoch, _ in places], np.int32),
        }

    # A batch at a time: Grain's work for each element is more than copying an image out of memory takes.
    batches = grain.MapDataset.range(1).repeat().map_with_index(load)
    return TrainBatches(batches, config.threads, {"images": count, "batch_size": batch_size, "seed": seed})


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) int64: a permutation of the samples for each epoch, the same on every machine.

    Grain's own shuffle takes about a millisecond for each sample of a small dataset, longer than a training step has.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


def eval_batches(
    dataset: Dataset, split: str, config: DataConfig, *, batch_size: int, channels: int
) -> Iterator[Batch]:
    """Every sample of a split ("all": of every split) once, in order.

    Each batch: image, mask and index as in `train_batches`; valid bool (N,), false for what fills up the last batch:
    black images, masks all `IGNORE` (0 if soft), index 0.
    """
    samples = dataset.of(split)
    source = _Source(dataset, samples, config, channels)
    height, width = config.height_width

    def load(batch: int) -> Batch:
        chosen = np.arange(batch * batch_size, min((batch + 1) * batch_size, len(samples)))
        image = np.zeros((batch_size, height, width, channels), np.uint8)
        mask = np.full((batch_size, height, width), 0 if config.soft_masks else IGNORE, np.uint8)
        index = np.zeros(batch_size, np.int32)
        image[: len(chosen)], mask[: len(chosen)] = source[chosen]
        index[: len(chosen)] = chosen
        return {"image": image, "mask": mask, "index": index, "valid": np.arange(batch_size) < len(chosen)}

    batches = grain.MapDataset.range(-(-len(samples) // batch_size)).map(load)
    iterator = batches.to_iter_dataset(_read_options(config.threads)).__iter__()
    try:
        yield from iterator
    finally:
        iterator.close()


def position_after(batches: int) -> dict[str, Any]:
    """The position of `TrainBatches` after so many batches; nothing in it says of which data."""
    return {"position": {"next_index": batches}}


class _Source:
    """Resized images and masks of `samples`; kept with the dataset where `config.cache` says so."""

    def __init__(self, dataset: Dataset, samples: tuple[Sample, ...], config: DataConfig, channels: int) -> None:
        self._all, self._coding = dataset.samples, dataset.coding
        self._size, self._channels, self._soft = config.height_width, channels, config.soft_masks
        place = {sample.id: row for row, sample in enumerate(self._all)}
        self._rows = np.array([place[sample.id] for sample in samples], np.int64)
        self._cache = None
        if keeps(config, len(self._all), channels):
            self._cache = dataset.cache(self._size, channels, soft=self._soft)

    def __getitem__(self, index: np.ndarray) -> Resized:
        """Images (N, H, W, C) and masks (N, H, W) of the samples `index` (N,)."""
        rows = self._rows[index]
        if self._cache is not None:
            return self._cache.take(rows, self._read)
        images, masks = zip(*(self._read(row) for row in rows.tolist()), strict=True)
        return np.stack(images), np.stack(masks)

    def _read(self, row: int) -> Resized:
        sample = self._all[row]
        image = resize_image(read_image(sample.image, self._channels), self._size)
        if sample.mask is None:
            return image, np.full(self._size, 0 if self._soft else IGNORE, np.uint8)
        if self._soft:
            return image, resize_soft_mask(read_soft_mask(sample.mask, self._coding), self._size)
        return image, resize_mask(read_mask(sample.mask, self._coding), self._size)


def _read_options(threads: int) -> grain.ReadOptions:
    """Batches are made ahead in as many threads; the order is the same for any number."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
