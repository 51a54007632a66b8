"""Output files of the predict command, all at the image's own resolution, and the table `areas.csv`.

Each mask carries a record of how it was made, with the digests of the image's other files (see `predict/resume.py`).
Images share no state, so any number of machines can write to one folder.
"""

import fcntl
import io
import json
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image, PngImagePlugin

from pdrunet_jax.data import overlay
from pdrunet_jax.data.dicom import is_dicom
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.labelme.contours import outlines
from pdrunet_jax.data.labelme.write import labelme_text
from pdrunet_jax.data.layers import region
from pdrunet_jax.predict.inference import Prediction
from pdrunet_jax.predict.medical import nifti_file, nrrd_file, read_geometry
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.extras import how_to_install
from pdrunet_jax.runtime.files import atomic_write, csv_text, open_in_place, writing

MASK = "_mask.png"
LAYER = "_mask_{}.png"
OVERLAY = "_overlay.png"
PROBABILITY = "_probability.png"
NPZ = "_probability.npz"
CONTOURS = "_contours.csv"
NRRD = "_mask.seg.nrrd"
NIFTI = "_mask.nii.gz"
LABELME = ".json"
LABELME_PICTURE = "_labelme.png"

MAX_NAME = 255 - len("..tmp")  # bytes of a file name, temporary file included

AREA_COLUMNS = ("image", "class", "pixels", "area_mm2")
CONFIDENCE = "confidence"  # last column of the table if it was asked for, and key of a record

RECORD_KEY = "pdrunet_jax.predict"  # of the PNG text chunk in a mask that holds its record as JSON

