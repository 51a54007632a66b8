"""Batches of training and evaluation images, read ahead by Grain, with an exact, restorable position."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.cache import Resized, keeps
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.data.fit import Fit
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.layers import read_truth
from pdrunet_jax.data.masks import IGNORE, read_soft_mask, resize_soft_mask
from pdrunet_jax.data.split import Sample, split_counts
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.malloc import cores

if TYPE_CHECKING:
    from pdrunet_jax.data.phantoms.surfaces.training import DrawnAnew

Batch = dict[str, np.ndarray]
Shard = tuple[int, int]
"""(index, count): which shard, counted from 0, and the number of shards."""
ALL: Shard = (0, 1)

_WHOLE = "whole"
_ENDLESS = 1 << 62  # batches; more than any run takes


class TrainBatches(Iterator[Batch]):
    """Endless training batches, number 0, 1, 2, ..., whose position can be read and set.

    The position counts whole batches, so it is the same for every shard and any number of shards.
    """

    index: np.ndarray
    """int32 (batch_size,): sample indices of the last whole batch, other shards included."""

    def __init__(
        self,
        load: Callable[[int], Batch],
        threads: int,
        identity: dict[str, Any],
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Read batch n with `load(n)`, ahead of time in `threads` threads; `identity` describes the data.

        `release` ends what `load` depends on.
        """
        self._load, self._threads, self._identity, self._release = load, threads, identity, release
        self._seek(0)

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._done += 1
        self.index = batch.pop(_WHOLE)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch returned, as plain JSON values."""
        return {**self._identity, **position_after(self._done)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `get_state` was called; raise `UserError` if the samples had another order."""
        for key, value in self._identity.items():
            if state.get(key, value) != value:
                raise UserError(f"the saved data position is for {key} {state[key]}, this run has {value}")
        # Checkpoints of earlier versions hold Grain's own state.
        done = state["position"]["next_index"] if "position" in state else state["batches_done"]
        self._iterator.close()
        self._seek(done)

    def close(self) -> None:
        """Stop the threads that read ahead, and processes that draw images."""
        self._iterator.close()
        self._release()

    def _seek(self, done: int) -> None:
        self._done = done
        # One element is one batch: Grain's work per element takes longer than copying one image out of memory.
        batches = grain.MapDataset.range(done, _ENDLESS).map(self._load)
        self._iterator = batches.to_iter_dataset(_read_options(self._threads)).__iter__()


def position_after(batches: int) -> dict[str, Any]:
    """The position of `TrainBatches` after that many batches; it fits any data."""
    return {"batches_done": batches}


def open_training_data(config: DataConfig) -> Dataset:
    """Open the dataset to train on, with training images from `config.surfaces` if that is set.

    Raises as `open_dataset`, and `UserError` if the surfaces cannot be used.
    """
    dataset = open_dataset(config)
    if config.surfaces is None:
        return dataset
    from pdrunet_jax.data.phantoms.surfaces.training import draws_anew  # with SciPy, which takes a second to import

    return draws_anew(dataset, config)


def train_batches(
    dataset: Dataset, config: DataConfig, *, batch_size: int, channels: int, seed: int, process_shard: Shard = ALL
) -> TrainBatches:
    """Endless batches of `dataset.of("train")`; each epoch has an order of its own, which depends only on `seed`.

    Images that are drawn anew (`dataset.drawn`) have no epochs; their order, too, depends only on `seed`.

    Each batch holds image uint8 (N, H, W, C); mask uint8 (N, H, W), class indices with `IGNORE` and `PADDING`, or
    shares of 255 with `config.soft_masks`, or (N, H, W, K) if classes overlap (see `data/layers.py`); index int32 (N,)
    into `dataset.of("train")`; epoch int32 (N,). Every batch is full: it may span two epochs. N is `batch_size`, or the
    part selected by `process_shard`; images of other shards are not read.

    Raises `UserError` if there are no training images.
    """
    rows = rows_of(process_shard, batch_size)
    if dataset.drawn is not None:
        return _drawn_batches(dataset.drawn, config.threads, batch_size, rows, channels, seed)
    samples = dataset.of("train")
    if not samples:
        raise UserError(f"--data.root {config.root}: no training images: {split_counts(dataset.samples)}")
    source = _Source(dataset, samples, config, channels)
    count = len(samples)

    @lru_cache(maxsize=4)  # reading ahead spans a few epochs at most, unless they are tiny
    def order(epoch: int) -> np.ndarray:
        return epoch_order(count, seed, epoch)

    def load(number: int) -> Batch:
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

    return TrainBatches(load, config.threads, {"images": count, "batch_size": batch_size, "seed": seed})


