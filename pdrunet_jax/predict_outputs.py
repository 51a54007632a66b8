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
from pdrunet_jax.predict_inputs import is_dicom
from pdrunet_jax.predict_nrrd import read_geometry, write_segmentation
from pdrunet_jax.predict_record import Record, save_mask

MASK = "_mask.png"
LABELME = ".json"


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
    tolerance: float = 1.0
    """Pixels by which outlines in NAME_contours.csv and NAME.json may leave that of the mask."""

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise UserError(f"--tolerance {self.tolerance}: give a number of pixels, 0 or more")

    def files(self, path: Path, names: Sequence[str], outputs: int) -> list[str]:
        """Ends of the names of all that is written of the image at `path`, beside its mask."""
        kinds = [f"_probability_{_safe(label)}.png" for label in names] if outputs > 1 else ["_probability.png"]
        return [
            *(["_overlay.png"] if self.overlay else []),
            *(kinds if self.probability else []),
            *(["_probability.npz"] if self.npz else []),
            *(["_contours.csv"] if self.contours else []),
            *(["_mask.seg.nrrd"] if self.nrrd else []),
            *(["_labelme.png"] if self.labelme and is_dicom(path) else []),
            *([LABELME] if self.labelme else []),
        ]


def beside(target: Path, end: str) -> Path:
    """The file of a result: `target` with `end` appended to its name."""
    return target.with_name(target.name + end)


def write_result(
    result: Prediction, path: Path, target: Path, names: Sequence[str], outputs: Outputs, record: Record
) -> None:
    """Write what `outputs` ask for of the image at `path`, as `target`_mask.png and so on.

    The mask comes last, but for the LabelMe file: one that is there without being in a mask's record is a person's.
    Raises `RunError` if the folder refuses.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if outputs.overlay:
            drawn = pictures.overlay(read_image(path, 1), result.mask)
            pictures.save(Image.fromarray(drawn), beside(target, "_overlay.png"))
        if outputs.probability:
            _write_probability(result.probability, target, names)
        if outputs.npz:
            file = io.BytesIO()
            np.savez_compressed(file, probability=result.probability, classes=np.array(["background", *names]))
            atomic_write(beside(target, "_probability.npz"), file.getvalue())
        if outputs.contours:
            atomic_write(beside(target, "_contours.csv"), _contours(result.mask, names, outputs.tolerance))
        if outputs.nrrd:
            write_segmentation(beside(target, "_mask.seg.nrrd"), result.mask, names, read_geometry(path))
        image_path = path
        if outputs.labelme and is_dicom(path):  # which LabelMe does not open
            image_path = beside(target, "_labelme.png")
            grey = np.rint(read_image(path, 1)[..., 0]).astype(np.uint8)
            pictures.save(Image.fromarray(grey), image_path)
        save_mask(pictures.index_mask(result.mask, len(names)), beside(target, MASK), record)
        if outputs.labelme:
            relative = os.path.relpath(image_path.parent.resolve() / image_path.name, target.parent.resolve())
            try:
                write_labelme(
                    beside(target, LABELME), result.mask, names, Path(relative).as_posix(), tolerance=outputs.tolerance
                )
            except UserError as error:  # here the input was right: it is the disk that refuses
                raise RunError(str(error)) from None
    except OSError as error:
        raise RunError(f"{error.filename or target}: cannot be written ({error.strerror})") from None


def _write_probability(probability: np.ndarray, target: Path, names: Sequence[str]) -> None:
    single = probability.ndim == 2
    for index, label in enumerate(names, 1):
        share = probability if single else probability[..., index]
        end = "_probability.png" if single else f"_probability_{_safe(label)}.png"
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


def _safe(label: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in label)
