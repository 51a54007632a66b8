"""DICOM radiographs to pixels, by pydicom (extra `dicom`): rescaled, windowed, padding black, bones bright.

Only pixels and their spacing leave this module, and error messages quote no value of a DICOM file but the kind of its
contents, so patient data never reaches a log.
"""

import copy
import io
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdrunet_jax.data.damage import jpeg_fault, jpeg_header, unreadable
from pdrunet_jax.data.greys import LOW_CONTRAST, contrast, scale_by_range
from pdrunet_jax.runtime.errors import DataError
from pdrunet_jax.runtime.extras import how_to_install
from pdrunet_jax.runtime.opening import open_regular

HEAD = 144
"""Bytes of a file that `looks_like_dicom` needs."""

_BARE = re.compile(rb"[\x02\x08]\0[\0-\x1a]\0(?:[A-Z]{2}|..\0\0)", re.DOTALL)
"""First element of a file without the preamble: group 2 or 8, with a type or else a length below 65,536."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # transfer syntax of deflated DICOM, which pydicom would inflate without limit
_ITEM = b"\xfe\xff\x00\xe0"  # begins compressed pixels
_JPEG_2000 = b"\xff\x4f\xff\x51"  # the markers at the beginning of a codestream: SOC, SIZ


def looks_like_dicom(data: bytes) -> bool:
    """Whether a file is DICOM, with or without the preamble, by its first `HEAD` bytes."""
    return data[128:132] == b"DICM" or _BARE.match(data) is not None


def is_dicom(path: Path) -> bool:
    """Whether a file is read as DICOM, by its content. Raises `OSError` if it cannot be opened."""
    with open_regular(path) as file:
        return looks_like_dicom(file.read(HEAD))


def import_pydicom() -> Any:
    """The module pydicom, with validation off: its warnings quote malformed elements, perhaps a patient's name."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


def other_content(path: Path) -> str | None:
    """What a DICOM file holds instead of an image, such as "Segmentation"; None for images and other files.

    Without pydicom, every file counts as an image.
    """
    try:
        with open_regular(path) as file:
            if not looks_like_dicom(file.read(HEAD)):
                return None
            file.seek(0)
            tags = ["SOPClassUID", "MediaStorageSOPClassUID"]
            return _other_content(import_pydicom().dcmread(file, force=True, specific_tags=tags))
    except Exception:  # whatever is wrong with it is reported when it is read as an image
        return None


def dicom_spacing(data: bytes, name: str) -> tuple[float, float] | None:
    """Spacing (between rows, between columns) in mm, calibrated before the detector's. Raises `DataError`."""
    with _dicom_errors(name):
        dataset = _read_dicom(data, name)
        spacings = (dicom_numbers(dataset, element, 2) for element in ("PixelSpacing", "ImagerPixelSpacing"))
        return next(((found[0], found[1]) for found in spacings if found and min(found) > 0), None)


def decode_dicom(data: bytes, name: str, remarks: list[str]) -> tuple[np.ndarray, str]:
    """(H, W) float32 in [0, 255], or (H, W, 3) uint8 for colour, and the photometric interpretation.

    Stored values pass the modality LUT or the rescale slope and intercept, then the first VOI LUT, else the first
    window, else `scale_by_range`. MONOCHROME1 is inverted, so that dense tissue is always bright. Padding is black.
    Appends to `remarks`. Raises `DataError`.
    """
    with _dicom_errors(name):
        dataset = _read_dicom(data, name)
        kind = str(dataset.get("PhotometricInterpretation", ""))
        pixels = _stored_pixels(dataset, name)
        if pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8:
            return pixels, f"DICOM {kind}"
        if pixels.ndim != 2 or kind == "PALETTE COLOR":
            shape = "x".join(map(str, pixels.shape))
            frames = f"{pixels.shape[0]} frames, " if int(dataset.get("NumberOfFrames") or 1) > 1 else ""
            raise unreadable(name, f"{frames}{kind} of shape {shape}; save it as one grey or 8-bit RGB image")
        valid = _not_padding(pixels, dataset)
        values = _modality_values(pixels, dataset)
        if not np.isfinite(values).all():
            raise unreadable(name, "its rescale slope and intercept exceed the range of numbers")
        scaled = _brightness(values, valid, dataset, remarks)
        if kind == "MONOCHROME1":
            np.subtract(255, scaled, out=scaled)
        if valid is not None:
            scaled[~valid] = 0
        return scaled, f"DICOM {kind} {dataset.get('BitsStored', '')}-bit"


