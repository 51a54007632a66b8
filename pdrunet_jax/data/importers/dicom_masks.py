"""DICOM files as masks: images of class values, and DICOM segmentations (SEG), read by pydicom (extra `dicom`)."""

import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pdrunet_jax.data.dicom import import_pydicom
from pdrunet_jax.data.images import read_bytes
from pdrunet_jax.data.importers.bitmaps import whole
from pdrunet_jax.data.importers.files import Images, is_inside, problem, writable
from pdrunet_jax.data.labelme.read import Shape
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.extras import how_to_install

_SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_LABEL_MAP = _SEG[1]  # frames of segment numbers instead of one frame for each segment
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5")  # and RLE
_DICOM = (".dcm", ".dicom")


def find_segs(source: Path, names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The DICOM SEG among `names`, with their headers, and problems."""
    found, problems = dict[str, Any](), list[str]()
    for name in (name for name in names if name.lower().endswith(_DICOM)):
        try:
            dataset = _read(source / name, name, source, pixels=False)
        except DataError as error:
            problems += error.problems
            continue
        if str(dataset.get("SOPClassUID", "")) in _SEG:
            found[name] = dataset
    return found, problems


def read_mask(path: Path, name: str, root: Path) -> np.ndarray:
    """The stored values of a DICOM image below `root`, (H, W, 1). Raises `DataError` that calls it `name`."""
    pixels = _pixels(_read(path, name, root, pixels=True), name)
    if pixels.ndim != 2:
        raise problem(name, "a DICOM mask of several frames or colours; save it as one grey image")
    return pixels[:, :, None]


def referenced(
    segs: Mapping[str, Any], images: Images, source: Path, problems: list[str]
) -> Iterator[tuple[str, str, Callable[[str], list[Shape]]]]:
    """Yield for each SEG and each image that it segments: the image, the SEG, and what reads the shapes.

    The image is the one that the frames refer to, or else the one with the name. Problems are added to `problems`.
    """
    by_uid: dict[str, list[str]] = defaultdict(list)
    for image in (name for name in images.names if segs and name.lower().endswith(_DICOM)):
        try:
            by_uid[str(_read(images.root / image, image, images.root, pixels=False).get("SOPInstanceUID", ""))].append(
                image
            )
        except DataError as error:
            problems += error.problems
    for name, dataset in segs.items():
        try:
            frames = _frames(dataset, name)
            by_image: dict[str, list[int]] = defaultdict(list)
            for frame, uids in enumerate(frames):
                found = [image for uid in uids for image in by_uid.get(uid, [])]
                if not found:
                    found = images.pairs(name)
                if len(set(found)) != 1:
                    raise problem(name, "a mask without an image: none of the images is the one it refers to")
                by_image[found[0]].append(frame)
        except DataError as error:
            problems += error.problems
            continue
        for image, numbers in by_image.items():
            yield image, name, partial(_shapes, source / name, source, numbers)


def _read(path: Path, name: str, root: Path, *, pixels: bool) -> Any:
    try:
        pydicom = import_pydicom()
    except ImportError:
        raise UserError(f"DICOM needs pydicom: {how_to_install('dicom')}") from None
    if not is_inside(path, root):
        raise problem(name, "a link that leads out of the folder; refused")
    data = read_bytes(path, name)
    if b"1.2.840.10008.1.2.1.99" in data[:4096]:  # pydicom would inflate it without limit
        raise problem(name, "a deflated DICOM file, of unknown size; save it uncompressed")
    try:
        return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=not pixels, force=True)
    except Exception as error:  # pydicom raises nearly every type on damaged files
        raise problem(name, f"no readable DICOM file ({type(error).__name__})") from None


def _pixels(dataset: Any, name: str) -> np.ndarray:
    try:
        sides = [int(dataset.get(key) or 1) for key in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")]
        syntax = str(getattr(dataset.file_meta, "TransferSyntaxUID", _PLAIN[0]))
        if min(sides) < 1 or math.prod(sides) > 4 * (Image.MAX_IMAGE_PIXELS or 1 << 62):
            raise problem(name, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: refused as a bomb")
        if syntax not in _PLAIN:
            raise problem(name, "a compressed DICOM mask; save it uncompressed")
        if not hasattr(dataset.file_meta, "TransferSyntaxUID"):
            dataset.file_meta.TransferSyntaxUID = _PLAIN[0]
        return np.asarray(dataset.pixel_array)
    except DataError:
        raise
    except Exception as error:  # pydicom raises nearly every type on damaged files
        raise problem(name, f"damaged DICOM pixel data ({type(error).__name__})") from None


def _frames(dataset: Any, name: str) -> list[list[str]]:
    """For each frame, the UIDs of the images that it may refer to."""
    try:
        count = int(dataset.get("NumberOfFrames") or 1)
        groups = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
        series = [
            str(item.get("ReferencedSOPInstanceUID", ""))
            for each in dataset.get("ReferencedSeriesSequence") or []
            for item in each.get("ReferencedInstanceSequence") or []
        ]
        if not 0 < count <= 10_000 or (groups and len(groups) != count):
            raise problem(name, "the number of its frames is not that of their descriptions")
        return [_sources(groups[i : i + 1]) or _sources(shared) or series for i in range(count)]
    except DataError:
        raise
    except Exception as error:
        raise problem(name, f"damaged DICOM SEG ({type(error).__name__})") from None


def _sources(groups: Sequence[Any]) -> list[str]:
    return [
        str(source.get("ReferencedSOPInstanceUID", ""))
        for group in groups
        for derivation in group.get("DerivationImageSequence") or []
        for source in derivation.get("SourceImageSequence") or []
    ]


def _shapes(path: Path, root: Path, frames: Sequence[int], name: str) -> list[Shape]:
    """The segments of some frames, in the order of their numbers. Raises `DataError`."""
    dataset = _read(path, name, root, pixels=True)
    pixels = _pixels(dataset, name)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    try:
        labels = {
            int(item.SegmentNumber): str(item.get("SegmentLabel", "")).strip()
            for item in dataset.get("SegmentSequence") or []
        }
        groups = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
        numbers = [_segment([*groups[frame : frame + 1], *shared], frame) for frame in range(len(pixels))]
        half = int(dataset.get("MaximumFractionalValue") or 1) / 2
    except Exception as error:
        raise problem(name, f"damaged DICOM SEG ({type(error).__name__})") from None
    if pixels.ndim != 3 or max(frames) >= len(pixels):
        raise problem(name, "damaged DICOM SEG (frames are missing)")
    size = pixels.shape[1], pixels.shape[2]
    layers: list[tuple[int, NDArray[np.bool_]]] = []
    for frame in frames:
        if str(dataset.get("SOPClassUID", "")) == _LABEL_MAP:
            layers += [(value, pixels[frame] == value) for value in np.unique(pixels[frame]).tolist() if value]
        else:
            fractional = str(dataset.get("SegmentationType", "")) == "FRACTIONAL"
            layers.append((numbers[frame], pixels[frame] > half if fractional else pixels[frame] > 0))
    shapes = []
    for number, layer in sorted(layers, key=lambda item: item[0]):
        label = labels.get(number) or (f"segment {number}" if labels or len(layers) > 1 else "foreground")
        if not writable(label):
            raise problem(name, f"the label of segment {number} must be printable text")
        shapes.append(whole(label, size, partial(_layer, layer)))
    return shapes


def _layer(layer: NDArray[np.bool_], _: str) -> NDArray[np.bool_]:
    return layer


def _segment(groups: Sequence[Any], frame: int) -> int:
    """The number of the segment in a frame."""
    for group in groups:
        for item in group.get("SegmentIdentificationSequence") or []:
            return int(item.ReferencedSegmentNumber)
    return frame + 1
