"""Where the arrays of a run lie: on one device, on all devices of a process, or on those of several processes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pdrunet_jax.mesh import DATA, ROWS, check_images, data_share, make_mesh, place_batch, replicate

T = TypeVar("T")
R = TypeVar("R")


class Placement:
    """What has to be done to arrays before and after a step on `mesh`; nothing without one."""

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.mesh = mesh
        self.share = (0, 1) if mesh is None else data_share(mesh)
        """Which share of each batch is this process's, and of how many."""

    @classmethod
    def here(cls) -> "Placement":
        """On all devices of this process, whatever other processes do."""
        devices = jax.local_devices()
        return cls(make_mesh(devices=devices) if len(devices) > 1 else None)

    def eval_batch_size(self, wanted: int) -> int:
        """The next size that the devices can share; none of them has more images than `wanted` for it."""
        shares = 1 if self.mesh is None else self.mesh.shape[DATA]
        return -(-wanted // shares) * shares

    def batch(self, share: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """A batch on the devices, of which every process gives its share."""
        return share if self.mesh is None else place_batch(self.mesh, share)

    def state(self, state: Any) -> Any:
        """A state on every device, which every process has whole."""
        return state if self.mesh is None else replicate(self.mesh, state)

    def whole(self, tree: Any) -> Any:
        """Arrays of all devices as NumPy arrays, in every process."""
        return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def over_devices(function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, Callable[[], R]]]:
    """Each of `items`, in order, with a call that returns `function` of it, or raises what that raised.

    Every device of this process computes one at a time, ahead of the calls; a single device does it when called.
    """
    devices = jax.local_devices()
    if len(devices) == 1:
        for item in items:
            yield item, partial(function, item)
        return
    free: SimpleQueue[jax.Device] = SimpleQueue()
    for device in devices:
        free.put(device)

    def compute(item: T) -> R:
        device = free.get()
        try:
            with jax.default_device(device):
                return function(item)
        finally:
            free.put(device)

    pool = ThreadPoolExecutor(len(devices))
    ahead: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            ahead.append((item, pool.submit(compute, item)))
            if len(ahead) > len(devices):
                first, future = ahead.popleft()
                yield first, future.result
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result
    finally:
        pool.shutdown(cancel_futures=True)


def choose_devices(batch_size: int, height: int, rows: int = 1) -> tuple[Mesh | None, str]:
    """The devices to train on, and what the first line should say of them: nothing for a single one.

    All of them share each batch: of one process as many as divide it, of several processes every one. A single device
    needs no mesh.

    Args:
        batch_size: images in each batch.
        height: rows of an image.
        rows: devices that share an image.

    Raises:
        UserError: the devices cannot share the batch, or the images, like this.
    """
    devices, processes = jax.devices(), jax.process_count()
    total = len(devices)
    if processes == 1:
        shares = max((n for n in range(1, total // max(rows, 1) + 1) if batch_size % n == 0), default=1)
        chosen = devices[: shares * rows] if rows > 0 and total >= rows else devices
    else:
        chosen = devices
    if len(chosen) == 1 and rows == 1:
        return None, f"1 of {total} devices: no other number divides train.batch_size {batch_size}" if total > 1 else ""
    mesh = make_mesh(rows, chosen)
    check_images(mesh, batch_size, height)
    used = f"{len(chosen)} devices"
    if len(chosen) < total:
        used = f"{len(chosen)} of {total} devices: more do not divide train.batch_size {batch_size}"
    if processes > 1:
        used = f"{processes} processes with {total // processes} device{'s' if total > processes else ''} each"
    return mesh, f"{used}{f', {mesh.shape[ROWS]} to an image' if rows > 1 else ''}"
