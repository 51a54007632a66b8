"""Write the dataset folder of an importer: images, index masks, manifest and description, or nothing at all."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from pdrunet_jax.data.images import SUFFIXES, decode_image, read_bytes
from pdrunet_jax.data.importers.common import (
    LabelTable,
    Source,
    Target,
    check_classes,
    label_table,
    write_description,
    write_mask,
)
from pdrunet_jax.data.importers.files import Images, check_encoding, split_of, stem_of, writable
from pdrunet_jax.data.labelme.raster import rasterise_counted
from pdrunet_jax.data.labelme.read import Shape
from pdrunet_jax.data.manifest import write_manifest
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.data.walk import some
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import new_folder, require_vacant


@dataclass(frozen=True)
class ImportOptions:
    """Options of every importer."""

    source: Source
    """Folder with the annotations and the images."""
    dst: Target
    """Dataset folder to write; must be empty or not exist."""
    classes: dict[str, int] = field(default_factory=dict)
    """Labels with mask values 1 to 254 (0 background, 255 ignored); by default numbered alphabetically.
    CLASS=LABEL,LABEL joins labels in a class: --classes bone=femur,tibia 1."""
    images: Path | None = None
    """Folder with the images, if it is not in SOURCE."""
    unlabelled: Literal["skip", "background"] = "skip"
    """Images without an annotation: leave them out, or take them as background only."""
    by_reference: bool = False
    """Refer to the images by their absolute paths instead of copying them."""
    encoding: str = "utf-8"
    """Encoding of annotation files that are not UTF-8, such as gb18030."""

    def check(self) -> None:
        """Raise `UserError` unless the options can be carried out."""
        check_classes(self.classes)
        check_encoding(self.encoding)
        require_vacant(self.dst)
        for option, folder in (("SOURCE", self.source), ("--images", self.images)):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{folder} is not a folder; {option} is the one with the annotations or images")

    def find_images(
        self, suffixes: Iterable[str] = SUFFIXES, is_mask: Callable[[str], bool] = lambda name: False
    ) -> Images:
        """The image files of the source. `is_mask` says which paths below it are masks."""
        if self.images is not None:
            return Images(self.images, suffixes)
        return Images(self.source, suffixes, is_mask)


@dataclass(frozen=True)
class Drawing:
    """An image of the source and what is drawn on it. Nothing is decoded yet."""

    name: str
    """The annotation, in messages."""
    image: str
    """POSIX path of the image below the source; names the copy and the mask."""
    labels: tuple[str, ...]
    """Labels of the shapes."""
    shapes: Callable[[], Sequence[Shape]]
    """Reads the shapes, later over earlier ones. Raises `DataError`."""
    size: tuple[int | None, int | None] = (None, None)
    """Height and width that the annotation states."""
    data: Callable[[], tuple[bytes, str]] | None = None
    """Content of an image that is no file of its own, and the extension that it gets. Raises `DataError`."""
    split: str | None = None
    """The split, if the source declares one other than by folders."""


def write_dataset(
    options: ImportOptions,
    drawings: Sequence[Drawing],
    images: Images,
    notes: Sequence[str] = (),
    problems: Sequence[str] = (),
    classes: dict[str, int] | None = None,
) -> list[str]:
    """Write the dataset folder `options.dst`, completely or not at all; returns remarks for the user.

    `problems` are those found so far; `classes` declare labels where the options do not. Raises `DataError` with all.
    """
    problems = list(problems)
    if problems and not images.names:
        problems.append(f"{images.root} has no image; name the folder of the images with --images")
    first: dict[str, str] = {}
    for drawing in drawings:
        if drawing.image in first:
            problems.append(f"{drawing.name}: {drawing.image} is already annotated in {first[drawing.image]}")
        if not writable(drawing.image):
            problems.append(f"{drawing.image!a}: the name of an image must be printable text; rename the file")
        first.setdefault(drawing.image, drawing.name)
    left = [name for name in images.names if name not in first]
    if options.unlabelled == "background":
        drawings = [*drawings, *(Drawing(name, name, (), tuple) for name in left)]
    found: dict[str, list[str]] = defaultdict(list)
    for drawing in drawings:
        for label in dict.fromkeys(drawing.labels):
            found[label].append(drawing.name)
    table = label_table(found, options.classes or classes or {})
    writer = _Writer(options, images.root, drawings, {label: table.index_of.get(label, 0) for label in found})
    with new_folder(options.dst) as folder:
        rows = writer.write_all(folder, problems)
        if found:
            problems += table.problems
        elif not problems:
            problems = ["; ".join([*table.problems, *notes])]
        if problems:
            raise DataError(f"{options.source}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)
        splits, more = _splits(drawings)
        rows = [{**row, "split": split} for row, split in zip(rows, splits, strict=True)] if splits else rows
        write_manifest(folder, rows)
        ignore = IGNORE if IGNORE in (table.index_of[label] for label in found) else None
        write_description(folder, options.source.resolve().name, table.classes, ignore=ignore)
    result = [*table.notes, *notes, *images.notes(), *more, *writer.notes()]
    if left and options.unlabelled == "skip":
        result.append(
            f"{len(left)} images without an annotation are left out: {some(left)} (--unlabelled background takes them "
            "as images without any class)"
        )
    return [*result, *table_lines(table, found, len(rows))]


def table_lines(table: LabelTable, found: dict[str, list[str]], images: int) -> list[str]:
    """The classes with their values and the number of annotated images, one line each."""
    lines = []
    for name, value in table.classes.items():
        labels = [label for label in found if table.index_of.get(label) == value]
        count = len({file for label in labels for file in found[label]})
        lines.append(f"class {value}   {name}: in {count} annotations")
    return [*lines, f"{images} images, classes {', '.join(table.classes)}"]


def _splits(drawings: Sequence[Drawing]) -> tuple[list[str] | None, list[str]]:
    """The split of each drawing, by its own word or its folders, and a remark; None if none is declared."""
    splits = [drawing.split or split_of(drawing.image) or split_of(drawing.name) for drawing in drawings]
    names = sorted({split for split in splits if split})
    kept = [split for split in splits if split]
    if len(kept) < len(splits) and kept:
        lost = [drawing.image for drawing, split in zip(drawings, splits, strict=True) if not split]
        return None, [f"{len(kept)} images are in folders of a split, but not {some(lost)}: no split is kept"]
    if len(names) < 2:
        return None, [f"all images are in {names[0]}: no split is kept"] if names else []
    return kept, [f"splits of the source are kept: {', '.join(f'{kept.count(name)} {name}' for name in names)}"]


class _Writer:
    """Writes images and masks to a dataset folder, one after another."""

    def __init__(
        self, options: ImportOptions, root: Path, drawings: Sequence[Drawing], index_of: dict[str, int]
    ) -> None:
        self._options, self._root, self._drawings, self._index_of = options, root, drawings, index_of
        names = [drawing.image for drawing in drawings]
        # If all images are in a folder images/ already, they must not end up in images/images/.
        self._strip = len("images/") if all(name.startswith("images/") for name in names) else 0
        self._stems = Counter(_stem(name).casefold() for name in names)
        self._taken = set(names)
        self._overlaps: dict[str, int] = {}

    def write_all(self, folder: Path, problems: list[str]) -> list[dict[str, str]]:
        """Write everything below `folder`; returns the manifest's rows. Problems are added to `problems`."""
        rows = []
        for drawing in self._drawings:
            try:
                rows.append(self._write(folder, drawing))
            except DataError as error:
                problems += error.problems
        return rows

    def notes(self) -> list[str]:
        """A remark on classes that overlap."""
        if not self._overlaps:
            return []
        where = f"in {len(self._overlaps)} images ({sum(self._overlaps.values())} pixels)"
        return [f"shapes of several classes overlap {where}; the later shape counts: {some(list(self._overlaps))}"]

    def _write(self, folder: Path, drawing: Drawing) -> dict[str, str]:
        image, path = drawing.image, self._root / drawing.image
        stem = _stem(image) if self._stems[_stem(image).casefold()] == 1 else image
        if drawing.data is None:
            data = read_bytes(path, image)
        else:
            data, suffix = drawing.data()
            image = _stem(image) + suffix if _stem(image) + suffix not in self._taken - {image} else image + suffix
        height, width = decode_image(data, image)[0].shape[:2]
        stated = tuple(theirs or ours for theirs, ours in zip(drawing.size, (height, width), strict=True))
        if stated != (height, width):
            reason = f"drawn on {stated[1]}x{stated[0]} pixels, but {image} has {width}x{height}"
            raise DataError("annotation", [f"{drawing.name}: {reason}"])
        mask, overlap = rasterise_counted(drawing.shapes(), self._index_of, (height, width), drawing.name)
        if overlap:
            self._overlaps[drawing.image] = overlap
        masks = f"masks/{stem[self._strip :]}.png"
        write_mask(mask, folder / masks)
        if self._options.by_reference and drawing.data is None:
            return {"image": Path(os.path.abspath(path)).as_posix(), "mask": masks}
        copy = folder / "images" / image[self._strip :]
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)
        return {"image": copy.relative_to(folder).as_posix(), "mask": masks}


def _stem(image: str) -> str:
    return str(PurePosixPath(image).with_name(stem_of(image)))
