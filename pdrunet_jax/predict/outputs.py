"""Output files of the predict command, all at the image's own resolution, and the table `areas.csv`.

Each mask carries a record of how it was made. The mask is the last picture written for an image: if it exists, so does
everything else, however the process ended. Images share no state, so any number of machines can write to one folder.
"""

import fcntl
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image, PngImagePlugin

from pdrunet_jax.data import overlay
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.labelme.contours import outlines
from pdrunet_jax.data.labelme.write import write_labelme
from pdrunet_jax.predict.inference import Prediction
from pdrunet_jax.predict.inputs import is_dicom
from pdrunet_jax.predict.medical import read_geometry, write_nifti, write_nrrd
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, csv_text, writing

MASK = "_mask.png"
OVERLAY = "_overlay.png"
PROBABILITY = "_probability.png"
NPZ = "_probability.npz"
CONTOURS = "_contours.csv"
NRRD = "_mask.seg.nrrd"
NIFTI = "_mask.nii.gz"
LABELME = ".json"
LABELME_PICTURE = "_labelme.png"

AREA_COLUMNS = ("image", "class", "pixels", "area_mm2")

RECORD_KEY = "pdrunet_jax.predict"  # of the PNG text chunk in a mask that holds its record as JSON

Record = dict[str, Any]
"""How a mask was made: "settings", "input" (`resume.fingerprint`), "files" (suffixes of the other files written),
"pixels" of each class by name, and "spacing" in mm or null."""


@dataclass(frozen=True)
class WrittenFiles:
    """The files written for each image in addition to NAME_mask.png."""

    overlay: bool = True
    """Write NAME_overlay.png: the image with the mask tinted and outlined."""
    probability: bool = False
    """Write NAME_probability.png: 16 bits, 65535 is 1; with several classes, one NAME_probability_CLASS.png each."""
    npz: bool = False
    """Write NAME_probability.npz: float32 probabilities for NumPy."""
    contours: bool = False
    """Write NAME_contours.csv: outlines of every component, one point per row."""
    labelme: bool = False
    """Write NAME.json: polygons to correct in LabelMe and to train on with data import-labelme."""
    nrrd: bool = False
    """Write NAME_mask.seg.nrrd: a segmentation that 3D Slicer overlays on the image."""
    nifti: bool = False
    """Write NAME_mask.nii.gz: a label map that ITK-SNAP and 3D Slicer overlay on the image."""
    tolerance: float = 1.0
    """Largest deviation, in pixels, of the outlines in NAME_contours.csv and NAME.json from the mask's."""

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise UserError(f"--tolerance {self.tolerance}: give a number of pixels, 0 or more")

    def suffixes(self, path: Path, labels: Sequence[str], outputs: int) -> list[str]:
        """Suffixes of the files for the image at `path`, mask excluded, from a network with `outputs` channels."""
        return [
            *([OVERLAY] if self.overlay else []),
            *(_probability_suffixes(labels, outputs == 1) if self.probability else []),
            *([NPZ] if self.npz else []),
            *([CONTOURS] if self.contours else []),
            *([NRRD] if self.nrrd else []),
            *([NIFTI] if self.nifti else []),
            *([LABELME_PICTURE] if self.labelme and is_dicom(path) else []),
            *([LABELME] if self.labelme else []),
        ]

    def require_packages(self) -> None:
        """Raise `UserError` if a package needed for one of these files is not installed."""
        for option, module, package in (("nrrd", "nrrd", "pynrrd"), ("nifti", "nibabel", "NiBabel")):
            if getattr(self, option) and find_spec(module) is None:
                raise UserError(f"--{option} needs {package}: pip install 'pdrunet-jax[{option}]'")


