"""The coding that reads all masks of a dataset: the declaration, and what the masks themselves leave no doubt about."""

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from pdrunet_jax.data.masks import (
    BACKGROUND,
    COLOUR,
    DEFAULT_THRESHOLD,
    UNNAMED,
    MaskCoding,
    describe_code,
    listed,
    unknown_values,
)
from pdrunet_jax.runtime.errors import DataError

_SOFT_VALUES = 16
"""Masks with at least this many undeclared greys have smoothed edges; with fewer, each grey means something."""

_ENDS = 0.98
"""Share of a mask's pixels that are background or the class, if its other greys are taken for soft edges."""
_ENDS_DECLARED, _NEAR = 0.5, 16
"""Share of them, or of greys as near as this, if a threshold is declared."""

_UNDECLARED = "undeclared mask values"
_HOW = "in dataset.toml or by data.classes"


def resolve(declared: MaskCoding, found: Sequence[tuple[str, Mapping[int, int]]]) -> tuple[MaskCoding, list[str]]:
    """Find the coding that reads every mask; returns it with notes for the log.

    `found` holds each mask's name and its pixel count per code. Raises `DataError` with every problem.
    """
    total: Counter[int] = Counter()
    for _, counts in found:
        total.update(counts)
    if not total:
        return replace(declared, background=declared.background or (0,)), []
    notes: list[str] = []
    if not declared.classes:
        if any(code >= COLOUR for code in total):  # an all-black mask among coloured ones is read as the number 0
            total[COLOUR] += total.pop(0, 0)
            found = [(name, {code or COLOUR: count for code, count in counts.items()}) for name, counts in found]
        declared, notes = _binary(declared, total, found)
    coding, more = _with_background(declared, total)
    notes += more
    unknown = total.keys() - coding.known
    value = coding.only_value
    if value is not None and coding.background == (0,) and all(code < 256 for code in unknown):
        soft = coding.threshold is not None or len(unknown) >= _SOFT_VALUES
        if soft and value >= (threshold := coding.threshold or DEFAULT_THRESHOLD):
            known, near, least = coding.known, 0, _ENDS
            if coding.threshold is not None:
                near, least = _NEAR, _ENDS_DECLARED
            if problems := _photographs(found, known | {0, value}, near, least):
                raise DataError(_UNDECLARED, problems)
            coding = replace(coding, threshold=threshold)
            if unknown:
                notes.append(f"masks have soft edges: grey values from {threshold} on count as {coding.names[0]}")
            return coding, notes
    coding = replace(coding, threshold=None)
    if unknown:
        raise DataError(_UNDECLARED, _unknown_problems(coding, found))
    return coding, notes


def all_empty(coding: MaskCoding, found: Sequence[tuple[str, Mapping[int, int]]]) -> str:
    """The problem of masks without a single pixel of a class."""
    held = listed({code for _, counts in found for code in counts})
    threshold = f", from {coding.threshold} on" if coding.threshold is not None else ""
    return f"every mask is empty: no pixel belongs to a class. Masks hold {held}; {coding}{threshold} ({_HOW})"


def _binary(
    declared: MaskCoding, total: Mapping[int, int], found: Sequence[tuple[str, Mapping[int, int]]]
) -> tuple[MaskCoding, list[str]]:
    """Take two undeclared values, 0 or black and another, as background and one class."""
    values = set(total) - set(declared.ignore)
    background = set(declared.background) or ({COLOUR} if COLOUR in values else {0})
    others = sorted(values - background)
    shown = listed(values)
    if not others:
        raise DataError(_UNDECLARED, ["every mask is empty: no pixel belongs to a class"])
    if len(others) == 1 and len(values) == 2:
        value = others[0]
        note = f"masks hold {shown}: {describe_code(value)} was taken as foreground"
        return replace(declared, classes=((UNNAMED, (value,)),)), [note]
    if len(others) == 1:
        hint = f"no pixel is background; if that is right, declare classes = {{ foreground = {shown} }}"
    else:
        top = max(others)
        ends = background | set(declared.ignore) | {top}
        grey = top < 256 and len(others) >= _SOFT_VALUES
        if grey and (problems := _photographs(found, ends, _NEAR, _ENDS_DECLARED)):
            raise DataError(_UNDECLARED, problems)
        each = [set(counts) & set(others) for _, counts in found]
        hint = _hint(others, alone=all(len(codes) < 2 for codes in each))
    raise DataError(_UNDECLARED, [f"masks hold {shown}, and no classes are declared: {hint} ({_HOW})"])


