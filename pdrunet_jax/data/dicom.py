"""DICOM radiographs through pydicom (extra `dicom`): rescaled, windowed, bright bone.

Nothing but pixels and their spacing leaves this module, and error messages carry no value of the file: patient data
never reaches logs.
"""

import io
from typing import Any

import numpy as np

from pdrunet_jax.data.images import scale_by_percentiles, unreadable


def decode(data: bytes, name: str) -> tuple[np.ndarray, str]:
    """(H, W) float32 in [0, 255], or (H, W, 3) uint8 for colour, and the photometric interpretation.

    The stored values pass the rescale slope and intercept, then the first window or, without one, the range of their
    percentiles; MONOCHROME1 is inverted, so that dense things are bright in either. Raises `DataError`.
    """
    dataset = _read(data, name)
    kind = str(dataset.get("PhotometricInterpretation", ""))
    try:
        pixels = np.asarray(dataset.pixel_array)
    except Exception as error:  # the decoders raise nearly every type on damaged files
        raise unreadable(name, _explain(dataset, error)) from None
    if pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8:
        return pixels, f"DICOM {kind}"
    if pixels.ndim != 2:
        raise unreadable(name, f"shape {'x'.join(map(str, pixels.shape))}; single grey or 8-bit RGB images are read")
    values = pixels.astype(np.float64) * _number(dataset, "RescaleSlope", 1.0) + _number(
        dataset, "RescaleIntercept", 0.0
    )
    scaled = _window(values, dataset)
    if kind == "MONOCHROME1":
        scaled = 255 - scaled
    return scaled, f"DICOM {kind} {dataset.get('BitsStored', '')}-bit"


def spacing(data: bytes, name: str) -> tuple[float, float] | None:
    """(row, column) spacing in mm: calibrated pixel spacing, else the detector's; None where it is absent or 0."""
    dataset = _read(data, name)
    for tag in ("PixelSpacing", "ImagerPixelSpacing"):
        value = dataset.get(tag)
        try:
            rows, columns = (float(item) for item in value)
        except (TypeError, ValueError):
            continue
        if rows > 0 and columns > 0:
            return rows, columns
    return None


def _read(data: bytes, name: str) -> Any:
    try:
        import pydicom
    except ImportError:
        raise unreadable(name, "DICOM needs pydicom: pip install 'pdrunet-jax[dicom]'") from None
    # pydicom's warnings about malformed elements quote them, and they may be a patient's name.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        return pydicom.dcmread(io.BytesIO(data))
    except Exception as error:  # the parser raises nearly every type on damaged files
        raise unreadable(name, f"no readable DICOM file ({type(error).__name__})") from None


def _explain(dataset: Any, error: Exception) -> str:
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is not None and syntax.is_compressed and isinstance(error, (RuntimeError, NotImplementedError)):
        return f"no decoder for {syntax.name}, or damaged pixel data; decoders: pip install 'pdrunet-jax[dicom]'"
    if "PixelData" not in dataset:
        return "a DICOM file without an image"
    return f"damaged or truncated DICOM pixel data ({type(error).__name__})"


def _number(dataset: Any, tag: str, default: float) -> float:
    value = dataset.get(tag)
    if value is not None and not isinstance(value, str) and hasattr(value, "__len__"):  # several windows: the first
        value = value[0] if len(value) else None
    return default if value in (None, "") else float(value)


def _window(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Linear, exact linear or sigmoid window of DICOM PS3.3 C.11.2.1.2, to float32 in [0, 255]."""
    width = _number(dataset, "WindowWidth", 0.0)
    if width <= 0:
        return scale_by_percentiles(values)
    centre = _number(dataset, "WindowCenter", 0.0)
    function = str(dataset.get("VOILUTFunction", "LINEAR") or "LINEAR")
    if function == "SIGMOID":
        share = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    elif function == "LINEAR_EXACT":
        share = (values - centre) / width + 0.5
    else:
        share = (values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5
    return (np.clip(share, 0, 1) * 255).astype(np.float32)
