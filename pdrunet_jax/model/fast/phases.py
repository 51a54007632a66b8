"""The polyphase layout, in which a dilated convolution is a dense one.

A 3x3 convolution with dilation d on an (H, W) grid never mixes pixels whose rows or columns differ modulo d: it is d*d
independent dense convolutions, one on each phase, zero padding included. Normalisation, ReLU and additions do not care
about the order of pixels, so an activation can stay in its phases from one block to the next.
"""

import dataclasses
import math
from functools import partial

import jax

MAX_DILATION = 32
"""The largest dilation of the network; all its dilations are powers of two up to this one."""

MIN_SIDE = 3
"""Pixels of a phase's longer side, at least. Phases of 2x2 pixels are mostly padding: on a 2-core CPU a step at 64x64
takes a third of the time with fewer phases and what is left of the dilation within them."""


def to_phases(x: jax.Array, source: int, target: int) -> jax.Array:
    """Bring `x` from the layout of `source` phases a side to that of `target`; one must divide the other.

    The layout of d phases a side stores an (N, H, W, C) activation as (N*d*d, H/d, W/d, C): entry (n*d + i)*d + j holds
    the pixels whose row is i and whose column is j modulo d. d = 1 is the ordinary layout.
    """
    if source == target:
        return x
    batch, h, w, c = x.shape
    if target > source:
        # Row q of phase i goes to phase (q mod k)*source + i: the new phase index has q mod k as its leading part.
        k = target // source
        n = batch // source**2
        x = x.reshape(n, source, source, h // k, k, w // k, k, c).transpose(0, 4, 1, 6, 2, 3, 5, 7)
        return x.reshape(n * target**2, h // k, w // k, c)
    k = source // target
    n = batch // source**2
    x = x.reshape(n, k, target, k, target, h, w, c).transpose(0, 2, 4, 5, 1, 6, 3, 7)
    return x.reshape(n * target**2, h * k, w * k, c)


def finest_phases(height: int, width: int) -> int:
    """The most phases a side, up to `MAX_DILATION`, that (height, width) is split into: a power of two.

    One that divides both, and leaves phases whose longer side has `MIN_SIDE` pixels or more.
    """
    layout = math.gcd(height, width, MAX_DILATION)
    while layout > 1 and max(height, width) < MIN_SIDE * layout:
        layout //= 2
    return layout


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["layout", "limit"])
@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation together with the layout it is kept in.

    Attributes:
        values: (N*layout*layout, H/layout, W/layout, C).
        layout: phases a side.
        limit: the most phases a side that this image size and execution path allow; 1 keeps the ordinary layout.
    """

    values: jax.Array
    layout: int
    limit: int

    @classmethod
    def of(cls, images: jax.Array, limit: int) -> "Activation":
        """`images` (N, H, W, C) in the ordinary layout."""
        return cls(images, 1, limit)

    def for_dilation(self, dilation: int) -> "Activation":
        """The same activation in the layout closest to dense convolutions at `dilation`."""
        target = min(dilation, self.limit)
        return dataclasses.replace(self, values=to_phases(self.values, self.layout, target), layout=target)

    def __add__(self, other: "Activation") -> "Activation":
        """The sum, in the layout of the left operand."""
        return self.with_values(self.values + to_phases(other.values, other.layout, self.layout))

    def with_values(self, values: jax.Array) -> "Activation":
        """New values in the same layout."""
        return dataclasses.replace(self, values=values)

    def image(self) -> jax.Array:
        """The values in the ordinary layout (N, H, W, C)."""
        return to_phases(self.values, self.layout, 1)
