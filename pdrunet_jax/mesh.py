"""The device mesh, what lies where on it, and a network's call spread over it.

The mesh has two axes: images are spread over "data", and each image's rows are split over "rows", which is for images
that are too large for one device. Parameters and optimizer state are on every device.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pdrunet_jax.errors import UserError
from pdrunet_jax.phases import MAX_DILATION
from pdrunet_jax.shards import DATA, ROWS

__all__ = [
    "DATA",
    "ROWS",
    "batch_sharding",
    "check_images",
    "data_share",
    "make_mesh",
    "place_batch",
    "replicate",
    "replicated",
    "spread",
]


def make_mesh(rows: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of shape (devices / rows, rows) with the axes "data" and "rows".

    Args:
        rows: parts that each image's rows are split into.
        devices: all of them, in all processes, when None.

    Raises:
        UserError: `rows` does not fit the devices, or the processes have different numbers of them.
    """
    chosen = sorted(jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id))
    if rows < 1 or len(chosen) % rows:
        divisors = [str(n) for n in range(1, len(chosen) + 1) if len(chosen) % n == 0]
        raise UserError(f"rows = {rows}: {len(chosen)} devices can be split by {', '.join(divisors)}")
    processes = [device.process_index for device in chosen]
    counts = {processes.count(process) for process in processes}
    if len(counts) > 1:
        raise UserError(f"the processes have {' and '.join(map(str, sorted(counts)))} devices; give each as many")
    here = counts.pop()
    if here % rows and rows % here:
        raise UserError(f"rows = {rows}: each process has {here} devices; one number must divide the other")
    return Mesh(np.array(chosen).reshape(-1, rows), (DATA, ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis spread over "data", whole images on every device of "rows".

    Raw images have few channels: it is the activations whose rows are split (see `spread`).
    """
    return NamedSharding(mesh, P(DATA))


def data_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): into how many shares each batch is split between processes, and which one is this process's.

    Processes that hold other rows of the same images have the same share.
    """
    places = [place for place, device in np.ndenumerate(mesh.devices) if device.process_index == jax.process_index()]
    images = sorted({place[0] for place in places})
    return images[0] // len(images), mesh.shape[DATA] // len(images)


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's share of a batch as part of arrays over the whole mesh, with `batch_sharding`.

    Args:
        mesh: from `make_mesh`.
        batch: arrays whose leading axis counts the images of this share (see `data_share`).

    Raises:
        UserError: the images cannot be spread evenly.
    """
    sharding, (_, shares) = batch_sharding(mesh), data_share(mesh)

    def place(array: np.ndarray) -> jax.Array:
        shape = (array.shape[0] * shares, *array.shape[1:])
        _check_count(mesh, shape[0])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return {name: place(np.asarray(array)) for name, array in batch.items()}


def replicate(mesh: Mesh, tree: Any) -> Any:
    """`tree`, which every process holds alike, with each array on every device of the mesh."""
    sharding = replicated(mesh)

    def place(array: Any) -> jax.Array:
        if isinstance(array, jax.Array) and array.sharding == sharding:
            return array
        # A copy: what the training step is given it may overwrite.
        return jax.make_array_from_process_local_data(sharding, np.array(array))

    return jax.tree.map(place, tree)


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


def _check_count(mesh: Mesh, count: int) -> None:
    if count % mesh.shape[DATA]:
        raise UserError(
            f"{count} images cannot be spread over {mesh.shape[DATA]} devices; give a multiple of {mesh.shape[DATA]}"
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