def dicom_numbers(dataset: Any, element: str, count: int) -> tuple[float, ...] | None:
    """A DICOM element as `count` finite numbers; None if it is absent or anything else."""
    try:
        value = dataset.get(element)
        numbers = tuple(float(item) for item in (value if count > 1 else [value]))
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


@contextmanager
def _dicom_errors(name: str) -> Iterator[None]:
    """Turn any exception into a `DataError`: pydicom raises nearly every type on damaged elements."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise unreadable(name, f"damaged DICOM file ({type(error).__name__})") from None


def _read_dicom(data: bytes, name: str) -> Any:
    try:
        pydicom = import_pydicom()
    except ImportError:
        raise unreadable(name, f"DICOM needs pydicom: {how_to_install('dicom')}") from None
    if _DEFLATED in data:  # anywhere: a long element may come before the transfer syntax
        raise unreadable(name, "a deflated DICOM file, of unknown size; save it uncompressed")
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    except Exception as error:
        raise unreadable(name, f"no readable DICOM file ({type(error).__name__})") from None
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        plain = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = plain if little else pydicom.uid.ExplicitVRBigEndian
        if bytes(dataset.get("PixelData", b"")).startswith(_ITEM):
            raise unreadable(name, "compressed, but the file does not state how (no transfer syntax)")
    return dataset


def _other_content(dataset: Any) -> str | None:
    """What a dataset that was read holds by its SOP class, if that is known and not an image."""
    meta = getattr(dataset, "file_meta", {})
    uid = import_pydicom().uid.UID(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
    if uid.type != "SOP Class" or "Image Storage" in uid.name:
        return None
    return str(uid.name).removesuffix(" Storage")


def _stored_pixels(dataset: Any, name: str) -> np.ndarray:
    if (content := _other_content(dataset)) is not None:
        raise unreadable(name, f"not an image, but a DICOM file of another kind: {content}")
    # Decoders allocate what the header claims before they look at the data.
    sides = (_number(dataset, tag, 1.0) for tag in ("Rows", "Columns", "NumberOfFrames"))
    if not math.prod(sides) <= (most := Image.MAX_IMAGE_PIXELS or math.inf):
        raise unreadable(name, f"more than {most:,} pixels: refused as a bomb")
    try:
        frames = _compressed_frames(dataset)
        if _is_bomb(dataset, frames):
            raise unreadable(name, "its compressed pixels have another size than its header states: refused as a bomb")
        if (fault := _jpeg_fault(dataset, frames)) is not None:
            raise unreadable(name, f"damaged or truncated DICOM pixel data ({fault})")
        return np.asarray(dataset.pixel_array)
    except DataError:
        raise
    except Exception as error:
        raise unreadable(name, _explain(dataset, error)) from None


def _compressed_frames(dataset: Any) -> list[bytes]:
    """The compressed images of a dataset; none if its pixels are not compressed."""
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated or "PixelData" not in dataset:
        return []
    from pydicom.encaps import generate_frames

    return list(generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames") or 1)))


def _is_bomb(dataset: Any, frames: list[bytes]) -> bool:
    """Whether compressed pixels state another size than the DICOM header: decoders allocate theirs."""
    if not frames:
        return False
    size = int(dataset.Rows), int(dataset.Columns)
    most = 2 * math.prod(size) * int(dataset.SamplesPerPixel) * int(dataset.BitsAllocated) // 8 + 64
    for frame in frames:
        if dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.5" and len(frame) > most:  # RLE: up to 64 times
            return True
        if any(stated != size for stated in _coded_sizes(frame)):
            return True
    return False


def _coded_sizes(frame: bytes) -> Iterator[tuple[int, int]]:
    """(rows, columns) in the headers of a JPEG, JPEG-LS or JPEG 2000 codestream."""
    # In a bare codestream only the first can be one; inside a file format, or behind anything else, each may be.
    starts = [0] if frame.startswith(_JPEG_2000) else [found.start() for found in re.finditer(_JPEG_2000, frame)]
    for start in starts:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        yield bottom - top, right - left
    if (header := jpeg_header(frame)) is not None:
        yield header[2], header[3]


def _jpeg_fault(dataset: Any, frames: list[bytes]) -> str | None:
    """Whether the only frame is a damaged JPEG; the decoders pass over what libjpeg warns of."""
    if len(frames) != 1:  # several are refused anyway
        return None
    from pydicom.encaps import encapsulate

    def decode(frame: bytes) -> np.ndarray:
        if frame is frames[0]:
            return np.asarray(dataset.pixel_array)  # pydicom keeps it
        changed = copy.deepcopy(dataset)
        changed.PixelData = encapsulate([frame])
        changed["PixelData"].is_undefined_length = True
        return np.asarray(changed.pixel_array)

    return jpeg_fault(frames[0], decode)


def _explain(dataset: Any, error: Exception) -> str:
    syntax: Any = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    known = syntax is not None and syntax.is_transfer_syntax
    if known and syntax.is_compressed and isinstance(error, RuntimeError):
        return f"no decoder for {syntax.name}, or damaged pixel data; decoders: {how_to_install('dicom')}"
    if "PixelData" not in dataset:
        return "a DICOM file without an image"
    return f"damaged or truncated DICOM pixel data ({type(error).__name__})"


def _number(dataset: Any, tag: str, default: float) -> float:
    """The element's first value; `default` if it is absent or not a finite number."""
    value = dataset.get(tag)
    if value is not None and not isinstance(value, str | bytes) and hasattr(value, "__len__"):
        value = value[0] if len(value) else None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return number if math.isfinite(number) else default