def _drawn_batches(
    drawn: "DrawnAnew", threads: int, batch_size: int, rows: slice, channels: int, seed: int
) -> TrainBatches:
    """Batches of images that are never repeated; their index and epoch together number them."""
    images, release = drawn.images, lambda: None
    if (count := min(threads, cores())) > 1:
        from pdrunet_jax.data.phantoms.surfaces.drawers import Drawers

        drawers = Drawers(drawn.images, count)
        images, release = drawers, drawers.close

    def load(number: int) -> Batch:
        numbers = np.arange(number * batch_size, (number + 1) * batch_size)
        pictures, masks = zip(*images(numbers[rows].tolist(), seed, channels), strict=True)
        epoch, index = np.divmod(numbers, 1 << 31)
        return {
            "image": np.stack(pictures),
            "mask": np.stack(masks),
            "index": index[rows].astype(np.int32),
            "epoch": epoch[rows].astype(np.int32),
            _WHOLE: index.astype(np.int32),
        }

    return TrainBatches(load, threads, {"images": "drawn", "batch_size": batch_size, "seed": seed}, release)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) int64: the permutation of the samples in an epoch, the same on every machine.

    Grain's own shuffle takes about a millisecond per sample on a small dataset, longer than a training step.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(count)
    return np.argsort(keys, kind="stable")


def rows_of(process_shard: Shard, batch_size: int) -> slice:
    """The rows of a whole batch in one shard; raises `UserError` unless the shards are of equal size."""
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

    Each batch holds image, mask and index as in `train_batches`, and valid bool (N,). The last batch is padded with
    rows that are not valid: black image, mask `IGNORE` (0 with soft masks), index 0. `process_shard` selects a part of
    every batch; `stride` (k, n) only the whole batches k, k + n, k + 2 n, ...
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
        mask = np.full((size, height, width, *dataset.layers), 0 if config.soft_masks else IGNORE, np.uint8)
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


class _Source:
    """Resized images and masks of `samples`, cached with the dataset if `config.cache` says so."""

    def __init__(self, dataset: Dataset, samples: tuple[Sample, ...], config: DataConfig, channels: int) -> None:
        self._dataset, self._all, self._coding = dataset, dataset.samples, dataset.coding
        self._fit, self._channels, self._soft = Fit.of(config), channels, config.soft_masks
        place = {sample.id: row for row, sample in enumerate(self._all)}
        self._rows = np.array([place[sample.id] for sample in samples], np.int64)
        self._cache = None
        if keeps(config, len(self._all), channels, *dataset.layers):
            self._cache = dataset.cache(self._fit, channels, soft=self._soft)

    def __getitem__(self, index: np.ndarray) -> Resized:
        """Images (N, H, W, C) and masks (N, H, W) of the samples `index` (N,)."""
        rows = self._rows[index]
        if self._cache is not None:
            return self._cache.take(rows, self._read)
        images, masks = zip(*(self._read(row) for row in rows.tolist()), strict=True)
        return np.stack(images), np.stack(masks)

    def _read(self, row: int) -> Resized:
        sample = self._all[row]
        spacing = self._dataset.spacing_of(sample) if self._fit.spacing else None
        try:
            image = self._fit.image(read_image(sample.image, self._channels), spacing)
        except DataError:
            raise
        except UserError as error:  # does not name the image
            raise DataError("images do not fit", [f"{sample.id}: {error}"]) from None
        if self._soft:
            return image, resize_soft_mask(read_soft_mask(sample.mask, self._coding), self._fit.size)
        return image, self._fit.mask(read_truth(sample, self._coding), spacing)


def _read_options(threads: int) -> grain.ReadOptions:
    """Make batches ahead in `threads` threads; the order does not depend on their number."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
