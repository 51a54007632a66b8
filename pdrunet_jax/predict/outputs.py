"""What an output folder says about its own results: each mask carries how it was made, and `areas.csv` the areas.

The mask is the last picture that is written of an image, so that with it everything else is there, however the process
ended. Nothing is shared between images: any number of machines may write to one folder.

The files that `predict` leaves for one image, all at the image's own resolution.
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from pdrunet_jax.data import overlay as pictures
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.labelme.contours import outlines
from pdrunet_jax.data.labelme.write import write_labelme
from pdrunet_jax.predict.inference import Prediction
from pdrunet_jax.predict.inputs import (
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
    is_dicom,
    probability_of,
)
from pdrunet_jax.predict.medical import read_geometry, require_nifti, require_nrrd, write_label_map, write_segmentation
from pdrunet_jax.runtime.digest import sha256
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import atomic_write, writing

RECORD_KEY = "pdrunet_jax.predict"
"""Key of the PNG text in a mask that holds its record, one JSON object."""

Record = dict[str, Any]
"""How a mask was made: "settings", "input" (see `stamp`), "files" written beside it, "pixels" of each class by name,
"spacing" in mm or null."""


def stamp(path: Path) -> dict[str, Any]:
    """What tells an image from a changed one: its digest, and size and time of change, which are quick to compare."""
    state = path.stat()
    return {"bytes": state.st_size, "changed": state.st_mtime_ns, "sha256": sha256(path)}


def unchanged(path: Path, known: Mapping[str, Any]) -> bool:
    """Whether the image at `path` is still the one of which `known` is the stamp."""
    state = path.stat()
    if state.st_size != known["bytes"]:
        return False
    return state.st_mtime_ns == known["changed"] or sha256(path) == known["sha256"]


def save_mask(image: Image.Image, path: Path, record: Record) -> None:
    """Write a mask with its record, all of it or nothing. Raises `OSError` if the disk refuses."""
    text = PngImagePlugin.PngInfo()
    text.add_text(RECORD_KEY, json.dumps(record))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=text)
    atomic_write(path, file.getvalue())


def read_record(path: Path) -> Record | None:
    """The record in a mask; None for a picture that this command has not written. Raises `OSError` if there is none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:  # reads no pixels
            record = json.loads(image.info.get(RECORD_KEY, "null"))
    except (UnidentifiedImageError, ValueError, SyntaxError):
        return None
    return record if isinstance(record, dict) and {"settings", "input", "files", "pixels"} <= record.keys() else None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two settings, a few words each."""
    return [
        f"other {name}" if name == "weights" else f"{name} was {then.get(name)}, is {now.get(name)}"
        for name in now
        if then.get(name) != now[name]
    ]


class Areas:
    """`areas.csv`: a row for each image and class, with the area where the file states its pixels' spacing.

    It is made anew from the masks' records at the start, so that nothing in it is lost or there twice, and grows by
    the rows of an image at a time.
    """

    AREA_COLUMNS = ("image", "class", "pixels", "area_mm2")

    def __init__(self, path: Path, finished: Iterable[tuple[str, Record]]) -> None:
        """Open `path` with the rows of what is `finished`: names and records.

        Raises `UserError` if another process has it open, `RunError` if the disk refuses.
        """
        self._path = path
        text = "".join(
            [_lines([self.AREA_COLUMNS]), *(_lines(_rows(name, record)) for name, record in finished)]
        ).encode()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            self._lock()
            if self._file.read() != text:
                # Over what is there: mostly the same bytes, so that a kill in between leaves the rows as they were.
                self._file.seek(0)
                self._write(text)
                self._file.truncate()

    def add(self, name: str, record: Record) -> None:
        """Append the rows of an image. Raises `RunError` if the disk refuses."""
        with writing(self._path):
            self._write(_lines(_rows(name, record)).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{self._path} is being written by another process; wait for that one, give each its own --shard, "
                "or choose another --output"
            ) from None
        except OSError:  # a file system without locks: two processes would only do the same work twice
            return

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def _rows(name: str, record: Record) -> list[Sequence[Any]]:
    spacing = record["spacing"]
    return [
        (name, label, pixels, f"{pixels * spacing[0] * spacing[1]:.4f}" if spacing else "")
        for label, pixels in record["pixels"].items()
    ]


def _lines(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


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
