"""The commonest radiograph file, a plain 8-bit grey PNG, decoded on all cores: Pillow's decoder holds Python's lock.

TensorStore, which Orbax brings along, decodes in threads of its own. Whatever is special about a file, or wrong with
it, is left to Pillow.

Image files to pixels: PNG, JPEG, TIFF, BMP and DICOM, of any depth, upright, or an error that names the file.

DICOM radiographs through pydicom (extra `dicom`): rescaled, windowed, bright bone.

Nothing but pixels and their spacing leaves this module, and error messages carry no value of the file: patient data
never reaches logs.
"""

import io
import math
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,  # noqa: F401
    Image,
    ImageOps,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
)

from pdrunet_jax.runtime.errors import DataError, UserError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TURNING = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks that may say how the image is to be turned."""


def decode_plain_png(data: bytes) -> np.ndarray | None:
    """(H, W) uint8; None for any other file, one that may have to be turned upright, and a damaged one."""
    if not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, *kind = struct.unpack(">II5B", data[16:29])
    if kind != [8, 0, 0, 0, 0] or not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 1 << 62):
        return None
    if any(chunk in data for chunk in _TURNING):
        return None
    try:
        import tensorstore

        context = tensorstore.Context()
        tensorstore.KvStore.open({"driver": "memory"}, context=context).result().write("x", data).result()
        spec = {"driver": "png", "kvstore": {"driver": "memory", "path": "x"}}
        pixels = np.asarray(tensorstore.open(spec, context=context, open=True).result().read().result())
    except Exception:  # Pillow's message is the better one
        return None
    return pixels[:, :, 0] if pixels.shape == (height, width, 1) and pixels.dtype == np.uint8 else None


SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom"})
"""Extensions, in lower case, by which a folder's images are told from its other files."""

PERCENTILES = (0.1, 99.9)
"""Between them lie the pixels that matter in images of more than 8 bits that bring no window."""

REACH = 3.0
"""So many times the distance of the `PERCENTILES` may the darkest and the brightest pixel lie beyond them and still
become 0 and 255; farther off they are dead or burnt out, and must not set the range."""

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_RAW = "raw mode"
"""Key in a Pillow image's `info`: how its file stores pixels."""


def read_image(path: Path, channels: int = 1) -> np.ndarray:
    """Pixels of an image file, turned upright by its EXIF orientation.

    Returns (H, W, channels): uint8 for 8-bit sources (grey is exactly Pillow's `convert("L")`), float32 in [0, 255]
    for deeper ones, scaled by their window or, without one, by `PERCENTILES`. Raises `DataError` that names the file.
    """
    return decode_image(read_bytes(path, str(path)), str(path), channels)[0]


def read_spacing(path: Path) -> tuple[float, float] | None:
    """Distance of pixel centres (between rows, between columns) in mm; None where the file does not state it.

    Only DICOM is trusted: the dots per inch of other formats are what some editor wrote. Raises `DataError`.
    """
    data = read_bytes(path, str(path))
    if not looks_like_dicom(data, path.name):
        return None
    pass

    return spacing(data, str(path))


def resize_image(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, C) uint8, or float32 in [0, 255], to (height, width, C) uint8.

    Bilinear, over the whole area that becomes a pixel when shrinking: Pillow's `resize`, bit for bit on 8-bit grey.
    """
    height, width = size
    planes = []
    for channel in range(pixels.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(pixels[:, :, channel]))
        resized = np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR))
        planes.append(resized if resized.dtype == np.uint8 else np.clip(np.rint(resized), 0, 255).astype(np.uint8))
    return np.stack(planes, axis=-1)


def read_bytes(path: Path, name: str) -> bytes:
    """The file's content; raises `DataError` that calls it `name`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(name, error.strerror or str(error)) from None


def decode_image(data: bytes, name: str, channels: int = 1) -> tuple[np.ndarray, str]:
    """As `read_image`, from a file's content; the second value is its mode in words, such as "RGB" or "I;16"."""
    if channels not in (1, 3):
        raise UserError(f"model.in_channels = {channels}: images are read as 1 (grey) or 3 (RGB) channels")
    if looks_like_dicom(data, name):
        pass

        pixels, mode = decode(data, name)
    elif (plain := decode_plain_png(data)) is not None:
        pixels, mode = plain, "L"
    else:
        image = open_upright(data, name)
        mode = f"{image.mode};16" if is_deep_colour(image) else image.mode
        if is_deep_colour(image):
            pixels = _deep_colour(image, data, name, channels)
        else:
            pixels = _deep_pixels(image, name) if mode in _DEEP else np.asarray(_eight_bit(image, channels))
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] != channels:
        if channels == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        else:
            pixels = np.repeat(pixels, channels, axis=2)
    return pixels, mode


