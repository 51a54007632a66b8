"""Import a folder of LabelMe files as a dataset folder with index masks."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from pdrunet_jax.data.importers.files import RESULT, Images, is_inside, problem, without_area
from pdrunet_jax.data.importers.writer import Drawing, ImportOptions, write_dataset
from pdrunet_jax.data.labelme.raster import without_boxes
from pdrunet_jax.data.labelme.read import Annotation, Shape, read_annotation
from pdrunet_jax.data.walk import files_below, some
from pdrunet_jax.runtime.errors import DataError, UserError

HELP = """\
Import a folder of LabelMe annotations as a dataset folder: *.json of versions 3 to 5, or the *.xml of LabelMe's \
online version and of CVAT's export "LabelMe 3.0".

SOURCE holds the annotations and the images, in any subfolders. An imagePath from another computer is found by its \
file name. Folders train, val and test are kept as splits.

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
class ImportLabelme(ImportOptions):
    """Import a folder of LabelMe annotations as a dataset folder."""

    boxes: Boxes = "drop"
    """Rectangles around another shape with the same label: drop them as boxes, or keep them as regions."""


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
        notes += without_area(dict(self.skipped.most_common()))
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
    options.check()
    source, images = options.source, options.find_images(is_mask=lambda name: RESULT.search(name) is not None)
    survey, problems = Survey(), list[str]()
    drawings, others, embedded = [], [], 0
    for path in files_below(source):
        name = path.relative_to(source).as_posix()
        if path.suffix.lower() not in (".json", ".xml"):
            continue
        try:
            if not is_inside(path, source):
                raise problem(name, "a link that leads out of the folder; refused")
            annotation = read_annotation(path, name, options.encoding)
            if annotation is None:
                others.append(name)
                continue
            drawn = survey.add(annotation, options.boxes)
            drawing = _drawing(drawn, path, images, options)
            embedded += drawing.data is not None
            drawings.append(drawing)
        except DataError as error:
            problems += error.problems
    if not drawings and not problems:
        hint = f"; {some(others)} may be for import-coco, import-label-studio, import-supervisely or import-cvat"
        what = f"no LabelMe file (*.json with shapes, or *.xml) in this folder or below{hint if others else ''}"
        raise UserError(f"{source}: {what}")
    notes = survey.notes()
    if embedded:
        notes.append(f"{embedded} images have no file: taken from imageData")
    if others:
        notes.append(f"skipped, not LabelMe: {some(others)}")
    return write_dataset(options, drawings, images, notes, problems)


def _drawing(annotation: Annotation, path: Path, images: Images, options: ImportLabelme) -> Drawing:
    name = annotation.name
    folder = str(PurePosixPath(name).parent)
    image = images.find(annotation.image_path, folder, name)
    data = None
    if image is None:
        file = PurePosixPath(annotation.image_path.replace("\\", "/")).name
        if annotation.image_data is None:
            raise problem(name, f"its image {file} does not exist, and none is embedded")
        image, data = str(PurePosixPath(folder) / file), partial(_embedded, path, name, options)
    labels = tuple(shape.label for shape in annotation.shapes)
    return Drawing(name, image, labels, partial(_shapes, path, name, options), annotation.size, data)


def _again(path: Path, name: str, options: ImportLabelme) -> Annotation:
    """The annotation once more: all of them, with their embedded images, would not fit in memory."""
    annotation = read_annotation(path, name, options.encoding)
    if annotation is None:
        raise problem(name, "changed while it was read")
    return to_draw(annotation, options.boxes)


def _shapes(path: Path, name: str, options: ImportLabelme) -> Sequence[Shape]:
    return _again(path, name, options).shapes


def _embedded(path: Path, name: str, options: ImportLabelme) -> tuple[bytes, str]:
    data, _ = _again(path, name, options).embedded()
    return data, next((suffix for start, suffix in _SIGNATURES if data.startswith(start)), "")
