"""Refuse image files that are damaged inside although their container is whole.

Pillow and the DICOM decoders fill what is missing with grey or black and say nothing. PNG has checksums; deflated TIFF
has one for each strip. JPEG has none: libjpeg's warnings count as errors, so missing data and most overwritten data
are found, but a few changed bytes may decode to another picture without a warning. In other formats only what their
decoders refuse is found.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from pdrunet_jax.runtime.errors import DataError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Passes of an interlaced PNG: first column and row, and the steps between them."""
_MAX_PIECE = 1 << 20  # bytes that are inflated at once

_TIFF_COMPRESSION, _TIFF_JPEG_TABLES = 259, 347
_TIFF_PARTS = ((273, 279), (324, 325))  # tags of offsets and byte counts: strips, tiles
_TIFF_DEFLATE, _TIFF_JPEG = (8, 32946), 7

_JPEG_HEADERS = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})  # SOF markers, that of JPEG-LS included
_JPEG_PADDING = b"\x55" * 64  # bits that no encoder pads with


def unreadable(name: str, reason: str) -> DataError:
    """The error for one file, in the form in which the problems of a dataset are collected."""
    return DataError("unreadable image", [f"{name}: {reason}"])


def image_fault(image: Image.Image, data: bytes) -> str | None:
    """What is damaged inside a file that Pillow has opened, but not decoded; None if nothing is found."""
    if image.format == "PNG":
        return png_fault(data) or _png_rows_fault(data)
    if image.format in ("JPEG", "MPO"):
        return jpeg_fault(data, _pillow_jpeg)
    if isinstance(image, TiffImageFile):
        return _tiff_fault(image, data)
    return None


def png_fault(data: bytes) -> str | None:
    """Whether a PNG has a wrong checksum, no end, or several pictures; its pixels are not decoded."""
    view = memoryview(data)
    for kind, content, checksum in _png_chunks(view):
        if zlib.crc32(content, zlib.crc32(kind)) != checksum:
            return "a wrong checksum"
        if kind == b"acTL" and len(content) == 8 and (frames := int.from_bytes(content[:4], "big")) > 1:
            return f"an animation of {frames} pictures; save each as a file of its own"
        if kind == b"IEND":
            return None
    return "no end"


def jpeg_fault(data: bytes, decode: Callable[[bytes], np.ndarray]) -> str | None:
    """Whether a JPEG lacks data or is damaged so that libjpeg warns.

    `decode` is the decoder for kinds that the strict one does not read: CMYK, 12 bits, lossless.
    """
    header = jpeg_header(data)
    if header is None:
        return None  # the decoder's own message is the better one
    marker, bits, rows, columns, channels, position = header
    if rows * columns > (Image.MAX_IMAGE_PIXELS or 1 << 62):
        return "more pixels than are decoded"
    if marker in (0xC0, 0xC1, 0xC2) and bits == 8 and channels in (1, 3):
        if (fault := _strict_fault(data)) is not None:
            return fault
        # The strict decoder passes over data that is left at the end. Without the last byte, data must be missing.
        end = data.find(b"\xff\xd9", data.find(b"\xff\xda", position))
        shorter = data[:end].rstrip(b"\xff")[:-1] + data[end:]
        return None if _strict_fault(shorter) else "superfluous data"
    if marker > 0xC3:
        return None
    # A decoder that lacks data goes on with the bytes after it: then other bytes give other pixels.
    end = data.rfind(b"\xff\xd9")
    if end < 0:
        return "no end"
    whole, longer = decode(data), decode(data[:end] + _JPEG_PADDING + data[end:])
    return None if np.array_equal(whole, longer) else "premature end"


def _strict_fault(data: bytes) -> str | None:
    try:
        decode_strictly(data, "jpeg")
    except Exception as error:  # of several types, with a long message
        return "premature end" if "Premature end" in str(error) else "corrupt data"
    return None


def jpeg_header(data: bytes) -> tuple[int, int, int, int, int, int] | None:
    """The frame header of a JPEG or JPEG-LS file: marker, bits, rows, columns, channels, position; None without one."""
    position = 2 if data.startswith(b"\xff\xd8") else len(data)
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = struct.unpack_from(">BH", data, position + 1)
        if marker in _JPEG_HEADERS:
            return (marker, *struct.unpack_from(">BHHB", data, position + 4), position)
        position += 1 if marker == 0xFF else 2 + length
    return None


def decode_strictly(data: bytes, driver: str) -> np.ndarray:
    """Decode a PNG or JPEG file to (H, W, C) with TensorStore, whose decoders take warnings for errors.

    TensorStore, a dependency of Orbax, decodes on all cores, whereas Pillow's decoders hold Python's lock. Raises
    exceptions of several types.
    """
    import tensorstore  # starts threads

    context = tensorstore.Context()
    tensorstore.KvStore.open({"driver": "memory"}, context=context).result().write("x", data).result()
    spec = {"driver": driver, "kvstore": {"driver": "memory", "path": "x"}}
    return np.asarray(tensorstore.open(spec, context=context, open=True).result().read().result())


def _pillow_jpeg(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data), formats=("JPEG",)))


def _png_chunks(view: memoryview) -> Iterator[tuple[bytes, memoryview, int]]:
    """Type, content and stated checksum of each chunk that is not cut off."""
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(view):
        length, kind = struct.unpack_from(">I4s", view, at)
        end = at + 8 + length
        if end + 4 > len(view):
            return
        yield kind, view[at + 8 : end], struct.unpack_from(">I", view, end)[0]
        at = end + 4


def _png_rows_fault(data: bytes) -> str | None:
    """Whether the compressed pixels of a PNG are fewer or more than its header states."""
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">II5B", data, 16)
    pixel = bits * _PNG_CHANNELS.get(colour, 0)
    expected = 0
    for left, top, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = max(0, -(-(width - left) // across)), max(0, -(-(height - top) // down))
        expected += rows * (1 + (columns * pixel + 7) // 8) if columns else 0
    pieces = (content for kind, content, _ in _png_chunks(memoryview(data)) if kind == b"IDAT")
    return _inflate_fault(pieces, expected)


def _inflate_fault(pieces: Iterable[Any], expected: int | None = None) -> str | None:
    """Whether compressed data is damaged, lacks its end, or has not the `expected` number of bytes."""
    stream, total = zlib.decompressobj(), 0
    try:
        for piece in pieces:
            left = piece
            while left and not stream.eof and (expected is None or total <= expected):
                total += len(stream.decompress(left, _MAX_PIECE))
                left = stream.unconsumed_tail
    except zlib.error:
        return "corrupt data"
    if expected is not None and total != expected:
        return f"{'fewer' if total < expected else 'more'} rows than its header states"
    return None if stream.eof else "premature end"


def _tiff_fault(image: TiffImageFile, data: bytes) -> str | None:
    tags = image.tag_v2
    compression = tags.get(_TIFF_COMPRESSION, 1)
    if compression != _TIFF_JPEG and compression not in _TIFF_DEFLATE:
        return None
    tables = tags.get(_TIFF_JPEG_TABLES, b"")
    for offsets, counts in _TIFF_PARTS:
        for offset, count in zip(
            *(np.atleast_1d(tags.get(tag, ())).tolist() for tag in (offsets, counts)), strict=False
        ):
            part = data[offset : offset + count]
            if compression == _TIFF_JPEG:
                whole = tables[:-2] + part[2:] if tables else part
                fault = jpeg_fault(whole, _pillow_jpeg)
            else:
                fault = _inflate_fault([part])
            if fault:
                return fault
    return None
