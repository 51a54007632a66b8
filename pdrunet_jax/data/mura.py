"""MURA's radiographs, and masks from elsewhere that go by MURA's paths, to a dataset folder by reference."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdrunet_jax.data.images import decode_image, read_bytes
from pdrunet_jax.data.importing import save_index_mask, write_description, write_manifest
from pdrunet_jax.data.labelme import Boxes
from pdrunet_jax.data.layouts import some
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.data.mura_files import View, find_views, match_masks, mura_root
from pdrunet_jax.data.mura_masks import DrawnMasks, ImageMasks
from pdrunet_jax.data.split import assign, overlaps, together
from pdrunet_jax.errors import DataError, UserError
from pdrunet_jax.files import new_folder, require_vacant

REGIONS = ("ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST")

Masks = DrawnMasks | ImageMasks

_LICENCE = (
    "Images: MURA (Stanford ML Group), for research, not to be passed on, hence by reference; "
    "masks: see where they came from"
)


@dataclass(frozen=True)
class _Found:
    """An image that has a mask."""

    view: View
    size: tuple[int, int]
    """(height, width) in pixels."""
    pixels: str
    """Digest of the decoded pixels."""


def import_mura(
    source: Path,
    target: Path,
    regions: Sequence[str],
    masks: Path,
    *,
    classes: Mapping[str, int | str] | None = None,
    ignore: int | str | None = None,
    threshold: int | None = None,
    boxes: Boxes = "drop",
    val_fraction: float = 0.2,
    split_seed: int = 0,
) -> list[str]:
    """Make those of MURA's images that have a mask a dataset folder at `target`, which appears whole or not at all.

    MURA's training patients become train and val, drawn by patient; its validation patients become test. The images
    stay where they are; masks are rewritten as index masks.

    Args:
        source: MURA's folder, with train/ and valid/, or the folder that it lies in.
        target: a folder that does not exist, or is empty.
        regions: such as "XR_HUMERUS".
        masks: folder of LabelMe files or mask images that go by MURA's paths.
        classes: for LabelMe files, labels with mask values; for mask images, class names with values or colours.
        ignore: value or colour in mask images that is left out of loss and metrics.
        threshold: grey value from which a soft-edged mask image counts as foreground, if not 128.
        boxes: "drop" leaves out LabelMe rectangles around another shape of the same label.
        val_fraction: share of MURA's training patients that validate.
        split_seed: seed of that choice.

    Returns what the user should know. Raises `UserError`, or `DataError` with all problems.
    """
    require_vacant(target)
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} is no share from 0 to below 1")
    chosen = list(dict.fromkeys(_region(name) for name in regions))
    root = mura_root(source, masks)
    if not masks.is_dir():
        raise UserError(f"--masks {masks} is no folder; name the one with the LabelMe files or mask images")
    views = find_views(root, chosen)
    if not views:
        raise UserError(f"{root} has no images of {', '.join(chosen)} (train/XR_*/patient*/study*/image*.png)")
    matched, notes, problems = match_masks(masks, views, chosen)
    if not matched and not problems:
        raise UserError(f"--masks {masks}: no LabelMe file and no mask image of {', '.join(chosen)} is in it or below")
    drawn = any(path.suffix.lower() == ".json" for path in matched.values())
    kind: Masks = DrawnMasks(classes or {}, boxes) if drawn else ImageMasks(classes or {}, ignore, threshold)
    found = _survey(views, matched, masks, kind, problems)
    problems += kind.settle() + _split_patients(views)
    if problems:
        raise DataError(f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)
    kept = _without_twins(found, notes)
    with new_folder(target) as folder:
        shares = []
        for item in kept:
            mask = kind.read(matched[item.view], item.size, item.view.name)
            save_index_mask(mask, folder / "masks" / f"{item.view.name}.png")
            counted = mask[mask != IGNORE]
            shares.append(float((counted > 0).mean()) if counted.size else 0.0)
        splits = _splits(kept, shares, val_fraction, split_seed)
        rows = [
            {
                "image": Path(os.path.abspath(item.view.path)).as_posix(),
                "mask": f"masks/{item.view.name}.png",
                "patient": item.view.patient,
                "split": split,
            }
            for item, split in zip(kept, splits, strict=True)
        ]
        write_manifest(folder, rows)
        name = "_".join(["mura", *(region.removeprefix("XR_").lower() for region in chosen)])
        write_description(folder, name, kind.classes, ignore=kind.ignores, licence=_LICENCE)
    without = len(views) - len(matched)
    if without:
        notes.append(f"{without} of {len(views)} images have no mask and are left out")
    return [*notes, *kind.notes, *_counts(rows), f"{len(rows)} images, classes {', '.join(kind.classes)}"]


def _region(name: str) -> str:
    word = name.upper().removeprefix("XR_")
    if word not in REGIONS:
        raise UserError(f"--region {name}: MURA's are {', '.join(f'XR_{region}' for region in REGIONS)}")
    return f"XR_{word}"


def _survey(
    views: Sequence[View],
    matched: Mapping[View, Path],
    folder: Path,
    kind: DrawnMasks | ImageMasks,
    problems: list[str],
) -> list[_Found]:
    """Read every image that has a mask, and check that."""
    found = []
    for view in views:
        if view not in matched:
            continue
        try:
            image, _ = decode_image(read_bytes(view.path, view.name), view.name)
            size = (image.shape[0], image.shape[1])
            found.append(_Found(view, size, hashlib.sha256(repr(size).encode() + image.tobytes()).hexdigest()))
            kind.add(matched[view], size, matched[view].relative_to(folder).as_posix())
        except DataError as error:
            problems += error.problems
    return found


def _split_patients(views: Sequence[View]) -> list[str]:
    """Problems with patients who are in MURA's train and valid."""
    first: dict[tuple[str, str], str] = {}
    for view in views:
        first.setdefault((view.patient, view.split), view.name)
    mixed = overlaps([view.patient for view in views], [view.split for view in views])
    return [
        f"patient in MURA's train and valid: {' and '.join(first[patient, split] for split in splits)}"
        for patient, splits in mixed.items()
    ]


def _without_twins(found: Sequence[_Found], notes: list[str]) -> list[_Found]:
    """Less the images of train whose very pixels are in valid too."""
    tested = {item.pixels for item in found if item.view.split == "valid"}
    twins = [item for item in found if item.view.split == "train" and item.pixels in tested]
    if twins:
        notes.append(f"left out of train, for the same pixels are in valid: {some([t.view.name for t in twins])}")
    return [item for item in found if item not in twins]


def _splits(found: Sequence[_Found], shares: Sequence[float], val_fraction: float, seed: int) -> list[str]:
    """Ours for MURA's: train becomes train and val, by patient; valid becomes test."""
    train = [index for index, item in enumerate(found) if item.view.split == "train"]
    groups = together([found[index].view.patient for index in train], [found[index].pixels for index in train])
    chosen = assign(groups, [shares[index] for index in train], val=val_fraction, test=0.0, seed=seed)
    splits = ["test"] * len(found)
    for index, group in zip(train, groups, strict=True):
        splits[index] = chosen[group]
    return splits


def _counts(rows: Sequence[Mapping[str, str]]) -> list[str]:
    parts = []
    for split in ("train", "val", "test"):
        inside = [row["patient"] for row in rows if row["split"] == split]
        parts.append(f"{len(inside)} images of {len(set(inside))} patients in {split}")
    empty = [split for split in ("train", "test") if not any(row["split"] == split for row in rows)]
    warning = [f"warning: no image with a mask is left for {' and '.join(empty)}"] if empty else []
    return [*warning, ", ".join(parts)]
