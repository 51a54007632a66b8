"""The split of a dataset that has grown: who was tested on stays there, and only newcomers are drawn."""

from collections import defaultdict

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import Inspection
from pdrunet_jax.data.scan import foreground_share
from pdrunet_jax.data.split import assign, together
from pdrunet_jax.errors import DataError


def continue_split(new: Inspection, old: Inspection, config: DataConfig) -> tuple[dict[str, str], int]:
    """A split for each image of `new`, by its id, and how many images have it from `old`.

    A patient of `old` keeps the split there, and so does an image with the very same pixels. Other patients are drawn
    by the fractions and the seed of `config`. Raises `DataError` that names every patient who would have to be in two.
    """
    of_patient = {sample.patient: sample.split for sample in old.dataset.samples}
    of_pixels = {
        item.pixels: sample.split for sample, item in zip(old.dataset.samples, old.scanned, strict=True) if item.pixels
    }
    samples, pixels = new.dataset.samples, [item.pixels for item in new.scanned]
    groups = together([sample.patient for sample in samples], pixels)
    kept: dict[str, set[str]] = defaultdict(set)
    for group, sample, digest in zip(groups, samples, pixels, strict=True):
        for split in (of_patient.get(sample.patient), of_pixels.get(digest)):
            if split is not None:
                kept[group].add(split)
    torn = [f"{group}: {' and '.join(sorted(splits))}" for group, splits in kept.items() if len(splits) > 1]
    if torn:
        raise DataError(f"patients of {new.dataset.root} are in two splits of {old.dataset.root}", torn)
    fresh = [index for index, group in enumerate(groups) if group not in kept]
    shares = [foreground_share(new.scanned[index].codes, new.dataset.coding) for index in fresh]
    drawn = assign(
        [groups[index] for index in fresh],
        shares,
        val=config.val_fraction,
        test=config.test_fraction,
        seed=config.split_seed,
    )
    chosen = drawn | {group: next(iter(splits)) for group, splits in kept.items()}
    return {sample.id: chosen[group] for sample, group in zip(samples, groups, strict=True)}, len(samples) - len(fresh)