def _hint(others: Sequence[int], *, alone: bool) -> str:
    """What to declare for several undeclared foreground values; `alone` if no mask holds two of them."""
    top, shown = max(others), ", ".join(map(describe_code, others[:8]))
    example = ", ".join(f"name{i} = {describe_code(code)}" for i, code in enumerate(others[:3], start=1))
    classes = f"classes = {{ {example} }}"
    small, large = (sum(code < _NEAR for code in others), sum(top >= code > top - _NEAR for code in others))
    if alone and len(others) < 8:
        same = f"classes = {{ foreground = [{shown}] }}"
        if small + large == len(others) and top > 256 - _NEAR and small < 2:
            return f"each mask holds one of them, as if they were saved in different ways; declare {same}"
        return f"each mask holds one of them; if all mean the same, declare {same}, otherwise for example {classes}"
    threshold = f"classes = {{ foreground = {top} }} and threshold = {DEFAULT_THRESHOLD}"
    if 256 - _NEAR < top < 256 and small + large == len(others) and large > 1:
        return f"values near 0 and {top} look like losses of JPEG; save masks as PNG, or declare {threshold}"
    if top < 256 and len(others) >= _SOFT_VALUES:
        return f"edges look soft; declare {threshold}"
    if len(others) == 2 and top == 255:
        one, rest = (others[0], 255) if small else (255, others[0])
        return f"declare classes = {{ foreground = {one} }} with ignore = {rest}, or both as classes"
    return f"declare what they mean, for example {classes}"


def _photographs(
    found: Sequence[tuple[str, Mapping[int, int]]], ends: AbstractSet[int], near: int, least: float
) -> list[str]:
    """A problem for each mask of which less than the share `least` has values in `ends`, or within `near` of them."""
    problems = []
    for name, counts in found:
        total = sum(counts.values())
        share = sum(count for code, count in counts.items() if any(abs(code - end) <= near for end in ends)) / total
        if share < least:
            words = f"only {share:.1%} of its pixels are {' or '.join(map(str, sorted(ends)))}"
            problems.append(f"{name}: {words}, which of a mask nearly all are: is it a photograph?")
    if problems:
        soft = f", or declare threshold = {DEFAULT_THRESHOLD} if its edges are soft" if least == _ENDS else ""
        problems[0] += f"\n    put the mask in its place{soft}"
    return problems


def _with_background(coding: MaskCoding, total: Mapping[int, int]) -> tuple[MaskCoding, list[str]]:
    """Add the background: as declared, else 0 or the only undeclared colour, else black."""
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


def _unknown_problems(coding: MaskCoding, found: Sequence[tuple[str, Mapping[int, int]]]) -> list[str]:
    problems = [f"{name}: {unknown_values(extra)}" for name, counts in found if (extra := set(counts) - coding.known)]
    remedy = f"{coding}; {BACKGROUND} is {' or '.join(map(describe_code, coding.background))}"
    remedy += f". Declare the rest as ignore, {BACKGROUND} or a class"
    if coding.only_value is not None:
        remedy += f", or threshold = {DEFAULT_THRESHOLD} if they are soft edges"
    return [f"{problems[0]}\n    {remedy} ({_HOW})", *problems[1:]]
