"""Text in pictures: file and class names of any language, as far as this computer has letters for them."""

import unicodedata
from collections.abc import Iterator
from functools import cache

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_INSTALLED = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "DroidSansFallbackFull.ttf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "Arial.ttf",
    "PingFang.ttc",
    "AppleSDGothicNeo.ttc",
    "msyh.ttc",
    "msgothic.ttc",
    "malgun.ttf",
    "seguisym.ttf",
)
"""Fonts of Linux, macOS and Windows that are tried for what Pillow's own lacks: it has ASCII alone."""


def write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, width: int, colour: object) -> int:
    """Write a line of at most `width` pixels, shortened at its beginning: the end of a path says most.

    Letters that no font here has lose their accents, or become "?". Returns the width in pixels.
    """
    shown, font = _legible(unicodedata.normalize("NFC", text), size)
    whole = shown
    while shown and font.getlength(shown if shown == whole else f"...{shown}") > width:
        shown = shown[1:]
    shown = shown if shown == whole else f"...{shown}"
    draw.text(place, shown, colour, font)  # type: ignore[arg-type] # a colour, as Pillow takes it
    return int(font.getlength(shown))


def _legible(text: str, size: int) -> tuple[str, Font]:
    """A text and a font that has all its letters."""
    for font in _fonts(size):
        if all(_has(font, letter) for letter in set(text)):
            return text, font
    own = next(_fonts(size))
    plain = "".join(letter if _has(own, letter) else unicodedata.normalize("NFKD", letter) for letter in text)
    kept = (letter if _has(own, letter) else "?" for letter in plain if not unicodedata.combining(letter))
    return "".join(kept), own


def _fonts(size: int) -> Iterator[Font]:
    yield _own(size)
    for name in _INSTALLED:
        if (font := _installed(name, size)) is not None:
            yield font


@cache
def _own(size: int) -> Font:
    return ImageFont.load_default(size)


@cache
def _installed(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@cache
def _has(font: Font, letter: str) -> bool:
    """Whether `font` draws anything but its sign for missing letters."""
    return letter.isspace() or _drawn(font, letter) != _drawn(font, "\uffff")


def _drawn(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
