"""Batches for the device, by Grain: decoded once, shuffled anew each epoch, and at an exact, restorable position."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import grain
import numpy as np

from pdrunet_jax.config import DataConfig
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

    def load(position: int, _: int) -> Batch:
        epoch, place = divmod(position, count)
        index = order(epoch)[place]
        image, mask = source[index]
        return {
            "image": image,
            "mask": mask,
            "index": np.asarray(index, np.int32),
            "epoch": np.asarray(epoch, np.int32),
        }

    batches = grain.MapDataset.range(count).repeat().map_with_index(load).batch(batch_size, drop_remainder=True)
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
        chosen = range(batch * batch_size, min((batch + 1) * batch_size, len(samples)))
        image = np.zeros((batch_size, height, width, channels), np.uint8)
        mask = np.full((batch_size, height, width), 0 if config.soft_masks else IGNORE, np.uint8)
        index = np.zeros(batch_size, np.int32)
        for row, sample in enumerate(chosen):
            image[row], mask[row] = source[sample]
            index[row] = sample
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
    """Resized image and mask of each sample; kept with the dataset where `config.cache` says so."""

    def __init__(self, dataset: Dataset, samples: tuple[Sample, ...], config: DataConfig, channels: int) -> None:
        self._samples, self._coding = samples, dataset.coding
        self._size, self._channels, self._soft = config.height_width, channels, config.soft_masks
        height, width = self._size
        needed = len(dataset.samples) * height * width * (channels + 1)
        keep = config.cache == "memory" or (config.cache == "auto" and needed <= _memory() // 4)
        self._kept = dataset.decoded.setdefault((self._size, channels, self._soft), {}) if keep else None

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        sample = self._samples[index]
        if self._kept is None:
            return self._read(sample)
        if sample.id not in self._kept:  # two threads may both read it: the same pixels twice
            self._kept[sample.id] = self._read(sample)
        kept: tuple[np.ndarray, np.ndarray] = self._kept[sample.id]
        return kept

    def _read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        image = resize_image(read_image(sample.image, self._channels), self._size)
        if sample.mask is None:
            return image, np.full(self._size, 0 if self._soft else IGNORE, np.uint8)
        if self._soft:
            return image, resize_soft_mask(read_soft_mask(sample.mask, self._coding), self._size)
        return image, resize_mask(read_mask(sample.mask, self._coding), self._size)


def _read_options(threads: int) -> grain.ReadOptions:
    """Batches are made ahead in as many threads; the order is the same for any number."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


def _memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's if that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        total = 8 << 30
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    return min(total, int(limit)) if limit.isdigit() else total
