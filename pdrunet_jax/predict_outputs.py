"""The files that `predict` leaves for one image, all at the image's own resolution."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pdrunet_jax import pictures
from pdrunet_jax.data.contours import outlines
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.labelme_write import write_labelme
from pdrunet_jax.errors import RunError, UserError
from pdrunet_jax.files import atomic_write
from pdrunet_jax.inference import Prediction
from pdrunet_jax.predict_geometry import read_geometry
from pdrunet_jax.predict_inputs import is_dicom
from pdrunet_jax.predict_names import (
    CONTOURS,
    LABELME,
    LABELME_PICTURE,
    MASK,
    NIFTI,
    NPZ,
    NRRD,
    OVERLAY,
    PROBABILITY,
    beside,
    probability_of,
)
from pdrunet_jax.predict_nifti import require_nifti, write_label_map
from pdrunet_jax.predict_nrrd import require_nrrd, write_segmentation
from pdrunet_jax.predict_record import Record, save_mask


@dataclass(frozen=True)
class Outputs:
    """What is written beside NAME_mask.png."""

    overlay: bool = True
    """Write NAME_overlay.png: the image with its mask tinted and outlined."""
    probability: bool = False
    """Write NAME_probability.png: 16 bits, 65535 is 1; for several classes NAME_probability_CLASS.png each."""
    npz: bool = False
    """Write NAME_probability.npz: the probabilities as float32, for NumPy."""
    contours: bool = False
    """Write NAME_contours.csv: the outline of each part of each class, a point a row."""
    labelme: bool = False
    """Write NAME.json: polygons to correct by hand in LabelMe, and to train on by data import-labelme."""
    nrrd: bool = False
    """Write NAME_mask.seg.nrrd: a segmentation that 3D Slicer opens over the image."""
    nifti: bool = False
    """Write NAME_mask.nii.gz: a label map that ITK-SNAP and 3D Slicer open over the image."""
    tolerance: float = 1.0
    """Pixels by which outlines in NAME_contours.csv and NAME.json may leave that of the mask."""

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise UserError(f"--tolerance {self.tolerance}: give a number of pixels, 0 or more")

    def files(self, path: Path, names: Sequence[str], outputs: int) -> list[str]:
        """Ends of the names of all that is written of the image at `path`, beside its mask."""
        return [
            *([OVERLAY] if self.overlay else []),
            *(_probability_ends(names, outputs == 1) if self.probability else []),
            *([NPZ] if self.npz else []),
            *([CONTOURS] if self.contours else []),
            *([NRRD] if self.nrrd else []),
            *([NIFTI] if self.nifti else []),
            *([LABELME_PICTURE] if self.labelme and is_dicom(path) else []),
            *([LABELME] if self.labelme else []),
        ]

    def require(self) -> None:
        """Raise `UserError` if a package is missing that what is asked for needs."""
        if self.nrrd:
            require_nrrd()
        if self.nifti:
            require_nifti()


def write_result(
    result: Prediction, path: Path, target: Path, names: Sequence[str], outputs: Outputs, record: Record
) -> None:
    """Write what `outputs` ask for of the image at `path`, as `target`_mask.png and so on.

    The mask comes last, but for the LabelMe file: one that is there without being in a mask's record is a person's.
    Raises `RunError` if the folder refuses.
    """
    try:
        picture = outputs.labelme and is_dicom(path)  # LabelMe opens no DICOM
        pixels = read_image(path, 1) if outputs.overlay or picture else None
        target.parent.mkdir(parents=True, exist_ok=True)
        if outputs.overlay and pixels is not None:
            pictures.save(Image.fromarray(pictures.overlay(pixels, result.mask)), beside(target, OVERLAY))
        if outputs.probability:
            _write_probability(result.probability, target, names)
        if outputs.npz:
            file = io.BytesIO()
            np.savez_compressed(file, probability=result.probability, classes=np.array(["background", *names]))
            atomic_write(beside(target, NPZ), file.getvalue())
        if outputs.contours:
            atomic_write(beside(target, CONTOURS), _contours(result.mask, names, outputs.tolerance))
        if outputs.nrrd:
            write_segmentation(beside(target, NRRD), result.mask, names, read_geometry(path))
        if outputs.nifti:
            write_label_map(beside(target, NIFTI), result.mask, read_geometry(path))
        if picture and pixels is not None:
            grey = np.rint(pixels[..., 0]).astype(np.uint8)
            pictures.save(Image.fromarray(grey), beside(target, LABELME_PICTURE))
        save_mask(pictures.index_mask(result.mask, len(names)), beside(target, MASK), record)
        if outputs.labelme:
            _write_labelme(result.mask, beside(target, LABELME_PICTURE) if picture else path, target, names, outputs)
    except OSError as error:
        raise RunError(f"{error.filename or target}: cannot be written ({error.strerror})") from None


def _write_labelme(mask: np.ndarray, image: Path, target: Path, names: Sequence[str], outputs: Outputs) -> None:
    path = beside(target, LABELME)
    relative = os.path.relpath(image.parent.resolve() / image.name, path.parent.resolve())
    try:
        write_labelme(path, mask, names, Path(relative).as_posix(), tolerance=outputs.tolerance)
    except UserError as error:  # here the input was right: it is the disk that refuses
        raise RunError(str(error)) from None


def _probability_ends(names: Sequence[str], single: bool) -> list[str]:
    return [PROBABILITY] if single else [probability_of(label) for label in names]


def _write_probability(probability: np.ndarray, target: Path, names: Sequence[str]) -> None:
    single = probability.ndim == 2
    for index, end in enumerate(_probability_ends(names, single), 1):
        share = probability if single else probability[..., index]
        pictures.save(Image.fromarray(np.rint(share * 65535).astype(np.uint16)), beside(target, end))


def _contours(mask: np.ndarray, names: Sequence[str], tolerance: float) -> str:
    """Rows of class, contour, x and y. (0.5, 0.5) is the centre of the upper left pixel, as in LabelMe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", "contour", "x", "y"))
    for index, label in enumerate(names, 1):
        for number, ring in enumerate(outlines(mask == index, tolerance), 1):
            writer.writerows((label, number, x + 0.5, y + 0.5) for x, y in ring.tolist())
    return text.getvalue()
