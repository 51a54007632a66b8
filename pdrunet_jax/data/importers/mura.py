"""The two kinds of masks that MURA's images come with: drawn in LabelMe, or images of their own coding.

MURA's folders: its images by their paths, and masks that go by such paths.

MURA's radiographs, and masks from elsewhere that go by MURA's paths, to a dataset folder by reference.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.folder import files_below, some
from pdrunet_jax.data.images import SUFFIXES, decode_image, read_bytes
from pdrunet_jax.data.importers.common import (
    LabelTable,
    check_classes,
    label_table,
    save_index_mask,
    write_description,
    write_manifest,
)
from pdrunet_jax.data.importers.labelme import Boxes, Survey
from pdrunet_jax.data.labelme.read import Annotation, rasterise, read_annotation
from pdrunet_jax.data.masks import IGNORE, UndeclaredError, codes_to_classes, declare, decode_codes, resolve
from pdrunet_jax.data.split import assign, overlaps, together
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import new_folder, require_vacant


def annotated_path(path: Path, name: str) -> str | None:
    """`imagePath` of a LabelMe file without the extension, as words: it is never opened. None for other JSON.

    Raises `DataError`.
    """
    annotation = read_annotation(path, name)
    if annotation is None:
        return None
    return str(PurePosixPath(annotation.image_path.replace("\\", "/")).with_suffix(""))


class DrawnMasks:
    """LabelMe files: `add` every one, `settle`, then `read`."""

    def __init__(self, classes: Mapping[str, int | str], boxes: Boxes) -> None:
        numbers = {label: value for label, value in classes.items() if isinstance(value, int)}
        if len(numbers) < len(classes):
            raise UserError("--classes: LabelMe labels become numbers, such as --classes humerus 1 ulna 2")
        check_classes(numbers)
        self._declared, self._boxes = numbers, boxes
        self._table = LabelTable({}, {})
        self._survey = Survey()

    def add(self, path: Path, size: tuple[int, int], name: str) -> None:
        """Check the mask of an image of `size` (height, width). Raises `DataError`."""
        shapes = self._survey.add(_read(path, size, name), self._boxes).shapes
        rasterise(shapes, dict.fromkeys((shape.label for shape in shapes), 1), size, name)

    def settle(self) -> list[str]:
        """Decide what the labels become; returns what is wrong."""
        self._table = label_table(self._survey.labels, self._declared)
        return list(self._table.problems)

    def read(self, path: Path, size: tuple[int, int], name: str) -> NDArray[np.uint8]:
        """(H, W) class indices, or rather mask values. Raises `DataError`."""
        annotation = Survey().add(_read(path, size, name), self._boxes)
        return rasterise(annotation.shapes, self._table.index_of, size, name)

    @property
    def classes(self) -> dict[str, int]:
        """Class names with their values in what `read` returns."""
        return self._table.classes

    @property
    def ignores(self) -> bool:
        """Whether `read` may return `IGNORE`."""
        return any(self._table.index_of.get(label) == IGNORE for label in self._survey.labels)

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return [*self._table.notes, *self._survey.notes()]


class ImageMasks:
    """Mask images in any coding that a dataset may have: `add` every one, `settle`, then `read`."""

    def __init__(
        self, classes: Mapping[str, int | str], ignore: int | str | None, threshold: int | None = None
    ) -> None:
        if threshold is not None and not 0 < threshold < 256:
            raise UserError(f"--threshold {threshold} is no grey value from 1 to 255")
        self._coding = declare(classes, ignore, threshold, source="--classes")
        self._found: list[tuple[str, dict[int, int]]] = []
        self.notes: list[str] = []

    def add(self, path: Path, size: tuple[int, int], name: str) -> None:
        """Check the mask of an image of `size` (height, width). Raises `DataError`."""
        codes = decode_codes(read_bytes(path, name), name, self._coding)
        if codes.shape != size:
            is_size = f"{codes.shape[1]}x{codes.shape[0]} pixels"
            raise DataError("mask", [f"{name}: {is_size}, but the image has {size[1]}x{size[0]}"])
        values, counts = np.unique(codes, return_counts=True)
        self._found.append((name, {int(value): int(count) for value, count in zip(values, counts, strict=True)}))

    def settle(self) -> list[str]:
        """Decide what the masks' values mean; returns what is wrong."""
        try:
            self._coding, self.notes = resolve(self._coding, self._found)
        except UndeclaredError as error:
            return error.problems
        return []

    def read(self, path: Path, size: tuple[int, int], name: str) -> NDArray[np.uint8]:
        """(H, W) class indices. Raises `DataError`."""
        return codes_to_classes(decode_codes(read_bytes(path, name), name, self._coding), self._coding, name)

    @property
    def classes(self) -> dict[str, int]:
        """Class names with their values in what `read` returns."""
        return {name: index for index, name in enumerate(self._coding.names, start=1)}

    @property
    def ignores(self) -> bool:
        """Whether `read` may return `IGNORE`."""
        return bool(self._coding.ignore)


def _read(path: Path, size: tuple[int, int], name: str) -> Annotation:
    annotation = read_annotation(path, name)
    if annotation is None:
        raise DataError("unreadable annotation", [f"{name}: JSON, but no LabelMe file"])
    annotation.check_size(*size, "the image")
    return annotation


