"""DICOM radiographs through pydicom (extra `dicom`): rescaled, windowed, bright bone.

Nothing but pixels and their spacing leaves this module, and error messages carry no value of the file: patient data
never reaches logs.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from pdrunet_jax.data.images import scale_by_range, unreadable
from pdrunet_jax.errors import DataError

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_HEADER = 4096
"""Bytes at the beginning in which a file names its encoding. pydicom would inflate a deflated one without limit."""


def decode(data: bytes, name: str) -> tuple[np.ndarray, str]:
    """(H, W) float32 in [0, 255], or (H, W, 3) uint8 for colour, and the photometric interpretation.

    The stored values pass the rescale slope and intercept, then the first window or, without one, their own range;
    MONOCHROME1 is inverted, so that dense things are bright in either. Raises `DataError`.
    """
    with _damage_named(name):
        dataset = _read(data, name)
        kind = str(dataset.get("PhotometricInterpretation", ""))
        pixels = _stored_pixels(dataset, name)
        if pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8:
            return pixels, f"DICOM {kind}"
        if pixels.ndim != 2 or kind == "PALETTE COLOR":
            shape = "x".join(map(str, pixels.shape))
            raise unreadable(name, f"{kind} of shape {shape}; single grey or 8-bit RGB images are read")
        values = pixels.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= _number(dataset, "RescaleSlope", 1.0)
            values += _number(dataset, "RescaleIntercept", 0.0)
        if not np.isfinite(values).all():
            raise unreadable(name, "its rescale slope and intercept lead to infinity")
        scaled = _window(values, dataset)
        if kind == "MONOCHROME1":
            np.subtract(255, scaled, out=scaled)
        return scaled, f"DICOM {kind} {dataset.get('BitsStored', '')}-bit"


def spacing(data: bytes, name: str) -> tuple[float, float] | None:
    """(row, column) spacing in mm: calibrated pixel spacing, else the detector's; None where it is absent or 0."""
    with _damage_named(name):
        dataset = _read(data, name)
        for tag in ("PixelSpacing", "ImagerPixelSpacing"):
            value = dataset.get(tag)
            try:
                rows, columns = (float(item) for item in value)
            except (TypeError, ValueError, OverflowError):
                continue
            if 0 < rows < math.inf and 0 < columns < math.inf:
                return rows, columns
        return None


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Pydicom decodes every element when it is asked for, and raises nearly every type where that is damaged."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise unreadable(name, f"damaged DICOM file ({type(error).__name__})") from None


def _read(data: bytes, name: str) -> Any:
    try:
        import pydicom
    except ImportError:
        raise unreadable(name, "DICOM needs pydicom: pip install 'pdrunet-jax[dicom]'") from None
    # pydicom's warnings about malformed elements quote them, and they may be a patient's name.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    if _DEFLATED in data[:_HEADER]:
        raise unreadable(name, "a deflated DICOM file, of unknown size; save it uncompressed")
    try:
        return pydicom.dcmread(io.BytesIO(data))
    except Exception as error:  # the parser raises nearly every type on damaged files
        raise unreadable(name, f"no readable DICOM file ({type(error).__name__})") from None


def _stored_pixels(dataset: Any, name: str) -> np.ndarray:
    _refuse_bomb(dataset, name)
    try:
        return np.asarray(dataset.pixel_array)
    except Exception as error:  # so do its decoders
        raise unreadable(name, _explain(dataset, error)) from None


def _refuse_bomb(dataset: Any, name: str) -> None:
    """Decoders make room for what the header claims before they look at the data."""
    sides = (_number(dataset, tag, 1.0) for tag in ("Rows", "Columns", "NumberOfFrames"))
    if not math.prod(sides) <= (most := Image.MAX_IMAGE_PIXELS or math.inf):
        raise unreadable(name, f"more than {most:,} pixels: refused as a bomb")


def _explain(dataset: Any, error: Exception) -> str:
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is not None and not syntax.is_transfer_syntax:
        syntax = None
    if syntax is not None and syntax.is_compressed and isinstance(error, (RuntimeError, NotImplementedError)):
        return f"no decoder for {syntax.name}, or damaged pixel data; decoders: pip install 'pdrunet-jax[dicom]'"
    if "PixelData" not in dataset:
        return "a DICOM file without an image"
    return f"damaged or truncated DICOM pixel data ({type(error).__name__})"


def _number(dataset: Any, tag: str, default: float) -> float:
    """The element as a number, the first one of several; `default` where there is none, or no finite number."""
    value = dataset.get(tag)
    if value is not None and not isinstance(value, str | bytes) and hasattr(value, "__len__"):
        value = value[0] if len(value) else None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return number if math.isfinite(number) else default


def _window(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Linear, exact linear or sigmoid window of DICOM PS3.3 C.11.2.1.2, to float32 in [0, 255].

    `values` (float64) are used up: large radiographs take enough memory as it is.
    """
    width = _number(dataset, "WindowWidth", 0.0)
    if width <= 0:
        return scale_by_range(values)
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
