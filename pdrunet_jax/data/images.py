"""Image files to pixels: PNG, JPEG, TIFF, BMP and DICOM, of any depth, upright, or an error that names the file."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

# Named, not for use: Pillow otherwise loads them at the first file that needs them, which is not safe in threads.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from pdrunet_jax.data.plain_png import decode_plain_png
from pdrunet_jax.errors import DataError, UserError

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
    from pdrunet_jax.data import dicom

    return dicom.spacing(data, str(path))


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
        from pdrunet_jax.data import dicom

        pixels, mode = dicom.decode(data, name)
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
