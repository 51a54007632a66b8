"""What a compiled program makes devices tell one another, read from its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")

_CALL = re.compile(rf"= (.+?) ({'|'.join(KINDS)})\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d+|)(?:e\w+)?\[([\d,]*)\]")


class Collective(NamedTuple):
    """One communication of a program for CPUs (those for GPUs split each in a start and an end)."""

    kind: str
    """One of `KINDS`."""
    arrays: int
    """How many arrays it gives."""
    elements: int
    """Elements of these on one device."""
    bytes: int
    """Their size."""


def collectives(program: str) -> Iterator[Collective]:
    """The communications in the text of a compiled program; one in a loop counts once."""
    for line in program.splitlines():
        if found := _CALL.search(line):
            arrays = [
                (math.prod(map(int, filter(None, shape.split(",")))), max(1, int(bits or 8) // 8))
                for _, bits, shape in _ARRAY.findall(found[1])
            ]
            elements = sum(count for count, _ in arrays)
            yield Collective(found[2], len(arrays), elements, sum(count * size for count, size in arrays))