class Areas:
    """`areas.csv`: one row per image and class, with the area if the file states its pixel spacing.

    It is rebuilt from the masks' records on opening, so that no row is lost or repeated, and then grows image by image.
    """

    def __init__(self, path: Path, finished: Iterable[tuple[str, Record]]) -> None:
        """Open `path` with the rows of the `finished` images (names and records).

        Raises `UserError` if another process has it open, `RunError` if it cannot be written.
        """
        self._path = path
        rows = [AREA_COLUMNS, *(row for name, record in finished for row in _area_rows(name, record))]
        text = csv_text(rows).encode()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            self._lock()
            if self._file.read() != text:
                # Overwritten in place: most bytes are the same, so a kill halfway leaves the rows as they were.
                self._file.seek(0)
                self._write(text)
                self._file.truncate()

    def add(self, name: str, record: Record) -> None:
        """Append the rows of an image. Raises `RunError` if the table cannot be written."""
        with writing(self._path):
            self._write(csv_text(_area_rows(name, record)).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{self._path} is being written by another process; wait for it to finish, give each process its own "
                "--shard, or choose another --output"
            ) from None
        except OSError:  # no locks on this file system: two processes would merely do the same work twice
            return

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def write_result(
    result: Prediction, path: Path, target: Path, labels: Sequence[str], files: WrittenFiles, record: Record
) -> None:
    """Write the mask and the requested `files` of the image at `path` as `target`_mask.png and so on.

    The mask is written last, except for the LabelMe file: one that no mask's record mentions belongs to a person.
    Raises `RunError` if the folder cannot be written.
    """
    with writing(target):
        labelme_picture = files.labelme and is_dicom(path)  # LabelMe does not open DICOM
        pixels = read_image(path, 1) if files.overlay or labelme_picture else np.empty(0)
        target.parent.mkdir(parents=True, exist_ok=True)
        if files.overlay:
            overlay.save(Image.fromarray(overlay.overlay(pixels, result.mask)), with_suffix(target, OVERLAY))
        if files.probability:
            single = result.probability.ndim == 2
            channels = [result.probability] if single else np.moveaxis(result.probability, -1, 0)[1:]
            for suffix, channel in zip(_probability_suffixes(labels, single), channels, strict=True):
                sixteen = Image.fromarray(np.rint(channel * 65535).astype(np.uint16))
                overlay.save(sixteen, with_suffix(target, suffix))
        if files.npz:
            file = io.BytesIO()
            np.savez_compressed(file, probability=result.probability, classes=np.array(["background", *labels]))
            atomic_write(with_suffix(target, NPZ), file.getvalue())
        if files.contours:
            atomic_write(with_suffix(target, CONTOURS), _contours(result.mask, labels, files.tolerance))
        if files.nrrd:
            write_nrrd(with_suffix(target, NRRD), result.mask, labels, read_geometry(path))
        if files.nifti:
            write_nifti(with_suffix(target, NIFTI), result.mask, read_geometry(path))
        if labelme_picture:
            grey = np.rint(pixels[..., 0]).astype(np.uint8)
            overlay.save(Image.fromarray(grey), with_suffix(target, LABELME_PICTURE))
        text, file = PngImagePlugin.PngInfo(), io.BytesIO()
        text.add_text(RECORD_KEY, json.dumps(record))
        overlay.index_mask(result.mask, len(labels)).save(file, format="PNG", pnginfo=text)
        atomic_write(with_suffix(target, MASK), file.getvalue())
        if files.labelme:
            shown = with_suffix(target, LABELME_PICTURE) if labelme_picture else path
            relative = Path(os.path.relpath(shown.parent.resolve() / shown.name, target.parent.resolve())).as_posix()
            write_labelme(with_suffix(target, LABELME), result.mask, labels, relative, tolerance=files.tolerance)


def with_suffix(target: Path, suffix: str) -> Path:
    """`target` with `suffix` appended to its name."""
    return target.with_name(target.name + suffix)


def _probability_suffixes(labels: Sequence[str], single: bool) -> list[str]:
    if single:
        return [PROBABILITY]
    safe = ["".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in label) for label in labels]
    return [f"_probability_{label}.png" for label in safe]


def _contours(mask: np.ndarray, labels: Sequence[str], tolerance: float) -> str:
    """Rows of class, contour, x and y. (0.5, 0.5) is the centre of the upper left pixel, as in LabelMe."""
    points = (
        (label, number, x + 0.5, y + 0.5)
        for index, label in enumerate(labels, 1)
        for number, ring in enumerate(outlines(mask == index, tolerance), 1)
        for x, y in ring.tolist()
    )
    return csv_text([("class", "contour", "x", "y"), *points])


def _area_rows(name: str, record: Record) -> list[Sequence[Any]]:
    spacing = record["spacing"]
    return [
        (name, label, pixels, f"{pixels * spacing[0] * spacing[1]:.4f}" if spacing else "")
        for label, pixels in record["pixels"].items()
    ]
