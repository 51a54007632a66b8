"""Masks to class indices. What a mask's numbers or colours mean is declared, never guessed from one file.

A pixel's *code* is an integer. A number in a declaration is, whichever the file has: the grey value, the palette
index, the value of the only colour channel that is not zero, or the alpha of a drawing in one colour on transparent
ground. A "#rrggbb" in a declaration is the colour that a viewer would show; it is coded as `COLOUR` + 0xrrggbb.

From what is declared and what all masks hold to the dataset's `MaskCoding`: found in one place, said in the log.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdrunet_jax.data.images import decode_plain_png, is_deep_colour, open_upright, read_bytes, resize_image, unreadable
from pdrunet_jax.runtime.errors import UserError

IGNORE = 255
"""Class index of pixels that are left out of loss and metrics."""

COLOUR = 1 << 24
"""Codes from here on are colours; below are numbers."""

BACKGROUND = "background"
"""The name that declares what is no class; without it 0, or black, is."""


@dataclass(frozen=True)
class MaskCoding:
    """How mask pixels become class indices: 0 for background, i + 1 for `classes[i]`, `IGNORE` where ignored."""

    classes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Names with their codes; none while the classes are undeclared."""
    ignore: tuple[int, ...] = ()
    """Codes that are left out of loss and metrics."""
    background: tuple[int, ...] = ()
    """Codes of no class; empty until declared or found."""
    threshold: int | None = None
    """Soft edges: grey values from here on are the (only) class, lower ones background; None allows no other codes."""

    @property
    def colours(self) -> bool:
        """Whether classes are told apart by colour."""
        return any(code >= COLOUR for _, codes in self.classes for code in codes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, background left out."""
        return tuple(name for name, _ in self.classes)

    @property
    def only_value(self) -> int | None:
        """The number of a single class that has just one; None otherwise."""
        if len(self.classes) == 1 and len(self.classes[0][1]) == 1 and not self.colours:
            return self.classes[0][1][0]
        return None

    @property
    def known(self) -> frozenset[int]:
        """All codes that mean something."""
        return frozenset((*self.background, *self.ignore, *(code for _, codes in self.classes for code in codes)))


def read_mask(path: Path, coding: MaskCoding) -> np.ndarray:
    """(H, W) uint8 class indices of a mask file, upright. Raises `DataError` on undeclared values."""
    name = str(path)
    codes = decode_codes(read_bytes(path, name), name, coding)
    return codes_to_classes(codes, coding, name)


def read_soft_mask(path: Path, coding: MaskCoding) -> np.ndarray:
    """(H, W) uint8 foreground share of a binary mask, 255 for all of it; edges keep their grey. Raises `DataError`."""
    name = str(path)
    value = coding.only_value
    codes = decode_codes(read_bytes(path, name), name, coding)
    if not value:  # told apart by colour or by several values, or drawn in 0 on another ground: there are no greys
        return codes_to_classes(codes, coding, name) * np.uint8(255)
    return np.rint(np.clip(codes / value, 0, 1) * 255).astype(np.uint8)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 to (height, width) uint8 by the nearest pixel, so that no class index is made up."""
    height, width = size
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def resize_soft_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 shares to (height, width) uint8, bilinear as images are."""
    return resize_image(mask[:, :, None], size)[:, :, 0]


def parse_value(value: object, source: str) -> tuple[int, ...]:
    """The codes of a declaration: a number, "#rrggbb", or several: a list, or a text with commas between them.

    Raises `UserError` that says `source`.
    """
    if isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, list | tuple):
        return tuple(code for item in value for code in parse_value(item, source))
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return (COLOUR + int(value[1:], 16),)
    if isinstance(value, str) and re.fullmatch(r"\d{1,5}", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 65536:
        return (value,)
    raise UserError(f'{source}: {value!r} is neither a number from 0 to 65535 nor a colour such as "#00ff00"')


def describe_code(code: int) -> str:
    """A code as a user writes it."""
    return f'"#{code - COLOUR:06x}"' if code >= COLOUR else str(code)


def decode_codes(data: bytes, name: str, coding: MaskCoding) -> np.ndarray:
    """(H, W) integers: the code of every pixel of a mask file's content. Raises `DataError` that says `name`.

    Undeclared classes are decoded as numbers where the file allows that, as colours where it does not.
    """
    if not coding.colours and (plain := decode_plain_png(data)) is not None:
        return plain
    image = open_upright(data, name)
    if is_deep_colour(image):
        raise unreadable(name, "a mask of 16 bits for each colour channel; save it with 8, or as 16-bit grey")
    if coding.colours:
        return _colour_codes(image, coding.threshold or 128)
    if image.mode == "1":
        return np.where(np.asarray(image), 255 if 255 in coding.known or not coding.classes else 1, 0)
    if image.mode == "P":
        return _palette_codes(image, coding)
    if image.mode == "L" or image.mode.startswith("I"):
        return np.asarray(image)
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all() or (values != np.rint(values)).any() or (values < 0).any():
            raise unreadable(name, "a mask of fractions, negative numbers or NaN; save it as 8-bit grey")
        return values.astype(np.int64)
    return _channel_codes(image, coding)


def codes_to_classes(codes: np.ndarray, coding: MaskCoding, name: str) -> np.ndarray:
    """(H, W) codes to uint8 class indices. Raises `DataError` that lists the codes that mean nothing."""
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


def unknown_values(codes: set[int]) -> str:
    """A problem's words for codes that are not declared."""
    shown = ", ".join(describe_code(code) for code in sorted(codes)[:8])
    return f"undeclared mask value{'s' if len(codes) > 1 else ''} {shown}{', ...' if len(codes) > 8 else ''}"


def _colour_codes(image: Image.Image, threshold: int) -> np.ndarray:
    """What a viewer shows; pixels more transparent than `threshold` are black."""
    pixels = np.asarray(image.convert("RGBA"))
    codes = np.full(pixels.shape[:2], COLOUR, np.int32)
    for channel, shift in enumerate((16, 8, 0)):  # one at a time: all at once would take four times the memory
        codes += pixels[:, :, channel].astype(np.int32) << shift
    codes[pixels[:, :, 3] < threshold] = COLOUR
    return codes


def _palette_codes(image: Image.Image, coding: MaskCoding) -> np.ndarray:
    if "transparency" in image.info:  # the palette may have been made from a drawing, with indices that mean nothing
        pixels = np.asarray(image.convert("RGBA"))
        if _alpha_is_mask(pixels, coding):
            return pixels[:, :, 3]
    return np.asarray(image)


def _channel_codes(image: Image.Image, coding: MaskCoding) -> np.ndarray:
    pixels = np.asarray(image.convert("RGBA"))
    if _alpha_is_mask(pixels, coding):
        return pixels[:, :, 3]
    channels = np.where(pixels[:, :, 3:] == 0, 0, pixels[:, :, :3])
    red, green, blue = (channels[:, :, index] for index in range(3))
    if (red == green).all() and (green == blue).all():
        return red
    coloured = [channel for channel in (red, green, blue) if channel.any()]
    return coloured[0] if len(coloured) == 1 else _colour_codes(image, 1)


def _alpha_is_mask(pixels: np.ndarray, coding: MaskCoding) -> bool:
    """Whether (H, W, 4) pixels are a drawing in one colour on transparent ground, and the declaration fits that."""
    alpha = pixels[:, :, 3]
    if alpha.min() == 255 or (coding.classes and coding.only_value != 255):
        return False
    if not coding.classes and alpha.any() and alpha.max() < 255:  # then nothing would be the number 255 later on
        return False
    drawn = alpha == 255 if (alpha == 255).any() else alpha > 0
    colours = pixels[drawn][:, :3]
    return bool((colours == colours[:1]).all())


DEFAULT_THRESHOLD = 128
"""Grey value from which a soft-edged mask is foreground when nothing else is declared."""

_SOFT_VALUES = 16
"""So many different greys are smoothed edges; fewer are values that mean something."""

_HOW = "write them into dataset.toml or give data.classes"


def declare(
    classes: Mapping[str, Any], ignore: object = None, threshold: int | None = None, source: str = "data.classes"
) -> MaskCoding:
    """The coding that a user wrote down, `threshold` included if that was. Raises `UserError` that names `source`."""
    named = {name: parse_value(value, f"{source}: {name}") for name, value in classes.items()}
    background = named.pop(BACKGROUND, ())
    ignored = () if ignore is None else parse_value(ignore, "ignore")
    if classes and not named:
        raise UserError(f"{source}: declares nothing but the background")
    if len(named) >= IGNORE:
        raise UserError(f"{source}: {len(named)} classes; at most {IGNORE - 1} fit a mask")
    if any(code >= COLOUR for codes in named.values() for code in codes):
        named = {name: tuple(map(_as_colour, codes)) for name, codes in named.items()}
        background, ignored = tuple(map(_as_colour, background)), tuple(map(_as_colour, ignored))
    every = [*background, *ignored, *(code for codes in named.values() for code in codes)]
    for code, count in Counter(every).items():
        if count > 1:
            raise UserError(
                f"{source}: {describe_code(code)} is declared {count} times (classes, background and ignore)"
            )
    coding = MaskCoding(tuple(named.items()), ignored, background, threshold)
    if threshold is not None and named and coding.only_value is None:
        raise UserError("threshold is for masks of one class with one grey value; here it cannot apply")
    return coding


def resolve(declared: MaskCoding, found: Sequence[tuple[str, Mapping[int, int]]]) -> tuple[MaskCoding, list[str]]:
    """The coding under which every mask can be read, and what the log should say about it.

    `found` holds each mask's name and the pixels of each code. Raises `UndeclaredError` with every problem.
    """
    total: Counter[int] = Counter()
    for _, counts in found:
        total.update(counts)
    if not total:
        return replace(declared, background=declared.background or (0,)), []
    notes: list[str] = []
    if not declared.classes:
        if any(code >= COLOUR for code in total):  # an all-black mask among coloured ones was read as the number 0
            total[COLOUR] += total.pop(0, 0)
            found = [(name, {code or COLOUR: count for code, count in counts.items()}) for name, counts in found]
        declared, notes = _binary(declared, total)
    coding, more = _with_background(declared, total)
    notes += more
    unknown = total.keys() - coding.known
    value = coding.only_value
    if value is not None and coding.background == (0,) and all(code < 256 for code in unknown):
        soft = coding.threshold is not None or len(unknown) >= _SOFT_VALUES
        if soft and value >= (threshold := coding.threshold or DEFAULT_THRESHOLD):
            coding = replace(coding, threshold=threshold)
            if unknown:
                notes.append(f"masks have soft edges: grey values from {threshold} on count as {coding.names[0]}")
            return coding, notes
    coding = replace(coding, threshold=None)
    if unknown:
        raise UndeclaredError(_unknown_problems(coding, found, value))
    return coding, notes


class UndeclaredError(UserError):
    """Masks hold what no declaration explains."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def _as_colour(code: int) -> int:
    """A grey value among colours is that grey."""
    return code if code >= COLOUR else COLOUR + min(code, 255) * 0x010101


def _binary(declared: MaskCoding, total: Mapping[int, int]) -> tuple[MaskCoding, list[str]]:
    """One undeclared class: exactly two values, 0 (or black) and one other."""
    values = set(total) - set(declared.ignore)
    background = set(declared.background) or ({COLOUR} if COLOUR in values else {0})
    others = sorted(values - background)
    shown = ", ".join(describe_code(code) for code in sorted(values)[:8]) + (", ..." if len(values) > 8 else "")
    if not others:
        raise UndeclaredError(["every mask is empty: not one pixel belongs to a class"])
    if len(others) == 1 and len(values) == 2:
        value = others[0]
        note = f"masks hold {shown}: {describe_code(value)} was taken as foreground"
        return replace(declared, classes=(("foreground", (value,)),)), [note]
    if len(others) == 1:
        hint = f"no pixel is background; if that is right, write classes = {{ foreground = {shown} }}"
    elif max(others) < 256 and len(others) >= _SOFT_VALUES:
        top = max(others)
        hint = f"edges look soft; write classes = {{ foreground = {top} }} and threshold = {DEFAULT_THRESHOLD}"
    elif max(others) < 256 and len(others) == 2 and others[1] == 255:
        hint = f"write classes = {{ foreground = 255 }} with ignore = {others[0]}, or both as classes"
    else:
        example = ", ".join(f"name{i} = {describe_code(code)}" for i, code in enumerate(others[:3], start=1))
        hint = f"write what they mean, for example classes = {{ {example} }}"
    raise UndeclaredError([f"masks hold {shown}, and no classes are declared: {hint}; {_HOW}"])


def _with_background(coding: MaskCoding, total: Mapping[int, int]) -> tuple[MaskCoding, list[str]]:
    """What is no class: as declared; else 0 or black; else the one colour of the dataset that is not declared."""
    if coding.background:
        return coding, []
    if not coding.colours:
        return replace(coding, background=(0,)), []
    undeclared = sorted(total.keys() - coding.known)
    if len(undeclared) == 1 and undeclared[0] >= COLOUR:
        note = f"mask colour {describe_code(undeclared[0])} was taken as background, being the only undeclared one"
        notes = [note] if undeclared[0] != COLOUR else []
        return replace(coding, background=(undeclared[0],)), notes
    return replace(coding, background=(COLOUR,) if COLOUR not in coding.known else ()), []


def _unknown_problems(
    coding: MaskCoding, found: Sequence[tuple[str, Mapping[int, int]]], value: int | None
) -> list[str]:
    known = coding.known
    problems = [f"{name}: {unknown_values(extra)}" for name, counts in found if (extra := set(counts) - known)]
    words = ", ".join(f"{name} = {' or '.join(map(describe_code, codes))}" for name, codes in coding.classes)
    remedy = (
        f"declared are {words}; {BACKGROUND} is {' or '.join(map(describe_code, coding.background))}. Declare the rest"
    )
    remedy += f" as ignore, {BACKGROUND} or a class"
    if value is not None:
        remedy += f", or threshold = {DEFAULT_THRESHOLD} if they are soft edges"
    return [*problems[:-1], f"{problems[-1]}\n    {remedy}; {_HOW}"]