_VIEW = re.compile(
    r"(?:(?P<split>train|valid)[/_.-]+)?"
    r"(?:(?P<region>XR[_-][A-Z]+)[/_.-]+)?"
    r"(?P<patient>patient\d+)[/_.-]+"
    r"(?P<study>study\d+)(?:[_-](?P<finding>positive|negative))?[/_.-]+"
    r"(?P<image>image\d+)(?:_mask|_seg|_label)?$",
    re.IGNORECASE,
)
"""MURA's path of an image without its extension, also with other separators, or without its first folders."""


@dataclass(frozen=True)
class View:
    """One of MURA's images."""

    split: str
    """ "train" or "valid": MURA's own."""
    region: str
    patient: str
    study: str
    finding: str
    image: str
    path: Path

    @property
    def name(self) -> str:
        """MURA's relative path, without the extension."""
        study = f"{self.study}_{self.finding}" if self.finding else self.study
        return f"{self.split}/{self.region}/{self.patient}/{study}/{self.image}"


def mura_root(source: Path, masks: Path) -> Path:
    """The folder with MURA's train/ and valid/: `source`, or the one in it. Raises `UserError` if there is none.

    The folder of `masks` may look like MURA's, and is not.
    """
    if _is_root(source):
        return source
    inside = sorted(source.iterdir()) if source.is_dir() else []
    found = [folder for folder in inside if _is_root(folder) and folder.resolve() != masks.resolve()]
    if len(found) > 1:
        raise UserError(f"{source} has several folders like MURA: {', '.join(map(str, found))}; name one")
    if not found:
        raise UserError(
            f"{source} is not MURA: it has no train/XR_* and no valid/XR_*, nor has a folder in it.\n"
            "MURA is free of charge after registration: https://stanfordmlgroup.github.io/competitions/mura/"
        )
    return found[0]


def _is_root(folder: Path) -> bool:
    return any(path.is_dir() for split in ("train", "valid") for path in (folder / split).glob("XR_*"))


def find_views(root: Path, regions: Iterable[str]) -> list[View]:
    """MURA's images of `regions`, in the order of their paths."""
    views = []
    for split in ("train", "valid"):
        for region in regions:
            folder = root / split / region
            for path in files_below(folder) if folder.is_dir() else ():
                match = _VIEW.fullmatch(path.relative_to(root).with_suffix("").as_posix())
                if match and path.suffix.lower() in SUFFIXES:
                    parts = {key: str(value or "").lower() for key, value in match.groupdict().items()}
                    views.append(View(**{**parts, "split": split, "region": region}, path=path))
    return views


def match_masks(
    folder: Path, views: Sequence[View], regions: Sequence[str]
) -> tuple[dict[View, Path], list[str], list[str]]:
    """The mask of each view that has one, what the log should say, and what is wrong.

    If there are LabelMe files, they are the masks, and images beside them are not.
    """
    candidates, problems = _candidates(folder, views)
    by_core: dict[tuple[str, str, str], list[View]] = defaultdict(list)
    for view in views:
        by_core[view.patient, view.study, view.image].append(view)
    matched: dict[View, Path] = {}
    elsewhere: Counter[str] = Counter()
    for path, words in candidates:
        name = path.relative_to(folder).as_posix()
        match = _VIEW.search(words)
        if not match:
            problems.append(f"{name}: {words} is no path of an image in MURA")
            continue
        named = {key: (value or "").lower() for key, value in match.groupdict().items()}
        region = named["region"].replace("-", "_").upper()
        if region and region not in regions:
            elsewhere[region] += 1
            continue
        found = [
            view
            for view in by_core.get((named["patient"], named["study"], named["image"]), [])
            if named["split"] in ("", view.split)
            and named["finding"] in ("", view.finding)
            and region in ("", view.region)
        ]
        if len(found) != 1:
            where = ", ".join(view.name for view in found)
            reason = f"fits several images: {where}" if found else f"a mask without an image ({match.group(0)})"
            problems.append(f"{name}: {reason}")
        elif found[0] in matched:
            first = matched[found[0]].relative_to(folder).as_posix()
            problems.append(f"{name}: {found[0].name} has a mask already: {first}")
        else:
            matched[found[0]] = path
    notes = [f"{count} masks of {region} are left out: not asked for" for region, count in sorted(elsewhere.items())]
    return matched, notes, problems


def _candidates(folder: Path, views: Sequence[View]) -> tuple[list[tuple[Path, str]], list[str]]:
    """The masks below `folder`, each with the words that may be MURA's path, and what is wrong."""
    originals = {os.path.realpath(view.path) for view in views}
    drawn: list[tuple[Path, str]] = []
    images: list[tuple[Path, str]] = []
    problems: list[str] = []
    for path in files_below(folder):
        name = path.relative_to(folder)
        words: str | None = name.with_suffix("").as_posix()
        if path.suffix.lower() == ".json":
            try:
                if not _VIEW.search(str(words)):
                    words = annotated_path(path, name.as_posix())
            except DataError as error:
                problems += error.problems
                continue
            if words is not None:
                drawn.append((path, words))
        elif path.suffix.lower() in SUFFIXES and os.path.realpath(path) not in originals:
            images.append((path, str(words)))
    return drawn or images, problems


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
