"""Read every file of a dataset once: sizes, mask values, digests and problems."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pdrunet_jax.data.cache import Cache
from pdrunet_jax.data.fit import Fit
from pdrunet_jax.data.folder import Pair
from pdrunet_jax.data.greys import low_contrast
from pdrunet_jax.data.images import decode_image, exif_orientation, read_bytes
from pdrunet_jax.data.layers import LAYER, LayersCoding, coding_of
from pdrunet_jax.data.masks import MaskCoding, decode_codes, resize_mask
from pdrunet_jax.data.walk import some
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
    remarks: tuple[str, ...] = ()
    """What is odd about the image, but no error."""
    turned: tuple[int, int] = (1, 1)
    """EXIF orientation of the image, and of the mask; 1 is upright."""
    held: Sequence[int] | None = None
    """Mask codes by the values that the cache holds; None if it does not hold this pair."""


def scan(
    pairs: Sequence[Pair], coding: MaskCoding, threads: int, fit: Fit | None = None, cache: Cache | None = None
) -> list[ScanResult]:
    """Read every pair, `threads` at a time; returns results in order. Problems are collected, never raised.

    Pixels fitted by `fit`, which must not need a spacing, go into `cache`, if there is one: its masks hold values that
    `ScanResult.held` explains.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(lambda row: _scan_one(row, pairs[row], coding, fit, cache), range(len(pairs))))


def image_remarks(pairs: Sequence[Pair], scanned: Sequence[ScanResult]) -> list[str]:
    """The remarks of all results, a line for each kind."""
    names: dict[str, list[str]] = defaultdict(list)
    for pair, item in zip(pairs, scanned, strict=True):
        for remark in item.remarks:
            names[remark].append(pair.id)
    return [f"warning: {len(images)} images: {remark}: {some(images)}" for remark, images in names.items()]


def foreground_share(codes: dict[int, int], coding: MaskCoding) -> float:
    """Share of a mask's pixels in any class, ignored pixels excluded; 0 if all are ignored.

    Overlapping classes count one by one.
    """
    return sum(class_shares(codes, coding)[1:])


def class_shares(codes: dict[int, int], coding: MaskCoding) -> list[float]:
    """Shares of background and each class, ignored pixels excluded.

    They sum to 1, or are all 0, unless classes overlap.
    """
    if isinstance(coding, LayersCoding):
        return coding.shares(codes)
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


def _scan_one(row: int, pair: Pair, coding: MaskCoding, fit: Fit | None, cache: Cache | None) -> ScanResult:
    problems: list[str] = []
    notes: list[str] = []
    digest = hashlib.sha256()
    size, mode, pixels_digest = (0, 0), "", ""
    codes: dict[int, int] = {}
    image = mask = None
    image_data = b""
    turned = [1, 1]
    try:
        data = image_data = read_bytes(pair.image, pair.id)
        digest.update(hashlib.sha256(data).digest())
        turned[0] = exif_orientation(data)
        pixels, mode = decode_image(data, pair.id, remarks=notes)
        notes += [remark] if (remark := low_contrast(pixels)) else []
        size = (pixels.shape[0], pixels.shape[1])
        image = fit.image(pixels) if fit is not None and cache is not None else None
        pixels_digest = digest_of(pixels)
    except DataError as error:
        problems += error.problems
    for place, path in pair.mask_files:
        name = str(path) if pair.layers else pair.mask_id
        try:
            data = read_bytes(path, name)
            digest.update(hashlib.sha256(data).digest())
            mask = decode_codes(data, name, coding_of(coding, place))
            if data == image_data and np.any(mask != mask.flat[0]):
                notes.append("the image has the content of its mask")
            turned[1] = exif_orientation(data)
            if size != (0, 0) and mask.shape != size:
                height, width = mask.shape
                sizes = f"{size[1]}x{size[0]} pixels, but its mask {name} has {width}x{height}"
                problems.append(f"{pair.id}: {sizes}{_exif(turned)}")
            found = count_codes(mask)
            if len(found) > _MOST_VALUES:
                problems.append(f"{name}: {len(found)} different values; save masks as PNG: JPEG changes values")
                found = {}
            codes |= {place * LAYER + code: count for code, count in found.items()} if pair.layers else found
        except DataError as error:
            problems += error.problems
    held = None
    if fit is not None and cache is not None and image is not None and mask is not None and not problems:
        held = _hold(fit, cache, row, image, mask)
    both = turned[0], turned[1]
    return ScanResult(size, mode, codes, pixels_digest, digest.hexdigest(), tuple(problems), tuple(notes), both, held)


def _hold(fit: Fit, cache: Cache, row: int, image: np.ndarray, mask: np.ndarray) -> Sequence[int] | None:
    """Put a fitted image and the fitted codes of its mask into row `row` of `cache`; returns the codes."""
    codes: Sequence[int] = range(256)
    box = fit.box(mask.shape)
    small = resize_mask(mask if mask.dtype == np.uint8 else mask.astype(np.int32), (box.height, box.width))
    if small.dtype != np.uint8:
        values, small = np.unique(small, return_inverse=True)
        codes = values.tolist()
    if len(codes) > 256:
        return None
    cache.hold(row, (image, box.place(small.reshape(box.height, box.width).astype(np.uint8), fit.size, 0)))
    return codes


def _exif(turned: Sequence[int]) -> str:
    """What EXIF did to one of an image and its mask, for a message that their sizes differ."""
    if turned[0] == turned[1]:
        return ""
    if 1 not in turned:
        return "; EXIF turns the image and its mask differently: save both without it"
    one, other = ("image", "mask") if turned[0] != 1 else ("mask", "image")
    return f"; the {one} is turned by its EXIF orientation, and the {other} has none: draw masks on the upright image"
