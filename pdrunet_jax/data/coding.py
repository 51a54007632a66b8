"""From what is declared and what all masks hold to the dataset's `MaskCoding`: found in one place, said in the log."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pdrunet_jax.data.masks import BACKGROUND, COLOUR, IGNORE, MaskCoding, describe, parse_value, unknown_values
from pdrunet_jax.errors import UserError

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
            raise UserError(f"{source}: {describe(code)} is declared {count} times (classes, background and ignore)")
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
    shown = ", ".join(describe(code) for code in sorted(values)[:8]) + (", ..." if len(values) > 8 else "")
    if not others:
        raise UndeclaredError(["every mask is empty: not one pixel belongs to a class"])
    if len(others) == 1 and len(values) == 2:
        value = others[0]
        note = f"masks hold {shown}: {describe(value)} was taken as foreground"
        return replace(declared, classes=(("foreground", (value,)),)), [note]
    if len(others) == 1:
        hint = f"no pixel is background; if that is right, write classes = {{ foreground = {shown} }}"
    elif max(others) < 256 and len(others) >= _SOFT_VALUES:
        top = max(others)
        hint = f"edges look soft; write classes = {{ foreground = {top} }} and threshold = {DEFAULT_THRESHOLD}"
    elif max(others) < 256 and len(others) == 2 and others[1] == 255:
        hint = f"write classes = {{ foreground = 255 }} with ignore = {others[0]}, or both as classes"
    else:
        example = ", ".join(f"name{i} = {describe(code)}" for i, code in enumerate(others[:3], start=1))
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
        note = f"mask colour {describe(undeclared[0])} was taken as background, being the only undeclared one"
        notes = [note] if undeclared[0] != COLOUR else []
        return replace(coding, background=(undeclared[0],)), notes
    return replace(coding, background=(COLOUR,) if COLOUR not in coding.known else ()), []


def _unknown_problems(
    coding: MaskCoding, found: Sequence[tuple[str, Mapping[int, int]]], value: int | None
) -> list[str]:
    known = coding.known
    problems = [f"{name}: {unknown_values(extra)}" for name, counts in found if (extra := set(counts) - known)]
    words = ", ".join(f"{name} = {' or '.join(map(describe, codes))}" for name, codes in coding.classes)
    remedy = f"declared are {words}; {BACKGROUND} is {' or '.join(map(describe, coding.background))}. Declare the rest"
    remedy += f" as ignore, {BACKGROUND} or a class"
    if value is not None:
        remedy += f", or threshold = {DEFAULT_THRESHOLD} if they are soft edges"
    return [*problems[:-1], f"{problems[-1]}\n    {remedy}; {_HOW}"]