def open_upright(data: bytes, name: str, raw: str | None = None) -> Image.Image:
    """A decoded Pillow image in its own mode, turned by its EXIF orientation. Raises `DataError` that says `name`.

    `raw` replaces what the file says of how its pixels are stored.
    """
    if not data:
        raise unreadable(name, "the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        limit = Image.MAX_IMAGE_PIXELS
        if limit and image.width * image.height > limit:
            raise Image.DecompressionBombError
        frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        tile = image.tile[0] if image.tile else None
        stored = "" if tile is None else str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)
        if tile is not None and raw:
            image.tile = [each._replace(args=_with_raw(each.args, raw)) for each in image.tile]
        image.info[_RAW] = stored
        image.load()
        upright = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise unreadable(name, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: refused as a bomb") from None
    except UnidentifiedImageError:
        raise unreadable(name, "no PNG, JPEG, TIFF, BMP or DICOM image") from None
    except Exception as error:  # Pillow's decoders raise nearly every type on damaged files
        raise unreadable(name, f"damaged or truncated image ({error or type(error).__name__})") from None
    if frames > 1:
        raise unreadable(name, f"{frames} pages; one image in each file is read")
    return upright


def scale_by_range(values: np.ndarray) -> np.ndarray:
    """Any finite numbers to float32 in [0, 255]: from the darkest to the brightest; a constant image becomes 0.

    Where these lie far off (`REACH`), the range ends at `PERCENTILES`.
    """
    low, high = (float(value) for value in np.percentile(values, PERCENTILES))
    darkest, brightest = float(values.min()), float(values.max())
    reach = REACH * (high - low) or np.inf  # nearly all pixels are one value: what differs must still show
    low = darkest if low - darkest <= reach else low
    high = brightest if brightest - high <= reach else high
    if low == high:
        return np.zeros(values.shape, np.float32)
    scaled = values.astype(np.float64)
    scaled -= low  # in place: large radiographs take enough memory as it is
    scaled *= 255.0 / (high - low)
    result: np.ndarray = np.clip(scaled, 0, 255, out=scaled).astype(np.float32)
    return result


def is_deep_colour(image: Image.Image) -> bool:
    """Whether an image of `open_upright` has 16 bits in each of several channels, of which Pillow keeps 8."""
    stored = str(image.info.get(_RAW, ""))
    return image.mode not in _DEEP and re.search(r";16[BLN]$", stored) is not None


def unreadable(name: str, reason: str) -> DataError:
    """The error of one file, in the form in which a dataset's problems are collected."""
    return DataError("unreadable image", [f"{name}: {reason}"])


def looks_like_dicom(data: bytes, name: str) -> bool:
    """Whether a file called `name` that begins with `data`, 132 bytes or more, is read as DICOM."""
    return data[128:132] == b"DICM" or (bool(data) and name.lower().endswith((".dcm", ".dicom")))


def _eight_bit(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.copy()  # a colour has no transparency as X-ray, and Pillow warns about it
        del image.info["transparency"]
    return image.convert("L" if channels == 1 else "RGB")


def _deep_pixels(image: Image.Image, name: str) -> np.ndarray:
    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise unreadable(name, "holds NaN or infinity")
    return scale_by_range(values)


def _deep_colour(image: Image.Image, data: bytes, name: str, channels: int) -> np.ndarray:
    """(H, W) or (H, W, 3) float32 in [0, 255] of 16-bit colours, scaled like 16-bit grey.

    Pillow drops the lower half of every number: read in the other byte order, the file gives that half.
    """
    stored = str(image.info[_RAW])
    upper = np.asarray(image)
    if stored == "LA;16B":  # grey with alpha: its four bytes, read as four channels
        lower = np.asarray(open_upright(data, name, "RGBA"))[:, :, 1:2]
        upper = upper[:, :, :1]
    elif stored[:-1] in ("RGB;16", "RGBA;16", "RGBX;16"):
        little = stored[-1] == "L" or (stored[-1] == "N" and sys.byteorder == "little")
        lower = np.asarray(open_upright(data, name, stored[:-1] + ("B" if little else "L")))
    else:
        raise unreadable(name, f"16 bits for each channel ({stored}): save it as 16-bit grey or RGB")
    values = (upper[:, :, :3].astype(np.uint16) << 8) | lower[:, :, :3]
    if channels == 1 and values.shape[2] == 3:
        return scale_by_range(values @ np.array([0.299, 0.587, 0.114], np.float32))
    return scale_by_range(values)


def _with_raw(arguments: tuple[Any, ...] | str | None, raw: str) -> tuple[Any, ...] | str:
    return (raw, *arguments[1:]) if isinstance(arguments, tuple) else raw


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
