"""Read every file of a dataset once: sizes, mask values, digests and problems."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pdrunet_jax.data.folder import Pair
from pdrunet_jax.data.images import decode_image, read_bytes, resize_image
from pdrunet_jax.data.masks import MaskCoding, decode_codes, resize_mask
from pdrunet_jax.runtime.errors import DataError

_MOST_VALUES = 4096  # a file with more codes is not a mask, but a photograph or a drawing saved with losses


@dataclass(frozen=True)
class ScanResult:
    """Content of an image file and its mask file."""

    size: tuple[int, int] = (0, 0)
    """(height, width) of the upright image in pixels."""
    mode: str = ""
    """The image's mode, such as "RGB" or "I;16"."""
    codes: dict[int, int] = field(default_factory=dict)
    """Pixel count of each mask code."""
    pixels: str = ""
    """Digest of the image's decoded pixels, to find duplicates."""
    digest: str = ""
    """Digest of both files' bytes."""
    problems: tuple[str, ...] = ()
    small: tuple[np.ndarray, np.ndarray] | None = None
    """Resized image (H, W, 1) uint8 and mask codes (H, W), if requested."""


def scan(
    pairs: Sequence[Pair], coding: MaskCoding, threads: int, keep: tuple[int, int] | None = None
) -> list[ScanResult]:
    """Read every pair, `threads` at a time; returns results in order. Problems are collected, never raised.

    `keep` is the (height, width) of the resized pixels to return with each pair.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(lambda pair: _scan_one(pair, coding, keep), pairs))


def foreground_share(codes: dict[int, int], coding: MaskCoding) -> float:
    """Share of a mask's pixels in any class, ignored pixels excluded; 0 if all are ignored."""
    return sum(class_shares(codes, coding)[1:])


def class_shares(codes: dict[int, int], coding: MaskCoding) -> list[float]:
    """Shares of background and each class, ignored pixels excluded. They sum to 1, or are all 0."""
    pixels = [0] * (len(coding.classes) + 1)
    by_code = {code: index for index, (_, values) in enumerate(coding.classes, start=1) for code in values}
    for code, count in codes.items():
        if code in coding.ignore:
            continue
        index = by_code.get(code, 0)
        if code not in coding.known and coding.threshold is not None:
            index = int(code >= coding.threshold)
        pixels[index] += count
    total = sum(pixels)
    return [count / total if total else 0.0 for count in pixels]


def count_codes(codes: np.ndarray) -> dict[int, int]:
    """Pixel count of each mask code."""
    if codes.dtype == np.uint8:  # much faster than sorting
        return {code: count for code, count in enumerate(Image.fromarray(codes).histogram()) if count}
    values, counts = np.unique(codes, return_counts=True)
    return {int(code): int(count) for code, count in zip(values, counts, strict=True)}


def digest_of(pixels: np.ndarray) -> str:
    """SHA-256 of decoded pixels, their shape and type."""
    return hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode() + pixels.tobytes()).hexdigest()


def _scan_one(pair: Pair, coding: MaskCoding, keep: tuple[int, int] | None) -> ScanResult:
    problems: list[str] = []
    digest = hashlib.sha256()
    size, mode, pixels_digest = (0, 0), "", ""
    codes: dict[int, int] = {}
    image = mask = None
    try:
        data = read_bytes(pair.image, pair.id)
        digest.update(hashlib.sha256(data).digest())
        pixels, mode = decode_image(data, pair.id)
        size = (pixels.shape[0], pixels.shape[1])
        image = resize_image(pixels, keep) if keep else None
        pixels_digest = digest_of(pixels)
    except DataError as error:
        problems += error.problems
    try:
        data = read_bytes(pair.mask, pair.mask_id)
        digest.update(hashlib.sha256(data).digest())
        mask = decode_codes(data, pair.mask_id, coding)
        if size != (0, 0) and mask.shape != size:
            height, width = mask.shape
            problems.append(f"{pair.id}: {size[1]}x{size[0]} pixels, but its mask {pair.mask_id} has {width}x{height}")
        codes = count_codes(mask)
        if len(codes) > _MOST_VALUES:
            problems.append(f"{pair.mask_id}: {len(codes)} different values; save masks as PNG: JPEG changes values")
            codes = {}
    except DataError as error:
        problems += error.problems
    small = None
    if keep and image is not None and mask is not None and not problems:
        small = image, resize_mask(mask if mask.dtype == np.uint8 else mask.astype(np.int32), keep)
    return ScanResult(size, mode, codes, pixels_digest, digest.hexdigest(), tuple(problems), small)
