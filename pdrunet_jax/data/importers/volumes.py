"""Import masks that are NRRD, NIfTI, MetaImage, DICOM or DICOM SEG files as a dataset folder with index masks."""

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from pdrunet_jax.data.folder import DESCRIPTION, NNUNET, read_description
from pdrunet_jax.data.images import SUFFIXES
from pdrunet_jax.data.importers import dicom_masks
from pdrunet_jax.data.importers.bitmaps import code_shapes
from pdrunet_jax.data.importers.files import RESULT, problem, writable
from pdrunet_jax.data.importers.geometry import (
    VOLUMES,
    Volume,
    exif_orientation,
    place,
    read_grid,
    read_volume,
    require_simpleitk,
)
from pdrunet_jax.data.importers.masks import MaskFile, is_mask, match_masks
from pdrunet_jax.data.importers.writer import Drawing, ImportOptions, write_dataset
from pdrunet_jax.data.labelme.read import IGNORE_LABEL, Shape
from pdrunet_jax.data.masks import IGNORE, is_background
from pdrunet_jax.data.walk import files_below, some
from pdrunet_jax.runtime.errors import DataError, UserError

HELP = """\
Import masks that are volumes of one slice (.nrrd, .seg.nrrd, .nii, .nii.gz, .mha, .mhd), DICOM images or DICOM SEG as \
a dataset folder. Needs SimpleITK: pip install '.[volumes]'.

SOURCE holds the masks and the images, which may be volumes too, or PNG, JPEG, TIFF, BMP or DICOM; or the images are \
elsewhere: --images FOLDER. What predict --nrrd and --nifti wrote and a person corrected in 3D Slicer or ITK-SNAP \
comes back by this command. Masks are named as for import-masks (masks/leg.nii.gz, leg_mask.seg.nrrd, nnU-Net's \
labelsTr); a DICOM SEG belongs to the image that it refers to.

A mask is placed on its image by the positions in both files, however its axes are turned. One that cannot lie on the \
image is an error. Names of classes come from the segments of .seg.nrrd and DICOM SEG, from dataset.toml or nnU-Net's \
dataset.json, or from --classes femur 1 tibia 2 for the values 1 and 2.

All problems are reported at once; if there is one, nothing is written.

Example:
    python -m pdrunet_jax.data import-volumes corrected data/legs --images xrays --classes femur 1 tibia 2"""


_EDITED = re.compile(r"(corrected|edited|fixed|final|manual|auto|pred|prediction|copy|new|v\d+)", re.I)


@dataclass(frozen=True)
class ImportVolumes(ImportOptions):
    """Import NRRD, NIfTI, MetaImage or DICOM masks (3D Slicer, ITK-SNAP) as a dataset folder."""

    geometry: Literal["check", "ignore"] = "check"
    """Place masks by the positions in the files, or ignore these: mask and image have the same pixels."""


def import_volumes(options: ImportVolumes) -> list[str]:
    """Write the dataset folder `options.dst`, completely or not at all.

    Returns remarks for the user. Raises `UserError`, or `DataError` with all problems.
    """
    options.check()
    require_simpleitk()
    source, known = options.source, tuple({*SUFFIXES, *VOLUMES})
    names = [path.relative_to(source).as_posix() for path in files_below(source)]
    names = [name for name in names if name.lower().endswith(known)]
    segs, problems = dicom_masks.find_segs(source, names)
    masks = [name for name in names if _is_volume_mask(name, options) and name not in segs]
    masked = {*masks, *segs, *(name for name in names if is_mask(name) or RESULT.search(name))}
    images = options.find_images(known, masked.__contains__)
    if not masks and not segs:
        raise UserError(
            f"{source}: no mask in it or below (.nrrd, .nii.gz, .mha or DICOM; a folder masks, or leg_mask.*)"
        )
    of_image, notes, more = match_masks(masks, images, options.classes)
    problems += more
    for files in of_image.values():  # what a person calls a corrected file is no class
        files[:] = [file if not _EDITED.fullmatch(file.label or "") else MaskFile(file.name, None) for file in files]
    reader = _Reader(options, images.root, _names(options))
    for image, name, load in dicom_masks.referenced(segs, images, source, problems):
        reader.segmentations[image].append((name, load))
    drawings = []
    for image in dict.fromkeys([*of_image, *reader.segmentations]):
        files = of_image.get(image, [])
        where = files[0].name if files else reader.segmentations[image][0][0]
        try:
            labels = tuple(shape.label for shape in reader.shapes(image, files))
        except DataError as error:
            problems += error.problems
            continue
        if sum(file.label is None for file in files) > 1:
            problems.append(f"{image}: several masks: {some([file.name for file in files])}; leave one of them")
            continue
        bare = _bare(images.root, image)
        drawings.append(replace(bare, name=where, labels=labels, shapes=partial(reader.shapes, image, files)))
    covered = {drawing.image for drawing in drawings}
    if options.unlabelled == "background":
        drawings += [_bare(images.root, image) for image in images.names if image not in covered]
    notes += [f"{len(masks) + len(segs)} masks of {len(drawings)} images"]
    declared = {label: value for value, label in reader.names.items() if 0 < value < IGNORE}
    return write_dataset(options, drawings, images, notes, [*problems, *reader.problems()], declared)


def _bare(root: Path, image: str) -> Drawing:
    """An image without shapes."""
    return Drawing(
        image, image, (), tuple, data=partial(_picture, root, image) if image.lower().endswith(VOLUMES) else None
    )


