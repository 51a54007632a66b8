"""A folder of LabelMe files to a dataset folder with index masks."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from pdrunet_jax.data.folder import files_below, some
from pdrunet_jax.data.images import SUFFIXES, decode_image, read_bytes
from pdrunet_jax.data.importers.common import (
    check_classes,
    label_table,
    save_index_mask,
    write_description,
    write_manifest,
)
from pdrunet_jax.data.labelme.read import Annotation, image_location, rasterise, read_annotation, without_boxes
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import new_folder, require_vacant

Boxes = Literal["drop", "keep"]

_SIGNATURES = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"BM", ".bmp"), (b"II", ".tif"), (b"MM", ".tif"))
"""How the image files that may be embedded begin."""


@dataclass
class Survey:
    """What LabelMe files hold, before anything is drawn."""

    labels: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Labels of shapes that are drawn, and the files that have them."""
    boxes: int = 0
    """Rectangles that were dropped as boxes."""
    regions: int = 0
    """Rectangles that are drawn."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Kinds of shapes without an area."""
    empty: list[str] = field(default_factory=list)
    """Files without any shape to draw."""

    def add(self, annotation: Annotation, boxes: Boxes) -> Annotation:
        """Count an annotation; returns it without what is not to be drawn."""
        shapes = annotation.shapes if boxes == "keep" else tuple(without_boxes(annotation.shapes))
        self.boxes += len(annotation.shapes) - len(shapes)
        self.regions += sum(shape.kind == "rectangle" for shape in shapes)
        self.skipped.update(kind for kind, _ in annotation.skipped)
        for label in dict.fromkeys(shape.label for shape in shapes):
            self.labels[label].append(annotation.name)
        if not shapes:
            self.empty.append(annotation.name)
        return replace(annotation, shapes=shapes)

    def notes(self) -> list[str]:
        """What the user should know of this."""
        notes = []
        if self.boxes:
            notes.append(f"{self.boxes} rectangles around a shape of their own label are boxes: dropped (--boxes keep)")
        if self.regions:
            notes.append(f"{self.regions} rectangles were drawn as regions")
        if self.skipped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common())
            notes.append(f"skipped, having no area: {kinds}")
        if self.empty:
            notes.append(f"nothing to draw, so all background, in {len(self.empty)} files: {some(self.empty)}")
        return notes


def import_labelme(
    source: Path,
    target: Path,
    *,
    classes: Mapping[str, int] | None = None,
    boxes: Boxes = "drop",
    by_reference: bool = False,
) -> list[str]:
    """Make the LabelMe files below `source` a dataset folder at `target`, which appears whole or not at all.

    Args:
        source: the annotations' folder; the images lie in it too, anywhere.
        target: a folder that does not exist, or is empty; gets manifest.csv, dataset.toml, masks/ and images/.
        classes: labels with their mask values, 0 for background, 255 for what is ignored; numbered when left out.
        boxes: "drop" leaves out rectangles around another shape of the same label.
        by_reference: name the images by their absolute paths instead of copying them.

    Returns what the user should know. Raises `UserError`, or `DataError` with the problems of all files.
    """
    declared = dict(classes or {})
    check_classes(declared)
    require_vacant(target)
    if not source.is_dir():
        raise UserError(f"{source} is no folder; name the one that has the LabelMe files and the images")
    names = [path.relative_to(source).as_posix() for path in files_below(source)]
    survey, problems = Survey(), []
    images: dict[str, str] = {}
    others = []
    for name in (name for name in names if name.lower().endswith(".json")):
        try:
            annotation = read_annotation(source / name, name)
            if annotation is None:
                others.append(name)
                continue
            survey.add(annotation, boxes)
            image = image_location(annotation, (source / name).parent, source)
            if image in images:
                problems.append(f"{name}: {image} is annotated in {images[image]} already")
            images.setdefault(image, name)
        except DataError as error:
            problems += error.problems
    if not images and not problems:
        raise UserError(f"{source}: no LabelMe file (*.json with shapes) is in this folder or below")
    table = label_table(survey.labels, declared)
    index_of = {label: table.index_of.get(label, 0) for label in survey.labels}
    notes = [*table.notes, *survey.notes()]
    with new_folder(target) as folder:
        writer = _Writer(source, folder, images, index_of, boxes, by_reference)
        rows = []
        for image, name in images.items():
            try:
                rows.append(writer.write(image, name))
            except DataError as error:
                problems += error.problems
        problems += table.problems
        if problems:
            raise DataError(f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)
        write_manifest(folder, rows)
        write_description(folder, source.resolve().name, table.classes, ignore=IGNORE in index_of.values())
    if writer.embedded:
        notes.append(f"{writer.embedded} images have no file: taken out of imageData")
    if others:
        notes.append(f"passed over, JSON but not LabelMe's: {some(others)}")
    left = [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES and name not in images]
    if left:
        notes.append(f"{len(left)} images without a LabelMe file are left out: {some(left)}")
    return [*notes, f"{len(rows)} images, classes {', '.join(table.classes)}"]


class _Writer:
    """Writes images and masks to a dataset folder, one after another."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        images: Mapping[str, str],
        index_of: Mapping[str, int],
        boxes: Boxes,
        by_reference: bool,
    ) -> None:
        self._source, self._folder, self._images, self._index_of = source, folder, images, index_of
        self._boxes, self._by_reference = boxes, by_reference
        # The images' own images/ folder, if they have one, would become images/images/.
        self._strip = len("images/") if all(image.startswith("images/") for image in images) else 0
        self._stems = Counter(_stem(image).casefold() for image in images)
        self.embedded = 0

    def write(self, image: str, name: str) -> dict[str, str]:
        """The manifest's row for `image`, whose annotation is `name`. Raises `DataError`."""
        annotation = read_annotation(self._source / name, name)
        if annotation is None:
            raise DataError("annotation", [f"{name}: changed while it was read"])
        annotation = Survey().add(annotation, self._boxes)
        path = self._source / image
        embedded = not os.path.isfile(path)
        stem = _stem(image) if self._stems[_stem(image).casefold()] == 1 else image
        if not embedded:
            data = read_bytes(path, image)
            height, width = decode_image(data, image)[0].shape[:2]
            annotation.check_size(height, width, image)
        elif annotation.image_data is None:
            raise DataError("image", [f"{name}: its image {image} does not exist, and none is embedded"])
        else:
            data, (height, width) = annotation.embedded()
            suffix = next((suffix for start, suffix in _SIGNATURES if data.startswith(start)), "")
            image = _stem(image) + suffix if _stem(image) + suffix not in self._images else image + suffix
            self.embedded += 1
        mask = rasterise(annotation.shapes, self._index_of, (height, width), name)
        masks = f"masks/{stem[self._strip :]}.png"
        save_index_mask(mask, self._folder / masks)
        if self._by_reference and not embedded:
            return {"image": Path(os.path.abspath(path)).as_posix(), "mask": masks}
        copy = f"images/{image[self._strip :]}"
        (self._folder / copy).parent.mkdir(parents=True, exist_ok=True)
        (self._folder / copy).write_bytes(data)
        return {"image": copy, "mask": masks}


def _stem(image: str) -> str:
    return str(PurePosixPath(image).with_suffix(""))
