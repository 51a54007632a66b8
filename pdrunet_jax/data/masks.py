"""Mask files to class indices. The user declares what values and colours mean; no file is guessed on its own.

Each pixel has an integer *code*. A number in a declaration stands for the grey value, the palette index, the value of
the only colour channel in use, or the alpha of a drawing in one colour on transparent ground. "#rrggbb" stands for the
colour that a viewer shows; its code is `COLOUR` + 0xrrggbb. `resolve.resolve` combines the declaration with the codes
of all masks into the dataset's `MaskCoding`.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdrunet_jax.data.damage import unreadable
from pdrunet_jax.data.dicom import looks_like_dicom
from pdrunet_jax.data.images import decode_plain_png, open_upright, read_bytes, resize_image
from pdrunet_jax.runtime.errors import UserError

IGNORE = 255
"""Class index of pixels excluded from loss and metrics."""

PADDING = 254
"""Class index of pixels around an image that was padded to the network's size; excluded like `IGNORE`."""

COLOUR = 1 << 24
"""First code of a colour; lower codes are numbers."""

BACKGROUND = "background"
"""Class name that declares the background; 0 or black by default."""

DEFAULT_THRESHOLD = 128
"""Grey value at which a soft-edged mask becomes foreground unless another is declared."""

UNNAMED = "foreground"
"""Name of the only class of masks without a declaration."""


@dataclass(frozen=True)
class MaskCoding:
    """Map from codes to class indices: 0 for background, i + 1 for `classes[i]`, `IGNORE` for ignored pixels."""

    classes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Names with their codes; empty while undeclared."""
    ignore: tuple[int, ...] = ()
    """Codes excluded from loss and metrics."""
    background: tuple[int, ...] = ()
    """Codes of the background; empty until declared or found."""
    threshold: int | None = None
    """Soft edges: higher or equal grey values are the only class, lower ones background. None allows no other codes."""

    @property
    def colours(self) -> bool:
        """Whether classes are declared by colour."""
        return any(code >= COLOUR for _, codes in self.classes for code in codes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the foreground classes."""
        return tuple(name for name, _ in self.classes)

    @property
    def only_value(self) -> int | None:
        """The value of a single class declared by one number; None otherwise."""
        if len(self.classes) == 1 and len(self.classes[0][1]) == 1 and not self.colours:
            return self.classes[0][1][0]
        return None

    def __str__(self) -> str:
        """The declaration in words, such as "declared are femur = 1, tibia = 2 or 3"."""
        return "declared are " + ", ".join(
            f"{name} = {' or '.join(map(describe_code, codes))}" for name, codes in self.classes
        )

    @property
    def known(self) -> frozenset[int]:
        """All codes with a meaning."""
        return frozenset((*self.background, *self.ignore, *(code for _, codes in self.classes for code in codes)))


def read_mask(path: Path, coding: MaskCoding) -> np.ndarray:
    """Read a mask file, upright, as (H, W) uint8 class indices. Raises `DataError` for undeclared values."""
    name = str(path)
    codes = decode_codes(read_bytes(path, name), name, coding)
    return codes_to_classes(codes, coding, name)


def read_soft_mask(path: Path, coding: MaskCoding) -> np.ndarray:
    """Read a binary mask as (H, W) uint8, 255 for foreground; soft edges keep their grey. Raises `DataError`."""
    name = str(path)
    value = coding.only_value
    codes = decode_codes(read_bytes(path, name), name, coding)
    if not value:  # a colour, several values, or 0 on another ground: no greys
        return codes_to_classes(codes, coding, name) * np.uint8(255)
    return np.rint(np.clip(codes / value, 0, 1) * 255).astype(np.uint8)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) uint8 class indices, or int32 codes, to (height, width) by nearest neighbour."""
    height, width = size
    if mask.ndim == 3:  # layers of overlapping classes
        return np.stack([resize_mask(layer, size) for layer in np.moveaxis(mask, -1, 0)], axis=-1)
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def resize_soft_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an (H, W) uint8 soft mask to (height, width), bilinear like images."""
    return resize_image(mask[:, :, None], size)[:, :, 0]


