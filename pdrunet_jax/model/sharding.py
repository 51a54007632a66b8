"""What the parts of a network that is split over a device mesh have to tell one another.

Inside `jax.shard_map` over a mesh of `pdrunet_jax.mesh` the network's code sees its device's part of the images alone.
Two things reach further: sums over all pixels, and convolutions, which meet the rows of the next part. Elsewhere these
functions change nothing.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pdrunet_jax.model.fast.phases import MAX_DILATION
from pdrunet_jax.runtime.devices import DATA, ROWS, _check_count
from pdrunet_jax.runtime.errors import UserError


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


def check_images(mesh: Mesh, count: int, height: int) -> None:
    """Raise `UserError` unless `count` images of `height` rows can be spread over the mesh evenly.

    Each part of an image has a multiple of 32 rows: the largest dilation then reaches into the next part only, and
    every phase has as many rows in each part.
    """
    _check_count(mesh, count)
    parts = mesh.shape[ROWS]
    if parts > 1 and height % (parts * MAX_DILATION):
        most = max((n for n in range(1, parts) if height % (n * MAX_DILATION) == 0), default=1)
        raise UserError(
            f"images of {height} rows cannot be split into {parts} parts: each must have a multiple of {MAX_DILATION} "
            f"rows. Give a height that is a multiple of {parts * MAX_DILATION}, or rows = {most}"
        )


def spread(mesh: Mesh, function: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """`function` run by every device on its part of the pixels; see `pdrunet_jax.shards` for what it has to mind.

    Args:
        mesh: from `make_mesh`.
        function: takes a tree that is the same on all devices and a tree of arrays (N, H, W, ...); returns another of
            the latter and another of the former.
    """
    over = partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(DATA, ROWS)), out_specs=(P(DATA, ROWS), P()))
    return over(function)
