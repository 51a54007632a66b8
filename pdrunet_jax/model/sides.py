"""Classes told apart by their side, such as femur_left and femur_right: what they become in a mirror image."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdrunet_jax.runtime.errors import UserError

SWAP = "swap_on_flip"
"""Key of the pairs in the options of a weights file; absent where no class has a side, or none was declared."""
VERTICAL = "vertical_flips"
"""Key that states whether a model with such pairs was trained on top-bottom mirror images."""

Pairs = tuple[tuple[str, str], ...]


def _plain(text: str) -> str:
    """`text` without accents."""
    return "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))


_LEFT, _RIGHT = (
    set(_plain(words).split())
    for words in (
        "l lt lh left links linke linker linkes linken sin sinister sinistra sinistro sx gauche izquierda izquierdo "
        "izq esquerda esquerdo esq левый левая левое лев 左 vänster venstre lewy lewa lewe levý levá levé "
        "vasen stâng stânga kiri αριστερό αριστερά αριστερός αριστερή يسار أيسر اليسرى 왼쪽 좌측",
        "r rt rh right rechts rechte rechter rechtes rechten dex dexter dextra destra destro dx droite droit derecha "
        "derecho dcha direita direito dir правый правая правое прав 右 höger højre høyre prawy prawa prawe "
        "pravý pravá pravé oikea drept dreapta kanan δεξί δεξιά δεξιός يمين أيمن اليمنى 오른쪽 우측",
    )
)
_GLUED = (
    ("left", "right"),
    ("links", "rechts"),
    ("l", "r"),
    ("li", "re"),
    ("le", "ri"),
    ("sol", "sag"),
    ("bal", "jobb"),
)
"""Sides if the other class exists too: words that mean other things alone, and what sticks to a word, as in lfemur."""
_SIDE = "\0"


@dataclass(frozen=True)
class Mirror:
    """What a network's outputs become when its image is mirrored."""

    channels: tuple[int, ...] = ()
    """Output channel that each channel changes places with; empty if none does."""
    horizontal: str = ""
    """Why left-right mirror images cannot be used; empty if they can."""
    vertical: str = ""
    """Why top-bottom mirror images cannot be used; empty if they can."""


def find_pairs(names: Sequence[str]) -> tuple[Pairs, tuple[str, ...]]:
    """Pair the classes whose names differ in their side alone, left first.

    Returns the pairs, and the names with a side that has no counterpart.
    """
    found: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: {"left": [], "right": []})
    for name in names:
        side, rest = _side_of(name)
        if side:
            found[rest][side].append(name)
    pairs: list[tuple[str, str]] = []
    alone: list[str] = []
    for sides in found.values():
        if len(sides["left"]) == len(sides["right"]) == 1:
            pairs.append((sides["left"][0], sides["right"][0]))
        else:
            alone += sides["left"] + sides["right"]
    return (*pairs, *_glued_pairs(names)), tuple(alone)


def check_pairs(pairs: Pairs, names: Sequence[str], source: str) -> Pairs:
    """The declared `pairs` of classes `names`. Raises `UserError` that names `source`."""
    every = [name for pair in pairs for name in pair]
    for name in every:
        if name not in names:
            raise UserError(f"{source}: there is no class {name!r}; the classes are {', '.join(names)}")
        if every.count(name) > 1:
            raise UserError(f"{source}: {name!r} is named {every.count(name)} times; a class belongs to one pair")
    return pairs


def swapped(names: Sequence[str], pairs: Pairs) -> tuple[int, ...]:
    """Class index in the mirror image for each class index, background included; empty if none changes."""
    if not pairs:
        return ()
    other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    return (0, *(names.index(other.get(name, name)) + 1 for name in names))


def mirror_of(options: Mapping[str, Any], outputs: int) -> Mirror:
    """What the options stored with weights say about mirror images; older ones state the classes' names alone.

    Raises `UserError` for pairs that do not fit the classes.
    """
    names, stated = options.get("class_names"), options.get(SWAP)
    if not isinstance(names, list | tuple) or len(names) not in (outputs, max(outputs - 1, 1)):
        names = [f"class_{index}" for index in range(1, outputs)]
    if stated is None:
        pairs, alone = find_pairs(names)
        if alone:
            return Mirror(horizontal=f"no class is the other side of {', '.join(alone)}")
    else:
        try:
            pairs = tuple((str(first), str(second)) for first, second in stated)
        except (TypeError, ValueError):
            raise UserError(f"{SWAP}: {stated!r} is no list of pairs of classes") from None
    classes = swapped(names, check_pairs(pairs, names, SWAP))
    if not classes:
        return Mirror()
    if outputs == len(names):  # no channel for the background
        classes = tuple(index - 1 for index in classes[1:])
    vertical = "" if options.get(VERTICAL) else "its classes have sides, and it has not learnt top-bottom mirror images"
    return Mirror(classes, vertical=vertical)


def _glued_pairs(names: Sequence[str]) -> Pairs:
    """Pairs of names that become each other when a side, at the beginning or end of a word, is exchanged."""
    free = {_plain(name).lower(): name for name in names if not _side_of(name)[0]}
    found: dict[str, str] = {}
    for low, name in free.items():
        for left, right in _GLUED:
            for place in (rf"(?<![^\W_]){left}", rf"{left}(?![^\W_])"):
                other = free.get(re.sub(place, right, low), name)
                if other != name:
                    found.setdefault(name, other)
    return tuple(found.items())


def _side_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The side in a class name ("left", "right" or none), and its other words. A name with both sides has neither."""
    words = [word for part in re.split(r"[\W_]+", _plain(name)) for word in _words(part) if word]
    left, right = (any(word in side for word in words) for side in (_LEFT, _RIGHT))
    if left == right:
        return "", ()
    rest = (_SIDE if word in _LEFT | _RIGHT else word for word in words)
    return "left" if left else "right", tuple(sorted(rest))


def _words(part: str) -> list[str]:
    """Words of a part of a name without separators, in lower case: "femurLeft" has two; "L4" is one, a vertebra."""
    if part.lower() in _LEFT | _RIGHT:
        return [part.lower()]
    pieces = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[左右]|[^A-Za-z\d左右]+", part)
    short = any(piece.isdigit() for piece in pieces) and any(len(piece) < 3 and piece.isalpha() for piece in pieces)
    return [part.lower()] if short else [piece.lower() for piece in pieces]
