"""Image files to pixels: PNG, JPEG, TIFF, BMP and DICOM of any depth, upright.

A file that cannot be read exactly is an error that names it. DICOM radiographs are read by pydicom (extra `dicom`):
rescaled, windowed, bones bright. Only pixels and their spacing leave this module, and error messages quote no value of
a DICOM file, so patient data never reaches a log.
"""

import io
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# Importing its plugin registers TIFF; otherwise `Image.open` would load every plugin to find it.
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from pdrunet_jax.runtime.errors import DataError, UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom"})
"""File name extensions of images, in lower case."""

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of more than 8 bits; all have one channel
_BITS_PER_SAMPLE = 258  # TIFF tag
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks that may hold an EXIF orientation
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # transfer syntax of deflated DICOM, which pydicom would inflate without limit
_JPEG_2000 = b"\xff\x4f\xff\x51"  # the markers at the beginning of a codestream: SOC, SIZ
_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})  # SOF markers, that of JPEG-LS included


def read_image(path: Path, channels: int = 1) -> np.ndarray:
    """Read an image file and turn it upright by its EXIF orientation.

    Returns (H, W, channels) with 1 (grey) or 3 (RGB) channels: uint8 for 8-bit sources (grey is exactly Pillow's
    `convert("L")`), float32 in [0, 255] for deeper ones, scaled by their window or else by `scale_by_range`.

    Raises `DataError` that names the file.
    """
    return decode_image(read_bytes(path, str(path)), str(path), channels)[0]


def read_spacing(path: Path) -> tuple[float, float] | None:
    """Pixel spacing (between rows, between columns) in mm of a DICOM file; None if it is absent or 0.

    Calibrated pixel spacing comes before the detector's. The dots per inch of other formats are not trusted: editors
    write them. Raises `DataError` that names the file.
    """
    name = str(path)
    data = read_bytes(path, name)
    if not looks_like_dicom(data, path.name):
        return None
    with _dicom_errors(name):
        dataset = _read_dicom(data, name)
        spacings = (dicom_numbers(dataset, element, 2) for element in ("PixelSpacing", "ImagerPixelSpacing"))
        return next(((found[0], found[1]) for found in spacings if found and min(found) > 0), None)


def resize_image(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) uint8, or float32 in [0, 255], to (height, width, C) uint8.

    Antialiased bilinear resampling: Pillow's `resize`, bit for bit on 8-bit grey.
    """
    height, width = size
    planes = []
    for channel in range(pixels.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(pixels[:, :, channel]))
        resized = np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR))
        planes.append(resized if resized.dtype == np.uint8 else np.clip(np.rint(resized), 0, 255).astype(np.uint8))
    return np.stack(planes, axis=-1)


def read_bytes(path: Path, name: str) -> bytes:
    """The content of a file; raises `DataError` that calls it `name`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(name, error.strerror or str(error)) from None


def decode_image(data: bytes, name: str, channels: int = 1) -> tuple[np.ndarray, str]:
    """Decode the content of an image file: pixels as from `read_image`, and its mode, such as "RGB" or "I;16"."""
    if channels not in (1, 3):
        raise UserError(f"model.in_channels = {channels}: images are read as 1 (grey) or 3 (RGB) channels")
    if looks_like_dicom(data, name):
        pixels, mode = _decode_dicom(data, name)
    elif (plain := decode_plain_png(data)) is not None:
        pixels, mode = plain, "L"
    else:
        image = open_upright(data, name)
        mode = image.mode
        pixels = np.asarray(image if mode in _DEEP else _eight_bit(image, channels))
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise unreadable(name, "holds NaN or infinity")
        if mode in _DEEP:
            pixels = scale_by_range(pixels)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] == channels:
        return pixels, mode
    if channels == 1:
        return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None], mode
    return np.repeat(pixels, channels, axis=2), mode


