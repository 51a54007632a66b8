"""Classes that overlap (`data.multilabel`): masks of one layer a class, from one file an image or one a class.

A mask of layers is (H, W, K) uint8: layer i holds 1 where class i + 1 is, else 0; `IGNORE` and `PADDING` as in masks of
class indices, which are (H, W). The functions here take either.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from pdrunet_jax.data.damage import unreadable
from pdrunet_jax.data.folder import LayoutResult, Pair, declared_file
from pdrunet_jax.data.images import read_bytes
from pdrunet_jax.data.layouts import Files, Finder
from pdrunet_jax.data.manifest import MANIFEST
from pdrunet_jax.data.masks import IGNORE, PADDING, MaskCoding, decode_codes, read_mask, unknown_values
from pdrunet_jax.data.pairing import layer_keys, layer_mask_keys
from pdrunet_jax.data.resolve import resolve
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
    if declared_file(root, MANIFEST):
        return None
    finder = _LayersFinder(root, names)
    found = finder.find()
    return (found, finder.names) if found.pairs else None


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
    """As `resolve.resolve`, each class's own files on their own."""
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
        name = str(sample.mask)
        return _codes_to_layers(decode_codes(read_bytes(sample.mask, name), name, coding), coding, name)
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


def _codes_to_layers(codes: np.ndarray, coding: LayersCoding, name: str) -> np.ndarray:
    """Convert (H, W) codes to layers. Raises `DataError` that lists the undeclared codes of file `name`."""
    unknown = {int(code) for code in np.unique(codes)} - coding.known
    if unknown:
        raise unreadable(name, unknown_values(unknown))
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


class _LayersFinder(Finder):
    """Finds one mask file a class, in the layouts of folders for images and masks."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        super().__init__(root)
        self.names = tuple(names)
        self._places: list[tuple[Sequence[str], Files, tuple[str, str], str | None]] = []

    def _find(self) -> None:
        super()._find()
        self.names = self.names or tuple(sorted({name for place in self._places for name in _class_folders(*place)}))
        for place in self._places:
            self._pair_layers(*place)

    def _one_folder(self, splits: dict[str, str]) -> None:
        pass

    def _match(
        self, images: Sequence[str], masks: Files, folders: tuple[str, str], split: str | None, *, nnunet: bool = False
    ) -> None:
        self._places.append((images, masks, folders, split))

    def _pair_layers(self, images: Sequence[str], masks: Files, folders: tuple[str, str], split: str | None) -> None:
        """Add the pairs of two folders, and the problems of both."""
        by_key: dict[str, list[str]] = defaultdict(list)
        for path in masks.images:
            for key in layer_mask_keys(path, folders[1]):
                by_key[key].append(path)
        taken = Counter[str]()
        for image in images:
            layers: list[Path | None] = []
            for name in self.names:
                own = sorted({path for key in layer_keys(image, folders[0], name) for path in by_key.get(key, [])})
                if len(own) > 1:
                    self.found.problems.append(f"{image}: several masks of {name}: {', '.join(own)}")
                layers.append(self.root / own[0] if own else None)
                taken.update(own)
            if not (first := next(filter(None, layers), None)):
                example = (
                    f"{folders[1]}/{self.names[0]}/{PurePosixPath(image).stem}.png" if self.names else "masks/CLASS"
                )
                self.found.problems.append(f"{image}: no mask of any class, such as {example}")
                continue
            self.found.pairs.append(Pair(image, self.root / image, image, first, None, split, layers=tuple(layers)))
        self.found.problems += [
            f"{path}: a mask of several images"
            if taken[path]
            else f"{path}: not a mask of an image and a class ({', '.join(self.names)})"
            for path in masks.images
            if taken[path] != 1
        ]


def _class_folders(images: Sequence[str], masks: Files, folders: tuple[str, str], split: str | None) -> set[str]:
    """Folders of masks that are not folders of images too."""
    inside = [
        {
            PurePosixPath(path).relative_to(folder).parts[0]
            for path in paths
            if PurePosixPath(path).parent.as_posix() != folder
        }
        for paths, folder in zip((images, masks.images), folders, strict=True)
    ]
    return inside[1] - inside[0]
