"""Image files to pixels: PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000 and DICOM of any depth, upright.

A file that cannot be read exactly is an error that names it.
"""

import io
import re
import struct
from pathlib import Path

import numpy as np

# Importing a plugin registers its format; otherwise `Image.open` would load every plugin to find it.
from PIL import ExifTags, Image, ImageOps, Jpeg2KImagePlugin, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from pdrunet_jax.data.damage import decode_strictly, image_fault, png_fault, unreadable
from pdrunet_jax.data.dicom import HEAD, decode_dicom, dicom_spacing, looks_like_dicom
from pdrunet_jax.data.greys import scale_by_range
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.opening import open_regular, read_regular

SUFFIXES = frozenset(
    {
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".tif",
        ".tiff",
        ".bmp",
        ".gif",
        ".webp",
        ".jp2",
        ".j2k",
        ".dcm",
        ".dicom",
    }
)
"""File name extensions of images, in lower case."""

FORMATS = "PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000 or DICOM"

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", WebPImagePlugin.WebPImageFile.format, "JPEG2000")
_MAGIC = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|II\*\0|MM\0\*|GIF8|RIFF....WEBP|\0\0\0\x0cjP  |\xff\x4f\xff\x51", re.DOTALL
)
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of more than 8 bits; all have one channel
_ORIENTATION = 274
_BITS_PER_SAMPLE = 258  # TIFF tag
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks that may hold an EXIF orientation
_EXIF = (b"Exif", b"eXIf", b"exif")

_OTHER_CONTENTS = (
    (b"version https://git-lfs", "a Git LFS pointer: its content was not fetched; run git lfs pull"),
    (rb"(?:\.\./|/)*\.?(?:git/)?annex/objects/", "a git-annex pointer: its content was not fetched; run git annex get"),
    (rb"\s*(?i:<!doctype html|<html)", "an HTML page, perhaps of a failed download"),
    (b"NRRD0", "an NRRD file"),
    (b"(?s:.{344}(?:n\\+1|ni1)\\0)", "a NIfTI file"),
    (b"\x1f\x8b", "compressed by gzip, perhaps NIfTI"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"%PDF", "a PDF document"),
    (rb"....ftyp(?:avif|heic|heix|mif1)", "a HEIC or AVIF image"),
)
"""How files of other kinds begin, and what they are."""


def read_image(path: Path, channels: int = 1, remarks: list[str] | None = None) -> np.ndarray:
    """Read an image file and turn it upright by its EXIF orientation.

    Returns (H, W, channels) with 1 (grey) or 3 (RGB) channels: uint8 for 8-bit sources (grey is exactly Pillow's
    `convert("L")`), float32 in [0, 255] for deeper ones, scaled by their window or else by `scale_by_range`. What a
    user should know about the brightness is appended to `remarks`.

    Raises `DataError` that names the file.
    """
    return decode_image(read_bytes(path, str(path)), str(path), channels, remarks)[0]


def read_spacing(path: Path) -> tuple[float, float] | None:
    """Pixel spacing (between rows, between columns) in mm of a DICOM file; None if it is absent or 0.

    Calibrated pixel spacing comes before the detector's. The dots per inch of other formats are not trusted: editors
    write them. Raises `DataError` that names the file.
    """
    data = read_bytes(path, str(path))
    return dicom_spacing(data, str(path)) if looks_like_dicom(data) else None