def decode_plain_png(data: bytes) -> np.ndarray | None:
    """Decode an 8-bit grey PNG without EXIF, the commonest radiograph file, to (H, W) uint8; None for other files.

    TensorStore, a dependency of Orbax, decodes on all cores, whereas Pillow's decoder holds Python's lock. Special and
    damaged files are left to Pillow.
    """
    if not data.startswith(_PNG_SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, *kind = struct.unpack(">II5B", data[16:29])
    if kind != [8, 0, 0, 0, 0] or not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 1 << 62):
        return None
    if any(chunk in data for chunk in _PNG_METADATA):
        return None
    try:
        import tensorstore  # starts threads

        context = tensorstore.Context()
        tensorstore.KvStore.open({"driver": "memory"}, context=context).result().write("x", data).result()
        spec = {"driver": "png", "kvstore": {"driver": "memory", "path": "x"}}
        pixels = np.asarray(tensorstore.open(spec, context=context, open=True).result().read().result())
    except Exception:  # Pillow's message is the better one
        return None
    return pixels[:, :, 0] if pixels.shape == (height, width, 1) and pixels.dtype == np.uint8 else None


def open_upright(data: bytes, name: str) -> Image.Image:
    """Decode with Pillow, in the file's own mode, and turn upright by EXIF. Raises `DataError` that says `name`."""
    if not data:
        raise unreadable(name, "the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        limit = Image.MAX_IMAGE_PIXELS
        if limit and image.width * image.height > limit:
            raise Image.DecompressionBombError
        frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        if frames > 1:
            raise unreadable(name, f"{frames} pages; save each page as a file of its own")
        if image.mode not in _DEEP and _bits(image, data) > 8:
            # Pillow keeps the upper 8 bits of each channel: a 12-bit radiograph would be left with 16 greys.
            raise unreadable(name, "16 bits in each of several channels; save it as 16-bit grey or 8-bit colour")
        image.load()
        return ImageOps.exif_transpose(image)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise unreadable(name, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: refused as a bomb") from None
    except UnidentifiedImageError:
        raise unreadable(name, "no PNG, JPEG, TIFF, BMP or DICOM image") from None
    except Exception as error:  # Pillow's decoders raise nearly every type on damaged files
        raise unreadable(name, f"damaged or truncated image ({error or type(error).__name__})") from None


def scale_by_range(values: np.ndarray) -> np.ndarray:
    """Scale finite numbers to float32 in [0, 255], from the darkest to the brightest; a constant image becomes 0.

    Pixels that are farther than 3 times the span of the 0.1 and 99.9 percentiles beyond them are dead or burnt out: on
    that side, the range ends at the percentile.
    """
    low, high = (float(value) for value in np.percentile(values, (0.1, 99.9)))
    darkest, brightest = float(values.min()), float(values.max())
    reach = 3.0 * (high - low) or np.inf  # nearly all pixels have one value: the others must still show
    low = darkest if low - darkest <= reach else low
    high = brightest if brightest - high <= reach else high
    if low == high:
        return np.zeros(values.shape, np.float32)
    scaled = values.astype(np.float64)
    scaled -= low  # in place: large radiographs take enough memory as it is
    scaled *= 255.0 / (high - low)
    result: np.ndarray = np.clip(scaled, 0, 255, out=scaled).astype(np.float32)
    return result


def unreadable(name: str, reason: str) -> DataError:
    """The error for one file, in the form in which the problems of a dataset are collected."""
    return DataError("unreadable image", [f"{name}: {reason}"])


def looks_like_dicom(data: bytes, name: str) -> bool:
    """Whether a file is read as DICOM, judged by its name and its first 132 bytes or more."""
    return data[128:132] == b"DICM" or (bool(data) and name.lower().endswith((".dcm", ".dicom")))


def import_pydicom() -> Any:
    """The module pydicom, with validation off: its warnings quote malformed elements, perhaps a patient's name."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per channel of an opened PNG or TIFF file; 8 for other formats."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    if image.format != "PNG":
        return 8
    if data[12:16] != b"IHDR":
        raise ValueError("no header at its beginning")
    return data[24]


def _eight_bit(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.copy()  # transparency means nothing in an X-ray, and Pillow warns about it
        del image.info["transparency"]
    return image.convert("L" if channels == 1 else "RGB")


def _decode_dicom(data: bytes, name: str) -> tuple[np.ndarray, str]:
    """(H, W) float32 in [0, 255], or (H, W, 3) uint8 for colour, and the photometric interpretation.

    Stored values pass the rescale slope and intercept, then the first window or else `scale_by_range`. MONOCHROME1 is
    inverted, so that dense tissue is always bright.
    """
    with _dicom_errors(name):
        dataset = _read_dicom(data, name)
        kind = str(dataset.get("PhotometricInterpretation", ""))
        pixels = _stored_pixels(dataset, name)
        if pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8:
            return pixels, f"DICOM {kind}"
        if pixels.ndim != 2 or kind == "PALETTE COLOR":
            shape = "x".join(map(str, pixels.shape))
            raise unreadable(name, f"{kind} of shape {shape}; save it as one grey or 8-bit RGB image")
        values = pixels.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= _number(dataset, "RescaleSlope", 1.0)
            values += _number(dataset, "RescaleIntercept", 0.0)
        if not np.isfinite(values).all():
            raise unreadable(name, "its rescale slope and intercept exceed the range of numbers")
        scaled = _window(values, dataset)
        if kind == "MONOCHROME1":
            np.subtract(255, scaled, out=scaled)
        return scaled, f"DICOM {kind} {dataset.get('BitsStored', '')}-bit"


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
        raise unreadable(name, "DICOM needs pydicom: pip install 'pdrunet-jax[dicom]'") from None
    if _DEFLATED in data:  # anywhere: a long element may come before the transfer syntax
        raise unreadable(name, "a deflated DICOM file, of unknown size; save it uncompressed")
    try:
        return pydicom.dcmread(io.BytesIO(data))
    except Exception as error:
        raise unreadable(name, f"no readable DICOM file ({type(error).__name__})") from None


def _stored_pixels(dataset: Any, name: str) -> np.ndarray:
    # Decoders allocate what the header claims before they look at the data.
    sides = (_number(dataset, tag, 1.0) for tag in ("Rows", "Columns", "NumberOfFrames"))
    if not math.prod(sides) <= (most := Image.MAX_IMAGE_PIXELS or math.inf):
        raise unreadable(name, f"more than {most:,} pixels: refused as a bomb")
    try:
        if _is_bomb(dataset):
            raise unreadable(name, "its compressed pixels have another size than its header states: refused as a bomb")
        return np.asarray(dataset.pixel_array)
    except DataError:
        raise
    except Exception as error:
        raise unreadable(name, _explain(dataset, error)) from None


def _is_bomb(dataset: Any) -> bool:
    """Whether compressed pixels state another size than the DICOM header: decoders allocate theirs."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or "PixelData" not in dataset:
        return False
    from pydicom.encaps import generate_frames

    size = int(dataset.Rows), int(dataset.Columns)
    most = 2 * math.prod(size) * int(dataset.SamplesPerPixel) * int(dataset.BitsAllocated) // 8 + 64
    for frame in generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames") or 1)):
        if syntax == "1.2.840.10008.1.2.5" and len(frame) > most:  # RLE expands up to 64 times
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
    position = 2 if frame.startswith(b"\xff\xd8") else len(frame)
    while position + 9 <= len(frame) and frame[position] == 0xFF:
        marker, length = struct.unpack_from(">BH", frame, position + 1)
        if marker in _JPEG_FRAMES:
            yield struct.unpack_from(">2H", frame, position + 5)
            return
        position += 1 if marker == 0xFF else 2 + length


def _explain(dataset: Any, error: Exception) -> str:
    syntax: Any = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    known = syntax is not None and syntax.is_transfer_syntax
    if known and syntax.is_compressed and isinstance(error, RuntimeError):
        return f"no decoder for {syntax.name}, or damaged pixel data; decoders: pip install 'pdrunet-jax[dicom]'"
    if "PixelData" not in dataset:
        return "a DICOM file without an image"
    return f"damaged or truncated DICOM pixel data ({type(error).__name__})"


def dicom_numbers(dataset: Any, element: str, count: int) -> tuple[float, ...] | None:
    """A DICOM element as `count` finite numbers; None if it is absent or anything else."""
    try:
        value = dataset.get(element)
        numbers = tuple(float(item) for item in (value if count > 1 else [value]))
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


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


def _window(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Apply the linear, exact linear or sigmoid window of DICOM PS3.3 C.11.2.1.2; float32 in [0, 255].

    Overwrites `values` (float64): large radiographs take enough memory as it is.
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
