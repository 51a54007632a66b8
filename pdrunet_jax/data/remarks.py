"""Remarks of the check: what is allowed in a dataset but may not be what its owner means."""

import math
from collections.abc import Sequence
from statistics import median

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.fit import Fit
from pdrunet_jax.data.folder import DESCRIPTION, SPLITS, Description
from pdrunet_jax.data.masks import MaskCoding
from pdrunet_jax.data.scan import ScanResult, class_shares
from pdrunet_jax.data.split import Sample
from pdrunet_jax.data.walk import some
from pdrunet_jax.model.sides import Pairs, check_pairs, find_pairs

SQUEEZED = 2.0
"""Change of the ratio of an image's sides by resizing from which the check speaks of it."""

LARGER = 1.5
"""Gain of another shape of `data.size`, in pixels of the images, from which it is offered."""

_HOW = f"swap_on_flip in {DESCRIPTION}, or data.swap_on_flip"


def sides(description: Description, config: DataConfig, names: Sequence[str]) -> tuple[Pairs | None, list[str]]:
    """The pairs of classes that change places in a mirror image, with remarks.

    None if some class has a side and no counterpart, and no pairs are declared: images must not be mirrored. Raises
    `UserError` for declared pairs that do not fit the classes.
    """
    declared, source = config.swap_on_flip, "data.swap_on_flip"
    if declared is None and (not config.classes or set(config.classes) == set(description.classes)):
        declared, source = description.swap_on_flip, f"{description.source}: swap_on_flip"
    pairs, alone = find_pairs(names)
    if declared is not None:
        named = {name for pair in declared for name in pair}
        left = [name for name in (*(name for pair in pairs for name in pair), *alone) if declared and name not in named]
        remarks = [f"warning: {', '.join(left)} have a side in their name, but are not in swap_on_flip"] if left else []
        return check_pairs(declared, names, source), remarks
    if alone:
        return None, [
            f"warning: no class is the other side of {', '.join(alone)}: training will not mirror images. Declare the "
            f"pairs of classes that change places in a mirror image, or [] if there are none ({_HOW})"
        ]
    shown = ", ".join(map(" and ".join, pairs))
    return pairs, [f"by their names, {shown} change places in mirror images ({_HOW}, declares others)"] if pairs else []


def counts_by_split(
    samples: Sequence[Sample], scanned: Sequence[ScanResult], coding: MaskCoding
) -> list[dict[str, int]]:
    """For background and each class: the number of masks of each split with images that have it."""
    shares = [class_shares(item.codes, coding) for item in scanned]
    splits = [split for split in SPLITS if any(sample.split == split for sample in samples)]
    pairs = list(zip(samples, shares, strict=True))
    return [
        {split: sum(share[index] > 0 for sample, share in pairs if sample.split == split) for split in splits}
        for index in range(len(coding.classes) + 1)
    ]


def absent_classes(samples: Sequence[Sample], scanned: Sequence[ScanResult], coding: MaskCoding) -> list[str]:
    """A remark for each class that is in no mask, or in none of a split."""
    remarks = []
    for name, counts in zip(coding.names, counts_by_split(samples, scanned, coding)[1:], strict=True):
        missing = [split for split, count in counts.items() if not count]
        if len(missing) == len(counts):
            remarks.append(f"warning: class {name} is in no mask")
        elif missing:
            remarks.append(f"warning: class {name} is in no mask of {' and '.join(missing)}")
    return remarks


def squeezed(names: Sequence[str], scanned: Sequence[ScanResult], fit: Fit) -> list[str]:
    """A remark if stretching to the network's size changes the ratio of sides by more than `SQUEEZED`."""
    if fit.mode == "pad":
        return []
    size = fit.size
    target = size[0] / size[1]
    ratios = [item.size[0] / item.size[1] / target if all(item.size) else 1.0 for item in scanned]
    changes = {name: max(ratio, 1 / ratio) for name, ratio in zip(names, ratios, strict=True)}
    strong = sorted((name for name, change in changes.items() if change > SQUEEZED), key=lambda name: -changes[name])
    if not strong:
        return []
    tallest = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
    way = "in height" if tallest > 1 else "in width"
    return [
        f"warning: resizing to {size[0]}x{size[1]} (height x width) squeezes {len(strong)} of {len(names)} images by "
        f"more than 2:1, {strong[0]} by {changes[strong[0]]:.1f}:1 {way}; a data.size of their shape, or "
        "data.fit = pad, does not"
    ]


def padded(scanned: Sequence[ScanResult], fit: Fit) -> list[str]:
    """A remark if another shape of about as many pixels would show padded images with `LARGER` times the pixels."""
    shapes = [item.size for item in scanned if all(item.size)]
    if fit.mode == "stretch" or fit.spacing is not None or not shapes:
        return []

    def shown(size: tuple[int, int]) -> int:
        """Pixels of inputs of this size that show the images."""
        boxes = [Fit(size, "pad").box(shape) for shape in shapes]
        return sum(box.height * box.width for box in boxes)

    height, width = fit.size
    side, stretch = math.sqrt(height * width), math.sqrt(median(rows / columns for rows, columns in shapes))
    other = (max(1, round(side * stretch / 16)) * 16, max(1, round(side / stretch / 16)) * 16)
    if shown(other) < LARGER * shown(fit.size):
        return []
    black = 1 - shown(fit.size) / (len(shapes) * height * width)
    return [
        f"data.fit = pad fills {black:.0%} of {height}x{width} (height x width) with black; training at --data.size "
        f"{other[0]} {other[1]}, of about as many pixels, would show these images larger"
    ]


def turned(names: Sequence[str], scanned: Sequence[ScanResult]) -> list[str]:
    """A remark if EXIF turns an image and not its mask, or the other way round, and both sizes agree."""
    odd = [name for name, item in zip(names, scanned, strict=True) if item.turned[0] != item.turned[1]]
    if not odd:
        return []
    return [
        f"warning: EXIF turns the image or its mask, but not both: {some(odd)}; look whether they line up "
        "(data check --output), and draw masks on the upright image"
    ]