def _not_padding(pixels: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Where stored values (H, W) are no padding; None if the file declares none or no pixel has it."""
    first = dicom_numbers(dataset, "PixelPaddingValue", 1)
    if first is None:
        return None
    last = dicom_numbers(dataset, "PixelPaddingRangeLimit", 1) or first
    # The element may have been written as signed where pixels are unsigned, or the other way round.
    ends = np.array([int(first[0]), int(last[0])]).astype(pixels.dtype)
    valid: np.ndarray = (pixels < ends.min()) | (pixels > ends.max())
    return None if valid.all() else valid


def _modality_values(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    """Stored values (H, W) after the modality LUT, or the rescale slope and intercept, as float64."""
    if dataset.get("ModalityLUTSequence"):
        from pydicom.pixels.processing import apply_modality_lut

        table, _, _ = _lut(dataset, "ModalityLUTSequence")
        return np.asarray(apply_modality_lut(pixels.astype(np.int32), table), np.float64)
    values = pixels.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= _number(dataset, "RescaleSlope", 1.0)
        values += _number(dataset, "RescaleIntercept", 0.0)
    return values


def _lut(dataset: Any, sequence: str) -> tuple[Any, tuple[int, int], int]:
    """A dataset with only the first table of `sequence`, its first and last input value, and its bits.

    It declares 16 bits: pydicom would cut the input of an 8-bit table to 8 bits.
    """
    item = copy.deepcopy(dataset[sequence].value[0])
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    item.LUTDescriptor = [count, first, 16]
    table = import_pydicom().Dataset()
    table.file_meta = dataset.file_meta
    setattr(table, sequence, [item])
    return table, (first, first + (count or 1 << 16) - 1), bits


def _brightness(values: np.ndarray, valid: np.ndarray | None, dataset: Any, remarks: list[str]) -> np.ndarray:
    """Scale values (H, W) float64 to float32 in [0, 255] by the VOI LUT, the window or their range."""
    if dataset.get("VOILUTSequence"):
        from pydicom.pixels.processing import apply_voi

        what, (table, ends, bits) = "VOI LUT", _lut(dataset, "VOILUTSequence")
        mapped = apply_voi(np.clip(np.rint(values), *ends).astype(np.int64), table)
        scaled = np.clip(mapped * np.float32(255 / (2**bits - 1)), 0, 255, dtype=np.float32)
    elif _number(dataset, "WindowWidth", 0.0) > 0:
        what, scaled = "window", _window(values.copy(), dataset)
    else:
        return scale_by_range(values, valid)
    if contrast(scaled if valid is None else scaled[valid]) <= LOW_CONTRAST:
        ranged = scale_by_range(values, valid)
        if contrast(ranged if valid is None else ranged[valid]) > LOW_CONTRAST:  # else the image itself has none
            remarks.append(f"its {what} leaves next to no contrast: scaled from darkest to brightest pixel instead")
            return ranged
    return scaled


def _window(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Apply the linear, exact linear or sigmoid window of DICOM PS3.3 C.11.2.1.2; float32 in [0, 255].

    Overwrites `values` (float64): large radiographs take enough memory as it is.
    """
    width = _number(dataset, "WindowWidth", 0.0)
    centre = _number(dataset, "WindowCenter", 0.0)
    function = str(dataset.get("VOILUTFunction", "LINEAR") or "LINEAR")
    if function == "SIGMOID":
        values -= centre
        values *= -4
        values /= width
        np.exp(np.clip(values, -700, 700, out=values), out=values)
        values += 1
        np.reciprocal(values, out=values)
    else:
        exact = function == "LINEAR_EXACT"
        values -= centre if exact else centre - 0.5
        values /= width if exact else max(width - 1, 1e-6)
        values += 0.5
    np.clip(values, 0, 1, out=values)
    values *= 255
    return values.astype(np.float32)