class _Reader:
    """Reads the masks of an image and places them on it."""

    def __init__(self, options: ImportVolumes, root: Path, names: Mapping[int, str]) -> None:
        self._options, self._root = options, root
        self.names = names
        """Names of classes by value, for files that name none."""
        self.segmentations: dict[str, list[tuple[str, Any]]] = defaultdict(list)
        """The DICOM SEG of each image: name, and what reads its segments."""
        self._binary: dict[int, str] = {}

    def shapes(self, image: str, files: Sequence[MaskFile]) -> list[Shape]:
        """The shapes of an image. Raises `DataError`."""
        path = self._root / image
        turn = exif_orientation(path) if not image.lower().endswith(VOLUMES) else 1
        shapes: list[Shape] = []
        for file in files:
            values, segments = self._read(file.name, image)
            for component in range(values.shape[2]):
                codes = _turned(_whole_numbers(values[:, :, component], file.name), turn)
                shapes += code_shapes(codes, self._labels(file, codes, component, segments))
        for name, load in self.segmentations[image]:
            shapes += load(name)
        return shapes

    def problems(self) -> list[str]:
        """A problem if several values without a name would become one class."""
        if len(self._binary) < 2:
            return []
        words = ", ".join(f"{value} (in {name})" for value, name in sorted(self._binary.items())[:8])
        return [f"masks have the values {words}; name them with --classes NAME VALUE ..."]

    def _read(self, name: str, image: str) -> tuple[np.ndarray, dict[tuple[int, int], str]]:
        """A mask on the pixels of its image, (H, W, components), and the names of its segments."""
        source = self._options.source
        volume = image.lower().endswith(VOLUMES)
        if not name.lower().endswith(VOLUMES):
            values = dicom_masks.read_mask(source / name, name, source)
            mask = Volume(values.transpose(1, 0, 2)[:, :, None], read_grid(source / name, name, source))
        else:
            mask = read_volume(source / name, name, source)
        if self._options.geometry == "ignore":
            return mask.picture(), mask.segments
        picture = read_volume(self._root / image, image, self._root) if volume else None
        grid = picture.grid if picture else read_grid(self._root / image, image, self._root)
        return place(mask, grid, picture, name, image), mask.segments

    def _labels(
        self, file: MaskFile, codes: np.ndarray, component: int, segments: Mapping[tuple[int, int], str]
    ) -> dict[int, str]:
        """The label of each value in a mask. Raises `DataError` for values without one."""
        found = set(np.unique(codes).tolist()) - {0}
        if file.label is not None:
            return dict.fromkeys(found, file.label)
        named = {value: name for (layer, value), name in segments.items() if layer == component and writable(name)}
        if found <= named.keys() and named:
            return named
        if self.names:
            if not found <= {*self.names, IGNORE}:
                words = ", ".join(map(str, sorted(found)[:8]))
                known = ", ".join(f"{name} {value}" for value, name in self.names.items())
                raise problem(file.name, f"it has the values {words}; declared are {known}")
            return {IGNORE: IGNORE_LABEL} | dict(self.names)
        if len(found) > 1:
            words = ", ".join(map(str, sorted(found)[:8]))
            raise problem(file.name, f"it has the values {words}; name them with --classes NAME VALUE ...")
        for value in found:
            self._binary.setdefault(value, file.name)
        return dict.fromkeys(found, "foreground")


def _is_volume_mask(name: str, options: ImportVolumes) -> bool:
    mask = name.lower().endswith(".seg.nrrd") or options.images is not None or is_mask(name)
    return mask and name.lower().endswith((*VOLUMES, ".dcm", ".dicom"))


def _names(options: ImportVolumes) -> dict[int, str]:
    """The name of each value, as declared by the options, dataset.toml or dataset.json."""
    if options.classes:
        return {value: label.partition("=")[0] for label, value in options.classes.items() if value}
    names: dict[int, str] = {}
    if (options.source / DESCRIPTION).is_file() or (options.source / NNUNET).is_file():
        for name, value in read_description(options.source).classes.items():
            for item in value if isinstance(value, list) else [value]:
                if type(item) is int and 0 < item <= IGNORE and not is_background(name):
                    names[item] = name
    return names


def _whole_numbers(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        raise problem(name, "a mask of fractions or NaN; save it as a label map")
    if values.min() < 0 or values.max() > 65535:
        raise problem(name, "a mask with values that are negative or above 65535; save it as a label map")
    return values.astype(np.uint16)


def _turned(codes: np.ndarray, orientation: int) -> np.ndarray:
    """A mask in the file's own pixel order as an upright one, by the image's EXIF orientation."""
    if orientation not in range(2, 9):
        return codes
    picture = Image.fromarray(codes.astype(np.int32))
    picture.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(picture)).astype(np.uint16)


def _picture(root: Path, name: str) -> tuple[bytes, str]:
    """An image volume as PNG, or TIFF if its values do not fit in 16 bits, with the extension."""
    pixels = read_volume(root / name, name, root).picture()
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        picture = Image.fromarray(pixels)
    elif pixels.shape[2] != 1:
        raise problem(name, f"{pixels.shape[2]} components; save it as one grey or 8-bit RGB image")
    else:
        plane = np.ascontiguousarray(pixels[:, :, 0])
        if plane.dtype.kind in "ui" and plane.dtype != np.uint8 and plane.min() >= 0 and plane.max() < 65536:
            plane = plane.astype(np.uint16)
        elif plane.dtype != np.uint8:
            plane = plane.astype(np.float32)
        picture = Image.fromarray(plane)
    file, kind = io.BytesIO(), "TIFF" if picture.mode == "F" else "PNG"
    picture.save(file, kind)
    return file.getvalue(), {"TIFF": ".tif", "PNG": ".png"}[kind]
