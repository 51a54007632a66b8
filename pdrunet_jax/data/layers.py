"""Classes that overlap (`data.multilabel`): masks of one layer a class, from one file an image or one a class.

A mask of layers is (H, W, K) uint8: layer i holds 1 where class i + 1 is, else 0; `IGNORE` and `PADDING` as in masks of
class indices, which are (H, W). The functions here take either.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pdrunet_jax.data.damage import unreadable
from pdrunet_jax.data.folder import SPLIT_FOLDERS, LayoutResult, Pair
from pdrunet_jax.data.images import SUFFIXES, read_bytes
from pdrunet_jax.data.manifest import MANIFEST
from pdrunet_jax.data.masks import IGNORE, PADDING, MaskCoding, _unknown_values, decode_codes, read_mask, resolve
from pdrunet_jax.data.walk import files_below
from pdrunet_jax.runtime.errors import DataError, UserError

if TYPE_CHECKING:
    from pdrunet_jax.data.split import Sample

MOST_LAYERS = 8
"""Most classes that may overlap: predictions are written as the bits of an 8-bit image."""

LAYER = 1 << 26
"""Codes of layer i in `ScanResult.codes` are raised by i times this, more than any code."""


@dataclass(frozen=True)
class LayersCoding(MaskCoding):
    """Coding of masks whose classes overlap: a code may belong to several classes."""

    files: tuple[MaskCoding, ...] = ()
    """Coding of each class's own files; empty if one file an image holds all classes."""

    def shares(self, codes: dict[int, int]) -> list[float]:
        """Shares of background (NaN for one file a class) and each class, ignored pixels excluded."""
        if self.files:
            return [np.nan, *(_share(coding, _of_layer(codes, place)) for place, coding in enumerate(self.files))]
        counted = {code: count for code, count in codes.items() if code not in self.ignore}
        total = max(1, sum(counted.values()))
        none = sum(count for code, count in counted.items() if code in self.background)
        parts = [sum(count for code, count in counted.items() if code in values) for _, values in self.classes]
        return [part / total for part in (none, *parts)]


def find_layers(root: Path, names: Sequence[str]) -> tuple[LayoutResult, tuple[str, ...]] | None:
    """Pair images with one mask file a class: `masks/CLASS/NAME.png` or `masks/NAME_CLASS.png`.

    `names` are the declared classes; without them, the folders in masks/ are the classes. Images and masks may be in
    folders of a split. Returns the pairs and the classes; None if no mask belongs to one class, or if there is a
    manifest, which lists one mask file an image.
    """
    if (root / MANIFEST).is_file():
        return None
    split_of = {name: split for split, spellings in SPLIT_FOLDERS.items() for name in spellings}
    places = [(split, root / name) for name, split in split_of.items() if (root / name / "masks").is_dir()]
    places = places or [("", root)]
    folders = {place: _class_folders(place) for _, place in places if (place / "masks").is_dir()}
    names = tuple(names) or tuple(sorted({name for found in folders.values() for name in found}))
    found = LayoutResult("one mask file a class")
    for split, place in places if names else ():
        if (place / "images").is_dir() and (place / "masks").is_dir():
            _pair(root, place, names, split or None, found)
    return (found, names) if found.pairs else None


def declared_layers(declared: MaskCoding, names: Sequence[str], *, files: bool) -> LayersCoding:
    """The coding of overlapping classes that `declare` found, before any mask is read. Raises `UserError`."""
    if not names:
        raise UserError(
            "data.multilabel needs classes: declare them with the values of their masks, or give each class a folder "
            "of masks, masks/CLASS/NAME.png"
        )
    if not 2 <= len(names) <= MOST_LAYERS:
        raise UserError(f"data.multilabel takes 2 to {MOST_LAYERS} classes, not {len(names)} ({', '.join(names)})")
    codes = dict(declared.classes)
    own = [((name, codes[name]),) if name in codes else () for name in names]
    each = tuple(MaskCoding(classes, declared.ignore, declared.background, declared.threshold) for classes in own)
    classes = tuple((name, codes.get(name, ())) for name in names)
    return LayersCoding(classes, declared.ignore, declared.background, None, each if files else ())


def resolve_layers(coding: LayersCoding, found: Sequence[tuple[str, dict[int, int]]]) -> tuple[LayersCoding, list[str]]:
    """As `masks.resolve`, each class's own files on their own."""
    if not coding.files:
        resolved, notes = resolve(coding, found)
        assert isinstance(resolved, LayersCoding)
        return resolved, notes
    files, notes, problems = [], [], []
    for place, (name, each) in enumerate(zip(coding.names, coding.files, strict=True)):
        counts = [(f"{mask} ({name})", part) for mask, codes in found if (part := _of_layer(codes, place))]
        try:
            own, more = resolve(each, counts)
            files.append(replace(own, classes=((name, own.classes[0][1] if own.classes else ()),)))
            notes += [f"{name}: {line}" for line in more]
            if absent := len(found) - len(counts):
                notes.append(f"{name}: {absent} images have no mask of it and count as images without it")
        except DataError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    if problems:
        raise DataError("undeclared mask values", problems)
    return replace(coding, files=tuple(files)), notes


