"""What the parts of a network that is split over a device mesh have to tell one another.

Inside `jax.shard_map` over a mesh of `pdrunet_jax.mesh` the network's code sees its device's part of the images alone.
Two things reach further: sums over all pixels, and convolutions, which meet the rows of the next part. Elsewhere these
functions change nothing.
"""

import math

import jax
from jax import lax

DATA = "data"
"""The mesh axis that images are spread over."""

ROWS = "rows"
"""The mesh axis that each image's rows are split over."""


def axes() -> dict[str, int]:
    """Names and sizes of the mesh axes over which the running code sees one part; empty outside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in (DATA, ROWS) if name in mesh.manual_axes}


def count() -> int:
    """How many parts there are."""
    return math.prod(axes().values())


def total(x: jax.Array) -> jax.Array:
    """The sum of all parts' `x`, the same everywhere."""
    names = tuple(axes())
    return lax.psum(x, names) if names else x


def own(x: jax.Array) -> jax.Array:
    """`x`, the same in all parts, as a value that may come to differ between them; its gradient is then a part's."""
    names = tuple(axes())
    return lax.pcast(x, names, to="varying") if names else x


def split_rows() -> bool:
    """Whether there are parts above or below."""
    return axes().get(ROWS, 1) > 1


def with_neighbours(x: jax.Array, rows: int) -> jax.Array:
    """(N, H, W, C) with `rows` more at the top and at the bottom: those of the parts there, zeros at the image's ends.

    Only neighbours talk to each other; `rows` is at most H.
    """
    parts = axes()[ROWS]
    down = [(part, part + 1) for part in range(parts - 1)]
    up = [(part + 1, part) for part in range(parts - 1)]
    above = lax.ppermute(x[:, -rows:], ROWS, down)
    below = lax.ppermute(x[:, :rows], ROWS, up)
    return lax.concatenate([above, x, below], 1)
