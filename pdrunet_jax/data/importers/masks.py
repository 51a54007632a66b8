"""Import images with one or more mask files each, as a dataset folder with one index mask an image."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from pdrunet_jax.data.images import SUFFIXES
from pdrunet_jax.data.importers.bitmaps import SOFT_VALUES, bitmap_shape, code_shapes, read_codes
from pdrunet_jax.data.importers.files import RESULT, Images, places, problem, read_text, stem_of
from pdrunet_jax.data.importers.writer import Drawing, ImportOptions, write_dataset
from pdrunet_jax.data.labelme.read import IGNORE_LABEL, Shape
from pdrunet_jax.data.masks import IGNORE, MaskCoding, is_background
from pdrunet_jax.data.pairing import folded
from pdrunet_jax.data.walk import files_below, some
from pdrunet_jax.runtime.errors import DataError, UserError

HELP = """\
Import images that have several mask files each, or masks with other names than a dataset folder has, as a dataset \
folder.

SOURCE holds images and masks, in one folder or in several. A mask is a file below a folder such as masks, gt or \
labels, or one with mask, seg, gt or label in its name. It belongs to the image whose name it begins with:
    images/leg.png with masks/leg_mask.png, masks/leg_mask_1.png ...       joined to one class
    images/leg.png with masks/femur/leg.png, masks/tibia/leg.png           a class for each folder
    images/leg.png with masks/leg_femur.png, masks/leg_tibia_mask.png      a class for each name
    leg.jpg with leg_mask.png, mask_leg.png or leg.jpg.png                 one folder, as from Roboflow
    leg/images/leg.png with leg/masks/*.png, or leg/image.png with leg/mask.png    a folder for each image

A file for one class has two values. A mask of several classes needs --classes femur 1 tibia 2, or Roboflow's \
_classes.csv. Folders train, val and test are kept as splits.

All problems are reported at once; if there is one, nothing is written.

Example:
    python -m pdrunet_jax.data import-masks lesions data/lesions"""

_WORD = "masks?|segs?|segmentations?|segm|gt|ground[ _-]?truths?|labels?|lbl|annotations?|instances?"
_MASK_FOLDER = re.compile(rf"(?:{_WORD}|masks?_(?:human|machine|instances)|labelsT[rs])", re.I)
_CLASS_FOLDER = re.compile(r"masks?[ _-](.+)|(.+?)[ _-]?masks?", re.I)
_IMAGE_FOLDER = re.compile(r"(?:img|image|jpegimage|xray|input|scan|picture)s?|imagesT[rs]", re.I)
_PREFIX = re.compile(rf"(?:{_WORD})[ ._-]+(?=.)", re.I)
_NUMBERS = MaskCoding((("numbers", (1,)),))


@dataclass(frozen=True)
class ImportMasks(ImportOptions):
    """Import images with several mask files each, or with other names, as a dataset folder."""


@dataclass(frozen=True)
class MaskFile:
    """A mask file; `label` is None if only its values can tell."""

    name: str
    label: str | None


def import_masks(options: ImportMasks) -> list[str]:
    """Write the dataset folder `options.dst`, completely or not at all.

    Returns remarks for the user. Raises `UserError`, or `DataError` with all problems.
    """
    options.check()
    source = options.source
    names = [path.relative_to(source).as_posix() for path in files_below(source)]
    pictures = [name for name in names if RESULT.search(name) and not name.endswith("_mask.png")]
    names = [name for name in names if name.lower().endswith(tuple(SUFFIXES)) and name not in pictures]
    masks = [name for name in names if options.images is not None or is_mask(name)]
    images = options.find_images(is_mask={*masks, *pictures}.__contains__)
    if not masks:
        raise UserError(f"{source}: no mask in it or below (a folder masks, or names such as leg_mask.png)")
    of_image, notes, problems = match_masks(masks, images, options.classes)
    problems += _rare_labels(of_image, options)
    label_of, more = _values(source, options)
    notes += more
    drawings, reader = [], _Reader(source, label_of)
    for image, files in of_image.items():
        try:
            labels = dict.fromkeys(shape.label for shape in reader.shapes(files))
        except DataError as error:
            problems += error.problems
            continue
        drawings.append(Drawing(files[0].name, image, tuple(labels), partial(reader.shapes, files)))
    problems += reader.problems()
    several = sum(len(files) > 1 for files in of_image.values())
    joined = f"; {several} images have several, which are joined" if several else ""
    notes.append(f"{len(masks)} masks of {len(of_image)} images{joined}")
    declared = {label: value for value, label in label_of.items() if value not in (0, IGNORE)}
    return write_dataset(options, drawings, images, notes, problems, declared)


def is_mask(name: str) -> bool:
    """Whether the file at a POSIX path is a mask, by the nearest folder that says so, or else by its name."""
    path = PurePosixPath(name)
    for folder in reversed(path.parts[:-1]):
        if _MASK_FOLDER.fullmatch(folder) or _CLASS_FOLDER.fullmatch(folder):
            return True
        if _IMAGE_FOLDER.fullmatch(folder):
            return False
    return any(re.fullmatch(rf"(?:{_WORD})\d*", word, re.I) for word in re.split("[ ._-]+", stem_of(name)))


def match_masks(
    masks: Sequence[str], images: Images, declared: Collection[str]
) -> tuple[dict[str, list[MaskFile]], list[str], list[str]]:
    """The masks of each image, remarks, and problems.

    The image's folder is the mask's own, or that without the folder for the class. If all images are in one folder, the
    masks may be anywhere. `declared` are known labels.
    """
    by_folder: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for image in images.names:
        stem = folded(stem_of(image))
        case = stem.removesuffix("_0000") if "imagesT" in image else stem  # nnU-Net's first channel
        for key in {stem, case, folded(PurePosixPath(image).name)}:
            by_folder[_folders(image)][key].append(image)
    hits: list[tuple[str, str, str | None, bool]] = []
    problems = []
    for mask in masks:
        hit = _near(mask, by_folder)
        if hit is None and len(by_folder) == 1 and (found := _longest(stem_of(mask), *by_folder.values())):
            hit = found[0], _label_in(found[1]) or next(reversed(_folders(mask)), None), True
        if hit is None:
            problems.append(f"{mask}: a mask without an image; no image's name begins it")
        elif len(hit[0]) > 1:
            problems.append(f"{mask}: may belong to any of {some(hit[0])}")
        else:
            hits.append((mask, hit[0][0], *hit[1:]))
    # What may be a class, or only the name of a file or folder, is a class if several images have it, and others too.
    owners: dict[str, set[str]] = defaultdict(set)
    for _, image, label, unsure in hits:
        if label and unsure:
            owners[label].add(image)
    sure = {label for label, owned in owners.items() if label in declared or (len(owned) > 1 and len(owners) > 1)}
    result: dict[str, list[MaskFile]] = defaultdict(list)
    for mask, image, label, unsure in hits:
        result[image].append(MaskFile(mask, label if not unsure or label in sure else None))
    return result, [f"classes are named by files or folders: {', '.join(sorted(sure))}"] if sure else [], problems


def _near(
    mask: str, by_folder: Mapping[tuple[str, ...], Mapping[str, list[str]]]
) -> tuple[list[str], str | None, bool] | None:
    """The images that a mask may belong to, its class, and whether that is only a guess; None without an image."""
    folders, stem = _folders(mask), stem_of(mask)
    for drop in (None, *range(len(folders))):
        place = folders if drop is None else (*folders[:drop], *folders[drop + 1 :])
        stems = by_folder.get(place, {})
        if found := _longest(stem, stems) or _longest(_PREFIX.sub("", stem), stems):
            return found[0], (None if drop is None else folders[drop]) or _label_in(found[1]), False
        alone = {image for images in stems.values() for image in images}
        if folders and len(alone) == 1 and _label_in(f" {stem}") is None:  # p1/image.png and p1/mask.png
            return list(alone), None if drop is None else folders[drop], False
        own = folded(folders[-1 if drop is None else drop]) if folders else ""
        if own in stems:  # a folder for each image
            return stems[own], _label_in(stem), True
    return None


def _folders(name: str) -> tuple[str, ...]:
    """The folders of a path that tell images or classes apart."""
    parts = []
    for part in places(name):
        if _MASK_FOLDER.fullmatch(part) or _IMAGE_FOLDER.fullmatch(part):
            continue
        match = _CLASS_FOLDER.fullmatch(part)
        parts.append((match[1] or match[2]) if match else part)
    return tuple(parts)


def _longest(name: str, stems: Mapping[str, list[str]]) -> tuple[list[str], str] | None:
    """The images with the longest of `stems` that `name` begins with, and what follows; None without one."""
    for end in range(len(name), 0, -1):
        start = folded(name[:end])
        if (end == len(name) or name[end] in " ._-") and start in stems:
            return stems[start], name[end:]
    return None


def _label_in(rest: str) -> str | None:
    """The class that the end of a mask's name states: `femur` of `_femur_mask_1`."""
    words = [word for word in re.split("[ ._-]+", rest) if word]
    words = [word for word in words if not re.fullmatch(rf"(?:{_WORD})\d*|\d+", word, re.I)]
    return "_".join(words) or None


def _rare_labels(of_image: Mapping[str, Sequence[MaskFile]], options: ImportMasks) -> list[str]:
    """Problems of labels that only one image has: rather the rest of another image's name."""
    if options.classes or len(of_image) < 2:
        return []
    counts = Counter(label for masks in of_image.values() for label in {mask.label for mask in masks} if label)
    return [
        f"{mask.name}: {mask.label} is either a class (declare it with --classes) or an image that is missing"
        for masks in of_image.values()
        for mask in masks
        if mask.label and counts[mask.label] == 1
    ]


def _values(source: Path, options: ImportMasks) -> tuple[dict[int, str], list[str]]:
    """The label of each value in masks of several classes, and remarks."""
    if options.classes:
        return {value: label.partition("=")[0] for label, value in options.classes.items() if value}, []
    labels: dict[int, str] = {}
    for path in files_below(source):
        if path.name != "_classes.csv":
            continue
        lines = read_text(path, path.name, options.encoding).splitlines()
        found = [re.fullmatch(r"\s*(\d{1,3})\s*,\s*(.*?)\s*", line) for line in lines]
        pairs = {int(match[1]): match[2] for match in found if match}
        if labels not in ({}, pairs):
            raise UserError(f"{path}: other classes than the _classes.csv before it; import the folders one by one")
        labels = pairs
    labels = {value: label for value, label in labels.items() if 0 < value < IGNORE and not is_background(label)}
    return labels, ["classes are named by _classes.csv"] if labels else []


class _Reader:
    """Reads mask files as shapes."""

    def __init__(self, source: Path, label_of: Mapping[int, str]) -> None:
        self._source, self._label_of = source, label_of
        self.binary: dict[int, str] = {}
        """Values of masks with a single undeclared one, each with the first of these files."""

    def shapes(self, masks: Sequence[MaskFile]) -> list[Shape]:
        """The shapes of an image. Raises `DataError`."""
        return [shape for mask in masks for shape in self._read(mask)]

    def _read(self, mask: MaskFile) -> list[Shape]:
        path, name = self._source / mask.name, mask.name
        if mask.label is not None:
            return [bitmap_shape(path, name, self._source, mask.label)]
        codes = read_codes(path, name, self._source, _NUMBERS)
        found = set(np.unique(codes).tolist()) - {0}
        known = {IGNORE: IGNORE_LABEL} | dict(self._label_of)
        only = next(iter(self._label_of.values())) if len(self._label_of) == 1 else None
        if self._label_of and found <= known.keys() and not (only and found == {IGNORE}):
            return code_shapes(codes, known)
        if len(found) < 2 and (only or not self._label_of):
            self.binary.setdefault(next(iter(found), 0), name)
            return code_shapes(codes, dict.fromkeys(found, only or "foreground"))
        if len(found) >= SOFT_VALUES and (only or not self._label_of):
            return [bitmap_shape(path, name, self._source, only or "foreground")]
        words = ", ".join(map(str, sorted(found)[:8]))
        raise problem(name, f"a mask with the values {words}; name them with --classes NAME VALUE ...")

    def problems(self) -> list[str]:
        """A problem if several undeclared values would become one class."""
        values = self.binary.keys() - {0}
        if len(values) < 2 or values == {1, IGNORE}:
            return []
        words = ", ".join(f"{value} (in {self.binary[value]})" for value in sorted(values)[:8])
        return [f"masks have the values {words}; name them with --classes NAME VALUE ..."]