def coding_of(coding: MaskCoding, place: int) -> MaskCoding:
    """The coding of a file of `Pair.mask_files`."""
    return coding.files[place] if isinstance(coding, LayersCoding) and coding.files else coding


def read_truth(sample: "Sample", coding: MaskCoding) -> np.ndarray:
    """A sample's mask, upright, uint8: (H, W) class indices, or (H, W, K) if classes overlap. Raises `DataError`."""
    if not isinstance(coding, LayersCoding):
        return read_mask(sample.mask, coding)
    if not sample.layers:
        return _codes_to_layers(
            decode_codes(read_bytes(sample.mask, str(sample.mask)), str(sample.mask), coding), coding
        )
    read = [read_mask(path, each) if path else None for path, each in zip(sample.layers, coding.files, strict=True)]
    shape = next(mask.shape for mask in read if mask is not None)
    return np.stack([np.zeros(shape, np.uint8) if mask is None else mask for mask in read], axis=-1)


def region(mask: np.ndarray, index: int) -> np.ndarray:
    """Pixels (H, W), bool, of class `index`, from 1 on, in a mask (H, W) or (H, W, K)."""
    return np.asarray(mask == index if mask.ndim == 2 else mask[..., index - 1] == 1)


def counted(mask: np.ndarray, index: int) -> np.ndarray:
    """Pixels (H, W), bool, that count for class `index`: neither ignored nor padding."""
    return np.asarray((mask if mask.ndim == 2 else mask[..., index - 1]) < PADDING)


def to_bits(mask: np.ndarray) -> np.ndarray:
    """A mask of layers as (H, W) uint8: bit i is class i + 1. Class indices (H, W) are returned as they are."""
    if mask.ndim == 2:
        return mask
    weights = (1 << np.arange(mask.shape[-1])).astype(np.uint8)
    return np.asarray(((mask == 1) * weights).sum(axis=-1, dtype=np.uint8))


def _codes_to_layers(codes: np.ndarray, coding: LayersCoding) -> np.ndarray:
    """Convert (H, W) codes to layers. Raises `DataError` that lists undeclared codes."""
    unknown = {int(code) for code in np.unique(codes)} - coding.known
    if unknown:
        raise unreadable("mask", _unknown_values(unknown))
    layers = np.stack([np.isin(codes, values) for _, values in coding.classes], axis=-1).astype(np.uint8)
    layers[np.isin(codes, coding.ignore)] = IGNORE
    return layers


def _of_layer(codes: dict[int, int], place: int) -> dict[int, int]:
    return {code % LAYER: count for code, count in codes.items() if code // LAYER == place}


def _share(coding: MaskCoding, codes: dict[int, int]) -> float:
    """Share of one class's own pixels in its file; 0 without a file."""
    values, total, inside = {code for _, each in coding.classes for code in each}, 0, 0
    for code, count in codes.items():
        if code not in coding.ignore:
            total += count
            soft = code not in coding.known and coding.threshold is not None
            inside += count * (code >= coding.threshold if soft and coding.threshold else code in values)
    return inside / total if total else 0.0


def _class_folders(place: Path) -> list[str]:
    """Folders in masks/ that are not folders of images too."""
    inside = (path.name for path in (place / "masks").iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(name for name in inside if not (place / "images" / name).is_dir())


def _pair(root: Path, place: Path, names: Sequence[str], split: str | None, found: LayoutResult) -> None:
    """Add the images of `place` with their masks, and the problems of both."""
    masks = _by_key(place / "masks")
    taken: Counter[Path] = Counter()
    for key, images in sorted(_by_key(place / "images").items()):
        image = images[0].relative_to(root).as_posix()
        if len(images) > 1:
            found.problems.append(f"{', '.join(path.relative_to(root).as_posix() for path in images)}: the same name")
            continue
        layers: list[Path | None] = []
        for name in names:
            own = [path for form in (f"{name}/{key}", f"{key}_{name}") for path in masks.get(form, [])]
            if len(own) > 1:
                found.problems.append(f"{image}: several masks of {name}: {', '.join(path.name for path in own)}")
            layers.append(own[0] if own else None)
            taken.update(own)
        if not (first := next(filter(None, layers), None)):
            found.problems.append(f"{image}: no mask of any class, such as masks/{names[0]}/{key}.png")
            continue
        found.pairs.append(Pair(image, root / image, image, first, None, split, layers=tuple(layers)))
    unused = [path for paths in masks.values() for path in paths if path not in taken]
    if found.pairs:
        found.problems += [
            f"{path.relative_to(root).as_posix()}: not a mask of an image and a class ({', '.join(names)})"
            for path in unused
        ]


def _by_key(folder: Path) -> dict[str, list[Path]]:
    """Image files below `folder` by their path in it without the extension."""
    result: dict[str, list[Path]] = defaultdict(list)
    for path in files_below(folder):
        if path.suffix.lower() in SUFFIXES:
            result[path.relative_to(folder).with_suffix("").as_posix()].append(path)
    return result