def parse_value(value: object, source: str) -> tuple[int, ...]:
    """Codes of a declared value: a number, "#rrggbb", a bit, or several as a list or with commas between them.

    "bit 0" to "bit 7" stand for every number up to 255 in which that bit is set.

    Raises `UserError` that names `source`.
    """
    if isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, list | tuple):
        return tuple(code for item in value for code in parse_value(item, source))
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return (COLOUR + int(value[1:], 16),)
    if isinstance(value, str) and (bit := re.fullmatch(r"bit ([0-7])", value)):
        return tuple(code for code in range(256) if code >> int(bit[1]) & 1)
    if isinstance(value, str) and re.fullmatch(r"\d{1,5}", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 65536:
        return (value,)
    raise UserError(f'{source}: {value!r} is neither a number from 0 to 65535 nor a colour such as "#00ff00"')


def decode_codes(data: bytes, name: str, coding: MaskCoding) -> np.ndarray:
    """Decode the content of a mask file to (H, W) integer codes. Raises `DataError` that says `name`.

    Without declared classes, pixels are numbers if the file allows it, colours otherwise.
    """
    if not coding.colours and (plain := decode_plain_png(data)) is not None:
        return plain
    if looks_like_dicom(data):
        raise unreadable(
            name, "a DICOM file, which is not read as a mask; import-volumes reads it, or save masks as PNG"
        )
    image = open_upright(data, name)
    if coding.colours:
        return _colour_codes(image, coding.threshold or 128)
    if image.mode == "1":
        return np.where(np.asarray(image), 255 if 255 in coding.known or not coding.classes else 1, 0)
    if image.mode == "L" or image.mode.startswith("I") or (image.mode == "P" and "transparency" not in image.info):
        return np.asarray(image)
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all() or (values != np.rint(values)).any() or (values < 0).any():
            raise unreadable(name, "a mask of fractions, negative numbers or NaN; save it as 8-bit grey")
        return values.astype(np.int64)
    return _channel_codes(image, coding)


def codes_to_classes(codes: np.ndarray, coding: MaskCoding, name: str) -> np.ndarray:
    """Convert (H, W) codes to uint8 class indices. Raises `DataError` that lists undeclared codes."""
    classes = np.zeros(codes.shape, np.uint8)
    rest = np.ones(codes.shape, bool)
    meaning = [(coding.background, 0), (coding.ignore, IGNORE)]
    meaning += [(values, index) for index, (_, values) in enumerate(coding.classes, start=1)]
    for values, index in meaning:
        for value in values:
            hit = codes == value
            classes[hit] = index
            rest &= ~hit
    if not rest.any():
        return classes
    if coding.threshold is None:
        raise unreadable(name, unknown_values({int(code) for code in np.unique(codes[rest])}))
    classes[rest] = codes[rest] >= coding.threshold
    return classes


def declare(
    classes: Mapping[str, Any],
    ignore: object = None,
    threshold: int | None = None,
    source: str = "data.classes",
    *,
    overlap: bool = False,
) -> MaskCoding:
    """The coding that a user declared, before any mask is read. Raises `UserError` that names `source`.

    With `overlap`, a value may belong to several classes, and each class may have the threshold.
    """
    every = {name: parse_value(value, f"{source}: {name}") for name, value in classes.items()}
    named = {name: values for name, values in every.items() if not is_background(name)}
    background = tuple(code for name, values in every.items() if name not in named for code in values)
    if blank := next((name for name in named if not name.strip() or not name.isprintable()), None):
        raise UserError(f"{source}: {blank!r} is no name of a class; give it printable text")
    ignored = () if ignore is None else parse_value(ignore, "ignore")
    if classes and not named:
        raise UserError(f"{source}: declares only the background; declare at least one class")
    if len(named) >= PADDING:
        raise UserError(f"{source}: {len(named)} classes; at most {PADDING - 1} fit a mask")
    if any(code >= COLOUR for codes in named.values() for code in codes):
        named = {name: tuple(map(_as_colour, codes)) for name, codes in named.items()}
        background, ignored = tuple(map(_as_colour, background)), tuple(map(_as_colour, ignored))
    foreground = [code for codes in named.values() for code in codes]
    meant = [*background, *ignored, *(set(foreground) if overlap else foreground)]
    for code, count in Counter(meant).items():
        if count > 1:
            what = f"{describe_code(code)} is declared {count} times"
            remedy = "; classes that overlap need data.multilabel" if foreground.count(code) > 1 else ""
            raise UserError(f"{source}: {what} (classes, background and ignore){remedy}")
    coding = MaskCoding(tuple(named.items()), ignored, background, threshold)
    if threshold is not None and named and coding.only_value is None and not overlap:
        raise UserError(f"{source}: threshold needs exactly one class with one grey value; leave threshold out")
    return coding


def is_background(name: str) -> bool:
    """Whether a class name stands for the background: `background` in any case, also as LabelMe's `_background_`."""
    return name.strip("_ ").lower() == BACKGROUND


def colour_name(code: int) -> str | None:
    """Write the code of a colour as "#rrggbb"; None for a number."""
    return f"#{code - COLOUR:06x}" if code >= COLOUR else None


def describe_code(code: int) -> str:
    """Write a code as a user would declare it."""
    return f'"{colour_name(code)}"' if code >= COLOUR else str(code)


def unknown_values(codes: set[int]) -> str:
    """Undeclared codes in words."""
    return f"undeclared mask value{'s' if len(codes) > 1 else ''} {listed(codes)}"


def listed(codes: set[int]) -> str:
    """The first few codes, as a user would declare them."""
    shown = ", ".join(describe_code(code) for code in sorted(codes)[:8])
    return f"{shown}{', ...' if len(codes) > 8 else ''}"


def _colour_codes(image: Image.Image, threshold: int) -> np.ndarray:
    """Codes of the displayed colours; pixels with alpha below `threshold` are black."""
    pixels = np.asarray(image.convert("RGBA"))
    codes = np.full(pixels.shape[:2], COLOUR, np.int32)
    for channel, shift in enumerate((16, 8, 0)):  # one at a time: a quarter of the memory
        codes += pixels[:, :, channel].astype(np.int32) << shift
    codes[pixels[:, :, 3] < threshold] = COLOUR
    return codes


def _channel_codes(image: Image.Image, coding: MaskCoding) -> np.ndarray:
    pixels = np.asarray(image.convert("RGBA"))
    if _alpha_is_mask(pixels, coding):  # of a palette image, too: the indices of a drawing mean nothing
        return pixels[:, :, 3]
    if image.mode == "P":
        return np.asarray(image)
    channels = np.where(pixels[:, :, 3:] == 0, 0, pixels[:, :, :3])
    red, green, blue = (channels[:, :, index] for index in range(3))
    if (red == green).all() and (green == blue).all():
        return red
    coloured = [channel for channel in (red, green, blue) if channel.any()]
    return coloured[0] if len(coloured) == 1 else _colour_codes(image, 1)


def _alpha_is_mask(pixels: np.ndarray, coding: MaskCoding) -> bool:
    """Whether (H, W, 4) pixels are a drawing in one colour on transparent ground that fits the declaration."""
    alpha = pixels[:, :, 3]
    if alpha.min() == 255 or (coding.classes and coding.only_value != 255):
        return False
    if not coding.classes and alpha.any() and alpha.max() < 255:  # no pixel would then have the value 255
        return False
    drawn = alpha == 255 if (alpha == 255).any() else alpha > 0
    colours = pixels[drawn][:, :3]
    return bool((colours == colours[:1]).all())


def _as_colour(code: int) -> int:
    """A grey value, declared next to colours, as that grey."""
    return code if code >= COLOUR else COLOUR + min(code, 255) * 0x010101
