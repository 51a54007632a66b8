"""Split a batch over the devices of a mesh, with the sums that the network needs over all of them.

Inside `jax.shard_map` the network sees the images of its own device. Only batch statistics and parameter gradients
reach further: they are sums over the mesh. Outside `jax.shard_map` these functions change nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pdrunet_jax.runtime.devices import DATA, require_divisible


def axis_size() -> int:
    """Number of devices that the running code is split over; 1 outside `jax.shard_map`."""
    return int(jax.sharding.get_abstract_mesh().shape[DATA]) if _split() else 1


def psum(x: jax.Array) -> jax.Array:
    """Sum `x` over the devices."""
    return lax.psum(x, DATA) if _split() else x


def pvary(x: jax.Array) -> jax.Array:
    """Let `x`, equal on all devices, differ between them from here on; its gradient is then one device's own part."""
    return lax.pcast(x, DATA, to="varying") if _split() else x


def spread(mesh: Mesh, function: Callable[[Any, Any], tuple[Any, Any]], same: Any, split: Any) -> tuple[Any, Any]:
    """Call `function(same, split)` on every device of `mesh` with that device's part of `split`.

    `same` is a tree that is equal on all devices, `split` a tree of arrays (N, H, W, ...). `function` returns a tree of
    arrays (N, H, W, ...) and a tree that is equal on all devices. Raises `UserError` if the N images cannot be split
    evenly.
    """
    require_divisible(mesh, jax.tree.leaves(split)[0].shape[0])
    over = jax.shard_map(function, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=(P(DATA), P()))
    result: tuple[Any, Any] = over(same, split)
    return result


def _split() -> bool:
    return DATA in jax.sharding.get_abstract_mesh().manual_axes