Record = dict[str, Any]
"""How a mask was made: "settings", "input" (the image's digest), "files" (suffix to digest of each other file), "mask"
(digest of the pixels), "pixels" of each class by name, "spacing" in mm or null, and "confidence" in each class by name
if it was asked for."""


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

    def check(self, *, overlap: bool) -> None:
        """Raise `UserError` if one of these files cannot hold classes that overlap."""
        if overlap and self.nifti:
            raise UserError(
                "--nifti writes a label map, with one class for each pixel, and the classes of these weights overlap; "
                "use --nrrd, or the masks of the single classes"
            )

    def suffixes(self, path: Path, labels: Sequence[str], outputs: int, *, overlap: bool = False) -> list[str]:
        """Suffixes of the files for the image at `path`, mask excluded, from a network with `outputs` channels.

        If classes `overlap`, there is a mask of each class, too.
        """
        return [
            *(_by_class(LAYER, labels) if overlap else []),
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
                raise UserError(f"--{option} needs {package}: {how_to_install(option)}")


class Areas:
    """`areas.csv`: one row per image and class, with the area if the file states its pixel spacing.

    It has a column of confidences if they are asked for, or known of some image.

    It is rebuilt from the masks' records on opening, so that no row is lost or repeated, and then grows image by image.
    """

    def __init__(
        self,
        path: Path,
        records: Mapping[str, Record],
        finished: Container[str],
        *,
        confidence: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Open `path` with the rows of the `finished` images, by name.

        Unless `overwrite` is set, a copy is kept of a table with rows from none of the `records`: they may be a
        person's. Raises `UserError` if this command did not write the table, or another process has it open, `RunError`
        if it cannot be written.
        """
        self._path = path
        self._confidence = confidence or any(record.get(CONFIDENCE) for record in records.values())
        text = self._text({name: record for name, record in records.items() if name in finished}, self._confidence)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(open_in_place(path, os.O_RDWR), "r+b")
            self._lock()
            if (earlier := self._file.read()) != text:
                if not overwrite:
                    self._keep(
                        earlier, [line for each in (True, False) for line in self._text(records, each).splitlines()]
                    )
                # Overwritten in place: most bytes are the same, so a kill halfway leaves the rows as they were.
                self._file.seek(0)
                self._write(text)
                self._file.truncate()

    def add(self, name: str, record: Record) -> None:
        """Append the rows of an image. Raises `RunError` if the table cannot be written."""
        with writing(self._path):
            self._write(csv_text(_area_rows(name, record, self._confidence)).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @staticmethod
    def _text(records: Mapping[str, Record], confidence: bool) -> bytes:
        """The whole table of these images."""
        rows = (row for name, record in records.items() for row in _area_rows(name, record, confidence))
        return csv_text([(*AREA_COLUMNS, CONFIDENCE) if confidence else AREA_COLUMNS, *rows]).encode()

    def _keep(self, earlier: bytes, known: Sequence[bytes]) -> None:
        """Keep a copy of a table with lines that are not `known`; the last one may be torn."""
        *lines, last = earlier.splitlines() or [b""]
        if not known[0].startswith((*lines, last)[0]):
            self._file.close()
            raise UserError(f"{self._path} was not written by this command; move it away, or give --overwrite")
        if not set(lines) <= set(known) or not any(line.startswith(last) for line in known):
            copy = keep_copy(self._path, earlier)
            print(f"{self._path} has rows of other images, or modified ones; a copy is kept as {copy}")

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


def keep_copy(path: Path, content: bytes) -> Path:
    """Write `content`, that of the table at `path`, next to it under a free name, which is returned."""
    free = (path.with_name(f"{path.stem}_earlier{number}.csv") for number in count(1))
    copy = next(each for each in free if not os.path.lexists(each))
    atomic_write(copy, content)
    return copy


def render(
    result: Prediction,
    path: Path,
    target: Path,
    labels: Sequence[str],
    files: WrittenFiles,
    suffixes: Sequence[str],
    confidence: Mapping[str, float] | None = None,
    pixels: np.ndarray | None = None,
) -> dict[str, bytes]:
    """Contents of the files `suffixes` (those of `WrittenFiles.suffixes`) of the image at `path`.

    The overlay states the `confidence` in each class, if given. `pixels` are the grey values (H, W, 1) of the image if
    they are known; otherwise it is read.

    Raises `UserError` if the image cannot be read, `OSError`.
    """
    mask, single, overlap = result.mask, result.probability.ndim == 2, result.mask.ndim == 3
    if pixels is None:
        pixels = read_image(path, 1) if {OVERLAY, LABELME_PICTURE} & set(suffixes) else np.empty(0)
    grey = pixels
    makers: dict[str, Callable[[], bytes | str]] = {
        OVERLAY: lambda: _overlay(grey, mask, labels, confidence),
        NPZ: lambda: _npz(result.probability, labels if overlap else ["background", *labels]),
        CONTOURS: lambda: _contours(mask, labels, files.tolerance),
        NRRD: lambda: nrrd_file(mask, labels, read_geometry(path)),
        NIFTI: lambda: nifti_file(mask, read_geometry(path)),
        LABELME_PICTURE: lambda: overlay.png(Image.fromarray(np.rint(grey[..., 0]).astype(np.uint8))),
        LABELME: lambda: _labelme(mask, path, target, labels, files.tolerance),
    }
    channels = [result.probability] if single else np.moveaxis(result.probability, -1, 0)[0 if overlap else 1 :]
    for suffix, channel in zip(_probability_suffixes(labels, single), channels, strict=True):
        makers[suffix] = partial(_sixteen_bits, channel)
    if overlap:
        for place, suffix in enumerate(_by_class(LAYER, labels)):
            makers[suffix] = partial(overlay.png, overlay.index_mask(mask[..., place], 1))
    contents = {suffix: makers[suffix]() for suffix in suffixes}
    return {suffix: data.encode() if isinstance(data, str) else data for suffix, data in contents.items()}


def mask_png(mask: np.ndarray, classes: int, record: Record) -> bytes:
    """Content of NAME_mask.png, with its record."""
    text, file = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text(RECORD_KEY, json.dumps(record))
    overlay.index_mask(mask, classes).save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def with_suffix(target: Path, suffix: str) -> Path:
    """`target` with `suffix` appended to its name."""
    return target.with_name(target.name + suffix)


def require_short_names(target: Path, suffixes: Sequence[str]) -> None:
    """Raise `UserError` if a result of `target` would have a longer name than file systems allow."""
    longest = max((os.fsencode(with_suffix(target, suffix).name) for suffix in suffixes), key=len, default=b"")
    if len(longest) > MAX_NAME:
        over = len(longest) - MAX_NAME
        raise UserError(f"the names of its results would be too long; shorten the image's name by {over} bytes")


def _probability_suffixes(labels: Sequence[str], single: bool) -> list[str]:
    return [PROBABILITY] if single else _by_class("_probability_{}.png", labels)


def _by_class(form: str, labels: Sequence[str]) -> list[str]:
    """One suffix a class, different in file systems of all kinds."""
    safe = ["".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in label) for label in labels]
    if len({label.lower() for label in safe}) < len(safe):
        safe = [f"{number}_{label}" for number, label in enumerate(safe, 1)]
    return [form.format(label) for label in safe]


def _overlay(
    pixels: np.ndarray, mask: np.ndarray, labels: Sequence[str], confidence: Mapping[str, float] | None
) -> bytes:
    picture = Image.fromarray(overlay.overlay(pixels, mask))
    if confidence:
        texts = [f"{label}: confidence {confidence[label]:.2f}" for label in labels]
        overlay.write_lines(picture, [(text, overlay.colour_of(index)) for index, text in enumerate(texts, 1)])
    return overlay.png(picture)


def _sixteen_bits(probability: np.ndarray) -> bytes:
    return overlay.png(Image.fromarray(np.rint(probability * 65535).astype(np.uint16)))


def _npz(probability: np.ndarray, channels: Sequence[str]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, probability=probability, classes=np.array(channels))
    return file.getvalue()


def _labelme(mask: np.ndarray, path: Path, target: Path, labels: Sequence[str], tolerance: float) -> str:
    shown = with_suffix(target, LABELME_PICTURE) if is_dicom(path) else path  # LabelMe does not open DICOM
    relative = Path(os.path.relpath(shown.parent.resolve() / shown.name, target.parent.resolve())).as_posix()
    return labelme_text(mask, labels, relative, tolerance=tolerance)


def _contours(mask: np.ndarray, labels: Sequence[str], tolerance: float) -> str:
    """Rows of class, contour, x and y. (0.5, 0.5) is the centre of the upper left pixel, as in LabelMe."""
    points = (
        (label, number, x + 0.5, y + 0.5)
        for index, label in enumerate(labels, 1)
        for number, ring in enumerate(outlines(region(mask, index), tolerance), 1)
        for x, y in ring.tolist()
    )
    return csv_text([("class", "contour", "x", "y"), *points])


def _area_rows(name: str, record: Record, confidence: bool) -> list[Sequence[Any]]:
    spacing, known = record["spacing"], record.get(CONFIDENCE) or {}
    rows: list[Sequence[Any]] = [
        (name, label, pixels, f"{pixels * spacing[0] * spacing[1]:.4f}" if spacing else "")
        for label, pixels in record["pixels"].items()
    ]
    if not confidence:
        return rows
    return [(*row, f"{known[row[1]]:.4f}" if row[1] in known else "") for row in rows]
