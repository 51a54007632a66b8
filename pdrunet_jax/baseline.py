"""What no model should score below: the best that a single grey value can do."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.masks import IGNORE, read_mask


def threshold_baseline(dataset: Dataset, split: str) -> float:
    """Mean Dice of the best global threshold on one split of a dataset with one class, ignored pixels left out."""
    images, masks = [], []
    for sample in dataset.of(split):
        if sample.mask is not None:
            mask = read_mask(sample.mask, dataset.coding)
            valid = mask != IGNORE
            images.append(read_image(sample.image)[..., 0].round().astype(np.uint8)[valid])
            masks.append(mask[valid])
    return threshold_dice(images, masks)


def threshold_dice(images: Sequence[NDArray[np.uint8]], masks: Sequence[NDArray[np.uint8]]) -> float:
    """Mean Dice per image of the best single grey threshold of all, taking its bright or its dark side.

    Chosen and scored on the same images, so it flatters the threshold.

    Args:
        images: any number of grey images, uint8, each of any shape.
        masks: of the same shapes; what is not 0 is foreground.
    """
    return float(np.mean([_scores(image, mask) for image, mask in zip(images, masks, strict=True)], axis=0).max())


def _scores(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Dice of every threshold: the pixels of at least 0..255, then those of at most 0..255."""
    foreground = np.bincount(image[mask > 0].ravel(), minlength=256).astype(np.float64)
    everything = np.bincount(image.ravel(), minlength=256).astype(np.float64)
    hits = np.concatenate([foreground[::-1].cumsum()[::-1], foreground.cumsum()])
    predicted = np.concatenate([everything[::-1].cumsum()[::-1], everything.cumsum()])
    total = predicted + foreground.sum()
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)