def read_image_and_spacing(
    path: Path, channels: int = 1, remarks: list[str] | None = None
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """What `read_image` and `read_spacing` return, from one reading of the file."""
    data = read_bytes(path, str(path))
    pixels = decode_image(data, str(path), channels, remarks)[0]
    return pixels, dicom_spacing(data, str(path)) if looks_like_dicom(data) else None


def has_image_name(path: Path) -> bool:
    """Whether a file is an image by its extension."""
    return path.suffix.lower() in SUFFIXES


def is_image(path: Path) -> bool:
    """Whether a file is an image by its extension, or by its first bytes.

    Without an extension, or with a number for one, any format counts; with another extension only DICOM, because some
    formats that are not read begin as TIFF does.
    """
    if has_image_name(path):
        return True
    try:
        with open_regular(path) as file:
            head = file.read(HEAD)
    except OSError:
        return False
    nameless = not path.suffix or path.suffix[1:].isdigit()
    return looks_like_dicom(head) or (nameless and _MAGIC.match(head) is not None)


def stem(name: str) -> str:
    """A path without its extension; a number behind the last dot is none (DICOM files are named 1.2.840...)."""
    start, dot, suffix = name.rpartition(".")
    return start if dot and start and "/" not in suffix and not suffix.isdigit() else name


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
    """The content of a regular file; raises `DataError` that calls it `name`."""
    try:
        return read_regular(path)
    except OSError as error:
        raise unreadable(name, error.strerror or str(error)) from None


def decode_image(data: bytes, name: str, channels: int = 1, remarks: list[str] | None = None) -> tuple[np.ndarray, str]:
    """Decode the content of an image file: pixels as from `read_image`, and its mode, such as "RGB" or "I;16"."""
    if channels not in (1, 3):
        raise UserError(f"model.in_channels = {channels}: images are read as 1 (grey) or 3 (RGB) channels")
    if looks_like_dicom(data):
        pixels, mode = decode_dicom(data, name, [] if remarks is None else remarks)
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

    Special and damaged files are left to Pillow.
    """
    if not data.startswith(_PNG_SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, *kind = struct.unpack(">II5B", data[16:29])
    if kind != [8, 0, 0, 0, 0] or not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 1 << 62):
        return None
    if any(chunk in data for chunk in _PNG_METADATA) or png_fault(data):
        return None
    try:
        pixels = decode_strictly(data, "png")
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
        if image.format != "MPO" and getattr(image, "is_animated", False):
            pages = f"{getattr(image, 'n_frames', 1)} pages" if image.format == "TIFF" else "several pictures"
            raise unreadable(name, f"{pages}; save each as a file of its own")
        if image.mode not in _DEEP and _bits(image, data) > 8:
            # Pillow keeps the upper 8 bits of each channel: a 12-bit radiograph would be left with 16 greys.
            raise unreadable(name, "16 bits in each of several channels; save it as 16-bit grey or 8-bit colour")
        if (fault := image_fault(image, data)) is not None:
            raise unreadable(name, f"damaged or truncated image ({fault})")
        image.load()
        return ImageOps.exif_transpose(image)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise unreadable(name, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: refused as a bomb") from None
    except UnidentifiedImageError:
        raise unreadable(name, _other_content(data)) from None
    except Exception as error:  # Pillow's decoders raise nearly every type on damaged files
        raise unreadable(name, f"damaged or truncated image ({error or type(error).__name__})") from None


def exif_orientation(data: bytes) -> int:
    """EXIF orientation of the content of an image file, 1 (upright) if it states none."""
    if not any(word in data for word in _EXIF):  # Pillow would decode some files to find out
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # what cannot be read is reported when it is decoded
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _other_content(data: bytes) -> str:
    if looks_like_dicom(data):
        return "a DICOM file, which is read as an image, but not here; save it as PNG, or import it"
    found = next((what for start, what in _OTHER_CONTENTS if re.match(start, data, re.DOTALL)), None)
    return f"no {FORMATS} image" + (f", but {found}" if found else "")


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per channel of an opened PNG, TIFF or JPEG 2000 file; 8 for other formats."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    if isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile):
        header = data.index(b"\xff\x4f\xff\x51")  # the size segment follows: 40 bytes, then 3 for each channel
        (channels,) = struct.unpack_from(">H", data, header + 40)
        return max((data[header + 42 + 3 * index] & 127) + 1 for index in range(channels))
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
