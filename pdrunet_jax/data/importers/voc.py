"""Import Pascal VOC's folders, also as CVAT exports them, as a dataset folder with index masks."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pdrunet_jax.data.folder import split_named
from pdrunet_jax.data.images import SUFFIXES
from pdrunet_jax.data.importers.bitmaps import code_shapes, read_codes
from pdrunet_jax.data.importers.files import problem, read_text, writable
from pdrunet_jax.data.importers.writer import Drawing, ImportOptions, write_dataset
from pdrunet_jax.data.labelme.read import IGNORE_LABEL, Shape
from pdrunet_jax.data.masks import BACKGROUND, COLOUR, IGNORE, MaskCoding, colour_name
from pdrunet_jax.data.pairing import composed
from pdrunet_jax.data.walk import files_below, some
from pdrunet_jax.runtime.errors import DataError, UserError

HELP = """\
Import a folder in the layout of Pascal VOC as a dataset folder, also as CVAT exports it ("Segmentation mask 1.1", \
"Pascal VOC") and as labelme2voc writes it.

SOURCE has SegmentationClass/ (or SegmentationClassPNG/) with the masks and JPEGImages/ with the images, or the images \
are elsewhere: --images FOLDER. labelmap.txt names the colours of the classes, class_names.txt the palette's indices; \
without either, --classes does: --classes femur 1. ImageSets/Segmentation/{train,val,test}.txt are kept as splits. \
Palette index 255 and VOC's border colour (224,224,192) are ignored pixels.

All problems are reported at once; if there is one, nothing is written.

Example:
    python -m pdrunet_jax.data import-voc export data/legs --classes femur 1 tibia 2"""

_MASKS = ("SegmentationClassPNG", "SegmentationClass")
_NOT_IMAGES = re.compile(r"(^|/)segmentation(class|object)(png|visualization)?/", re.I)
_BORDER = COLOUR + 0xE0E0C0


@dataclass(frozen=True)
class ImportVoc(ImportOptions):
    """Import Pascal VOC folders, also from CVAT, as a dataset folder."""


def import_voc(options: ImportVoc) -> list[str]:
    """Write the dataset folder `options.dst`, completely or not at all.

    Returns remarks for the user. Raises `UserError`, or `DataError` with all problems.
    """
    options.check()
    source = options.source
    roots = [path for name in _MASKS for path in sorted([source / name, *source.glob(f"*/{name}")]) if path.is_dir()]
    if not roots:
        raise UserError(f"{source}: no folder SegmentationClass in it; this is not the layout of Pascal VOC")
    root = roots[0].parent
    images = options.find_images(is_mask=lambda name: _NOT_IMAGES.search(name) is not None)
    label_of, coding = _labels(root, options)
    splits, problems = _splits(root)
    drawings = []
    for path in files_below(roots[0]):
        if path.suffix.lower() not in SUFFIXES:
            continue
        name, key = path.relative_to(source).as_posix(), path.relative_to(roots[0]).with_suffix("").as_posix()
        try:
            found = images.pairs(name if options.images is None else key)
            if len(found) != 1:
                raise problem(name, f"may belong to any of {some(found)}" if found else "a mask without an image")
            labels = _present(path, name, source, label_of, coding)
        except DataError as error:
            problems += error.problems
            continue
        load = partial(_shapes, path, name, source, label_of, coding)
        drawings.append(Drawing(name, found[0], labels, load, split=splits.get(composed(key))))
    if not drawings and not problems:
        raise UserError(f"{roots[0]}: no mask in this folder or below")
    notes = [f"labels of {name} are read" for name in ("labelmap.txt", "class_names.txt") if (root / name).is_file()]
    names = {label: value for value, label in label_of.items() if value < IGNORE and value and not coding.colours}
    return write_dataset(options, drawings, images, notes, problems, names)


def _labels(root: Path, options: ImportVoc) -> tuple[dict[int, str], MaskCoding]:
    """The label of each code, and how masks are read: by colour, or as palette indices. Raises `DataError`."""
    if (root / "labelmap.txt").is_file():
        text = read_text(root / "labelmap.txt", "labelmap.txt", options.encoding)
        label_of: dict[int, str] = {_BORDER: IGNORE_LABEL}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            match = re.fullmatch(r"(.+?):\s*(\d{1,3}),\s*(\d{1,3}),\s*(\d{1,3})\s*(:[^:]*){0,2}", line.strip())
            parts = [int(part) for part in match.groups()[1:4]] if match else [256]
            if not match or max(parts) > 255 or not writable(line.strip()):
                raise problem("labelmap.txt", f"line {number} is not NAME:RED,GREEN,BLUE::")
            code = COLOUR + (parts[0] << 16) + (parts[1] << 8) + parts[2]
            if label_of.get(code, match[1]) not in (match[1], IGNORE_LABEL):
                raise problem("labelmap.txt", f"{label_of[code]} and {match[1]} have the same colour")
            label_of[code] = match[1].strip()
        label_of.setdefault(COLOUR, BACKGROUND)
        return label_of, MaskCoding(tuple((label, (code,)) for code, label in label_of.items()))
    if (root / "class_names.txt").is_file():  # of labelme2voc: the first is __ignore__ (-1), then _background_ (0)
        names = [line.strip() for line in read_text(root / "class_names.txt", "class_names.txt").splitlines()]
        first = -1 if names[:1] == [IGNORE_LABEL] else 0
        label_of = {index % 256: name for index, name in enumerate(names, start=first) if name and index < IGNORE}
    else:
        label_of = {value: label.partition("=")[0] for label, value in options.classes.items()}
    label_of = {0: BACKGROUND, IGNORE: IGNORE_LABEL} | label_of
    return label_of, MaskCoding((("numbers", (1,)),))


def _splits(root: Path) -> tuple[dict[str, str], list[str]]:
    """The split of each image listed in ImageSets, and problems."""
    splits, problems = dict[str, str](), list[str]()
    for path in sorted((root / "ImageSets").glob("Segmentation/*.txt")):
        if (split := split_named(path.stem)) is None:
            continue
        where = path.relative_to(root).as_posix()
        try:
            lines = read_text(path, where).splitlines()
        except DataError as error:
            problems += error.problems
            continue
        for key in (composed(line.strip().strip('"')) for line in lines if line.strip()):
            if splits.setdefault(key, split) != split:
                problems.append(f"{where}: {key} is in {splits[key]} too")
    return splits, problems


def _present(path: Path, name: str, source: Path, label_of: dict[int, str], coding: MaskCoding) -> tuple[str, ...]:
    """Labels in a mask. Raises `DataError` for codes without a label."""
    codes = np.unique(read_codes(path, name, source, coding)).tolist()
    unknown = [code for code in codes if code not in label_of]
    if unknown:
        words = some([colour_name(code) or str(code) for code in unknown])
        remedy = (
            "add them to labelmap.txt" if coding.colours else "no labelmap.txt names them; give --classes NAME VALUE"
        )
        raise problem(name, f"values without a class: {words}; {remedy}")
    return tuple(Counter(label_of[code] for code in codes))


def _shapes(path: Path, name: str, source: Path, label_of: dict[int, str], coding: MaskCoding) -> list[Shape]:
    return code_shapes(read_codes(path, name, source, coding), label_of)
