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
from pdrunet_jax.data.split import Sample, split_counts
from pdrunet_jax.runtime.errors import UserError

Batch = dict[str, np.ndarray]
Shard = tuple[int, int]
"""Which one, counted from 0, and of how many."""
ALL: Shard = (0, 1)


_WHOLE = "whole"


class TrainBatches(Iterator[Batch]):
    """An endless iterator over training batches, whose position can be read and set.

    The position is that of the whole batches: it is the same for every share, and for any number of shares.
    """

    index: np.ndarray
    """int32 (batch_size,): the samples of the whole batch that was handed out last, of which it may be a share."""

    def __init__(self, batches: grain.MapDataset[Batch], threads: int, identity: dict[str, Any]) -> None:
        self._iterator = batches.to_iter_dataset(_read_options(threads)).__iter__()
        self._identity = identity

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.index = batch.pop(_WHOLE)
        return batch

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


def train_batches(
    dataset: Dataset, config: DataConfig, *, batch_size: int, channels: int, seed: int, process_shard: Shard = ALL
) -> TrainBatches:
    """Endless batches of `dataset.of("train")`, each epoch in a new order that depends on `seed` alone.

    Each batch: image uint8 (N, H, W, C); mask uint8 (N, H, W), class indices, or shares of 255 with
    `config.soft_masks`; index int32 (N,) into `dataset.of("train")`; epoch int32 (N,). A batch may span two epochs,
    so that every one is full. N is `batch_size`, or
    the part of it that `process_shard` selects; other images are not read.
    Raises `UserError` without training images.
    """
    samples = dataset.of("train")
    if not samples:
        raise UserError(f"--data.root {config.root}: no training images: {split_counts(dataset.samples)}")
    source = _Source(dataset, samples, config, channels)
    count = len(samples)

    rows = rows_of(process_shard, batch_size)

    @lru_cache(maxsize=4)  # reading ahead spans a few epochs at most, unless they are tiny
    def order(epoch: int) -> np.ndarray:
        return epoch_order(count, seed, epoch)

    def load(number: int, _: int) -> Batch:
        places = [divmod(position, count) for position in range(number * batch_size, (number + 1) * batch_size)]
        whole = np.array([order(epoch)[place] for epoch, place in places])
        image, mask = source[whole[rows]]
        return {
            "image": image,
            "mask": mask,
            "index": whole[rows].astype(np.int32),
            "epoch": np.array([epoch for epoch, _ in places[rows]], np.int32),
            _WHOLE: whole.astype(np.int32),
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


def rows_of(process_shard: Shard, batch_size: int) -> slice:
    """The rows of a whole batch that are one share of it. Raises `UserError` if it cannot be shared out evenly."""
    number, count = process_shard
    size, rest = divmod(batch_size, count)
    if rest:
        raise UserError(f"a batch of {batch_size} images cannot be shared by {count}: give a multiple of {count}")
    return slice(number * size, (number + 1) * size)


def eval_batches(
    dataset: Dataset,
    split: str,
    config: DataConfig,
    *,
    batch_size: int,
    channels: int,
    process_shard: Shard = ALL,
    stride: Shard = ALL,
) -> Iterator[Batch]:
    """Every sample of a split ("all": of every split) once, in order.

    Each batch: image, mask and index as in `train_batches`; valid bool (N,), false for what fills up the last batch:
    black images, masks all `IGNORE` (0 if soft), index 0. With a `process_shard`, that part of every
    batch; with a `stride` (k, n), only the whole batches k, k + n, k + 2 n, ...
    """
    samples = dataset.of(split)
    source = _Source(dataset, samples, config, channels)
    height, width = config.height_width

    rows = rows_of(process_shard, batch_size)
    size = rows.stop - rows.start

    def load(batch: int) -> Batch:
        first = batch * batch_size + rows.start
        chosen = np.arange(first, min(first + size, len(samples)))
        image = np.zeros((size, height, width, channels), np.uint8)
        mask = np.full((size, height, width), 0 if config.soft_masks else IGNORE, np.uint8)
        index = np.zeros(size, np.int32)
        if len(chosen):
            image[: len(chosen)], mask[: len(chosen)] = source[chosen]
            index[: len(chosen)] = chosen
        return {"image": image, "mask": mask, "index": index, "valid": np.arange(size) < len(chosen)}

    batches = grain.MapDataset.range(stride[0], -(-len(samples) // batch_size), stride[1]).map(load)
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
