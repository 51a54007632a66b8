"""Run-length encoded masks: COCO's counts, plain and compressed, and Label Studio's bit stream."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_MOST_BYTES = 4 << 20  # of Label Studio's run lengths, which are decoded one by one; a brush needs a tenth of it


def check_size(height: Any, width: Any) -> tuple[int, int]:
    """(height, width) of a mask, before memory is taken for it. Raises `ValueError`."""
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        raise ValueError("its size must be two numbers of pixels")
    if height * width > (Image.MAX_IMAGE_PIXELS or 1 << 62):
        raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: refused as a bomb")
    return height, width


def coco_mask(counts: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode COCO's run lengths of 0 and 1 in turn, column by column, to (H, W). Raises `ValueError`.

    `counts` is a list of numbers, or the text that pycocotools writes: five bits a character, and from the fourth run
    on the difference to the run before the last.
    """
    return row_mask(_expand(counts) if isinstance(counts, str) else counts, (size[1], size[0])).T


def row_mask(counts: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode run lengths of 0 and 1 in turn, row by row, to (H, W). Raises `ValueError`."""
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("counts must be a list of numbers, or compressed text")
    height, width = size
    if sum(counts) != height * width:
        raise ValueError(f"its runs cover {sum(counts)} pixels of {height * width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(height, width)


def label_studio_mask(data: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode Label Studio's brush, run lengths of RGBA bytes, to (H, W). Raises `ValueError`.

    The bit stream has the number of values in 32 bits, the word size less 1 in 5, and four run length sizes less 1 in
    4 bits each. Each run follows: 1 bit that is set for equal values, 2 bits to choose the size, the length less 1,
    and the value or the values.
    """
    if not isinstance(data, list) or not all(type(byte) is int and 0 <= byte < 256 for byte in data):
        raise ValueError("rle must be a list of bytes")
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{len(data) >> 20} MiB of run lengths; at most {_MOST_BYTES >> 20} are read")
    packed = bytes(data) + bytes(8)
    position, end = 0, 8 * len(data)

    def take(width: int) -> int:
        nonlocal position
        if position + width > end:
            raise ValueError("its run lengths end too early")
        window = int.from_bytes(packed[position >> 3 : (position >> 3) + 8], "big")
        number = window >> (64 - (position & 7) - width) & ((1 << width) - 1)
        position += width
        return number

    total, word = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    height, width = size
    if total != height * width * 4 or word != 8:
        raise ValueError(f"its runs cover {total // 4} pixels of {height * width}")
    values = np.zeros(total, np.uint8)
    filled = 0
    while filled < total:
        equal, length = take(1), take(sizes[take(2)]) + 1
        if length > total - filled:
            raise ValueError("its run lengths exceed the image")
        if equal:
            values[filled : filled + length] = take(8)
        else:
            if position + 8 * length > end:
                raise ValueError("its run lengths end too early")
            bits = np.unpackbits(np.frombuffer(packed, np.uint8, length + 1, position >> 3))
            values[filled : filled + length] = np.packbits(bits[position & 7 :][: 8 * length])
            position += 8 * length
        filled += length
    return values.reshape(height, width, 4)[:, :, 3] > 127


def _expand(text: str) -> list[int]:
    """Run lengths from pycocotools' text. Raises `ValueError`."""
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        codes = np.full(1, -1)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("its counts are not compressed run lengths")
    starts = np.concatenate([[0], np.flatnonzero(codes & 32 == 0)[:-1] + 1])
    lengths = np.diff(np.append(starts, len(codes)))
    if lengths.max() > 7:
        raise ValueError("its counts are too large")
    places = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    counts = np.add.reduceat((codes & 31) << places, starts)
    counts -= (codes[starts + lengths - 1] >> 4 & 1) << 5 * lengths  # the sign
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts.tolist()
