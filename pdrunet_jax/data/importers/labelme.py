"""Import a folder of LabelMe files as a dataset folder with index masks."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from pdrunet_jax.data.folder import files_below, some, write_manifest
from pdrunet_jax.data.images import SUFFIXES, decode_image, read_bytes
from pdrunet_jax.data.importers.common import Source, Target, check_classes, label_table, write_description, write_mask
from pdrunet_jax.data.labelme.read import Annotation, image_location, rasterise, read_annotation, without_boxes
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import new_folder, require_vacant

HELP = """\
Import a folder of LabelMe annotations (*.json, versions 3 to 5) as a dataset folder.

SOURCE holds the JSON files and the images, in any subfolders; imagePath must not lead out of it. \
DST gets manifest.csv, dataset.toml, masks/ (index masks) and images/.

Polygons, rectangles, circles and mask shapes are drawn as LabelMe draws them, later shapes over earlier ones. \
Lines and points have no area and are skipped. The labels background and _background_ are drawn as background; \
regions labelled __ignore__ are excluded from loss and metrics.

All problems of all files are reported at once; if there is one, nothing is written.

Example:
    python -m pdrunet_jax.data import-labelme annotations data/legs --classes femur 1 tibia 2"""

Boxes = Literal["drop", "keep"]

_SIGNATURES = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"BM", ".bmp"), (b"II", ".tif"), (b"MM", ".tif"))
"""First bytes of embedded image files, with their extensions."""


@dataclass(frozen=True)
class ImportLabelme:
    """Import a folder of LabelMe annotations as a dataset folder."""

    source: Source
    """Folder with the LabelMe files and the images."""
    dst: Target
    """Dataset folder to write; must be empty or not exist."""
    classes: dict[str, int] = field(default_factory=dict)
    """Labels with mask values 1 to 254 (0 background, 255 ignored); by default numbered alphabetically."""
    boxes: Boxes = "drop"
    """Rectangles around another shape with the same label: drop them as boxes, or keep them as regions."""
    by_reference: bool = False
    """Refer to the images by their absolute paths instead of copying them."""


@dataclass
class Survey:
    """Counts over LabelMe files, before anything is drawn."""

    labels: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Labels of the shapes to draw, with the files that contain them."""
    boxes: int = 0
    """Rectangles dropped as boxes."""
    regions: int = 0
    """Rectangles to draw."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Kinds of shapes without an area."""
    empty: list[str] = field(default_factory=list)
    """Files without a shape to draw."""

    def add(self, annotation: Annotation, boxes: Boxes) -> Annotation:
        """Count an annotation; returns it with only the shapes to draw."""
        drawn = to_draw(annotation, boxes)
        self.boxes += len(annotation.shapes) - len(drawn.shapes)
        self.regions += sum(shape.kind == "rectangle" for shape in drawn.shapes)
        self.skipped.update(annotation.skipped)
        for label in dict.fromkeys(shape.label for shape in drawn.shapes):
            self.labels[label].append(annotation.name)
        if not drawn.shapes:
            self.empty.append(annotation.name)
        return drawn

    def notes(self) -> list[str]:
        """Remarks for the user."""
        notes = []
        if self.boxes:
            notes.append(f"{self.boxes} rectangles around a shape with the same label: dropped as boxes (--boxes keep)")
        if self.regions:
            notes.append(f"{self.regions} rectangles were drawn as regions")
        if self.skipped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common())
            notes.append(f"skipped, having no area: {kinds}")
        if self.empty:
            notes.append(f"nothing to draw, so all background, in {len(self.empty)} files: {some(self.empty)}")
        return notes


def to_draw(annotation: Annotation, boxes: Boxes) -> Annotation:
    """The annotation without boxes, unless they are kept."""
    return annotation if boxes == "keep" else replace(annotation, shapes=tuple(without_boxes(annotation.shapes)))


def import_labelme(options: ImportLabelme) -> list[str]:
    """Write the dataset folder `options.dst`, completely or not at all.

    Returns remarks for the user. Raises `UserError`, or `DataError` with the problems of all files.
    """
    source = options.source
    check_classes(options.classes)
    require_vacant(options.dst)
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; name the one with the LabelMe files and the images")
    # Read all annotations first: labels are numbered, and problems reported, for all files together.
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
            survey.add(annotation, options.boxes)
            image = image_location(annotation, (source / name).parent, source)
            if image in images:
                problems.append(f"{name}: {image} is already annotated in {images[image]}")
            images.setdefault(image, name)
        except DataError as error:
            problems += error.problems
    if not images and not problems:
        raise UserError(f"{source}: no LabelMe file (*.json with shapes) in this folder or below")
    table = label_table(survey.labels, options.classes)
    index_of = {label: table.index_of.get(label, 0) for label in survey.labels}
    # Then write images and masks.
    with new_folder(options.dst) as folder:
        writer = _Writer(options, folder, images, index_of)
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
        write_description(
            folder, source.resolve().name, table.classes, ignore=IGNORE if IGNORE in index_of.values() else None
        )
    notes = [*table.notes, *survey.notes()]
    if writer.embedded:
        notes.append(f"{writer.embedded} images have no file: taken from imageData")
    if others:
        notes.append(f"skipped, JSON but not LabelMe: {some(others)}")
    left = [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES and name not in images]
    if left:
        notes.append(f"{len(left)} images without a LabelMe file are left out: {some(left)}")
    return [*notes, f"{len(rows)} images, classes {', '.join(table.classes)}"]


class _Writer:
    """Writes images and masks to a dataset folder, one after another."""

    def __init__(
        self, options: ImportLabelme, folder: Path, images: Mapping[str, str], index_of: Mapping[str, int]
    ) -> None:
        self._options, self._folder, self._images, self._index_of = options, folder, images, index_of
        # If all images are in a folder images/ already, they must not end up in images/images/.
        self._strip = len("images/") if all(image.startswith("images/") for image in images) else 0
        self._stems = Counter(_stem(image).casefold() for image in images)
        self.embedded = 0

    def write(self, image: str, name: str) -> dict[str, str]:
        """Write `image` and the mask of its annotation `name`; returns the manifest's row. Raises `DataError`."""
        annotation = read_annotation(self._options.source / name, name)
        if annotation is None:
            raise DataError("annotation", [f"{name}: changed while it was read"])
        path = self._options.source / image
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
        shapes = to_draw(annotation, self._options.boxes).shapes
        masks = f"masks/{stem[self._strip :]}.png"
        write_mask(rasterise(shapes, self._index_of, (height, width), name), self._folder / masks)
        if self._options.by_reference and not embedded:
            return {"image": Path(os.path.abspath(path)).as_posix(), "mask": masks}
        copy = f"images/{image[self._strip :]}"
        (self._folder / copy).parent.mkdir(parents=True, exist_ok=True)
        (self._folder / copy).write_bytes(data)
        return {"image": copy, "mask": masks}


def _stem(image: str) -> str:
    return str(PurePosixPath(image).with_suffix(""))
