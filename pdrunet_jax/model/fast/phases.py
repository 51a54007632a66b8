"""Layouts of activations: the ordinary one, rows for the compiled kernels, and phases.

In the polyphase layout, a dilated convolution is a dense one.

A 3x3 convolution with dilation d on an (H, W) grid never mixes pixels whose rows or columns differ modulo d. It is d*d
independent dense convolutions, one on each phase, zero padding included. Normalisation, ReLU and addition do not depend
on the order of pixels, so an activation can stay in phases from one block to the next.
"""

import dataclasses
import math
from functools import partial

import jax

MAX_DILATION = 32
"""Largest dilation of the network; all its dilations are powers of two."""

MIN_SIDE = 3
"""Least number of pixels on a phase's longer side. Phases of 2x2 pixels are mostly padding: on a 2-core CPU, a step at
64x64 takes a third of the time with fewer phases and the remaining dilation within them."""


ROWS = 0
"""In the place of a number of phases: the row layout, (N, H, C, W), of the compiled kernels (`fast/kernels.cc`)."""


def to_phases(x: jax.Array, source: int, target: int) -> jax.Array:
    """Convert `x` from `source` phases a side to `target`; one must divide the other.

    With d phases a side, an (N, H, W, C) activation is stored as (N*d*d, H/d, W/d, C): entry (n*d + i)*d + j holds the
    pixels whose row is i and whose column is j modulo d. d = 1 is the ordinary layout.
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
    """The most phases a side for images of (height, width): a power of two, at most `MAX_DILATION`.

    It divides both sides, and each phase has at least `MIN_SIDE` pixels on its longer side.
    """
    phases = math.gcd(height, width, MAX_DILATION)
    while phases > 1 and max(height, width) < MIN_SIDE * phases:
        phases //= 2
    return phases


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["phases", "limit"])
@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation and the number of phases it is stored in.

    Attributes:
        values: (N*phases*phases, H/phases, W/phases, C); (N, H, C, W) in the row layout.
        phases: phases a side; 1 is the ordinary layout, `ROWS` the row layout.
        limit: the most phases a side that the image size and the execution path allow, or `ROWS`.
    """

    values: jax.Array
    phases: int
    limit: int

    @classmethod
    def of(cls, images: jax.Array, limit: int) -> "Activation":
        """Wrap `images` (N, H, W, C), which are in the ordinary layout."""
        return cls(images, 1, limit)

    def in_phases(self, phases: int) -> "Activation":
        """Convert to this number of phases a side, or to `ROWS`."""
        values, source = self.values, self.phases
        if ROWS in (source, phases) and source != phases:
            # The last two axes change places on the way from rows to the ordinary layout, and on the way back.
            values = values.swapaxes(2, 3) if source == ROWS else to_phases(values, source, 1).swapaxes(2, 3)
            source = phases if phases == ROWS else 1
        return dataclasses.replace(self, values=to_phases(values, source, phases), phases=phases)

    def for_dilation(self, dilation: int) -> "Activation":
        """Convert to the layout in which convolutions at `dilation` are fastest."""
        return self.in_phases(min(dilation, self.limit))

    def __add__(self, other: "Activation") -> "Activation":
        """Add, in the layout of the left operand."""
        return self.with_values(self.values + other.in_phases(self.phases).values)

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in `values`."""
        return 2 if self.phases == ROWS else 3

    def with_values(self, values: jax.Array) -> "Activation":
        """Replace the values; the layout stays."""
        return dataclasses.replace(self, values=values)

    def image(self) -> jax.Array:
        """The values in the ordinary layout, (N, H, W, C)."""
        return self.in_phases(1).values
