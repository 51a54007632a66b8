"""The device mesh, what lies where on it, and a network's call spread over it.

The mesh has two axes: images are spread over "data", and each image's rows are split over "rows", which is for images
that are too large for one device. Parameters and optimizer state are on every device.

Where the arrays of a run lie: on one device, on all devices of a process, or on those of several processes.

Before the first computation: the arithmetic that was asked for, and a line that says what is really used.
"""

import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pdrunet_jax.runtime.compile import dispatch_in_turn
from pdrunet_jax.runtime.errors import UserError

DATA = "data"
"""The mesh axis that images are spread over."""

ROWS = "rows"
"""The mesh axis that each image's rows are split over."""


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


def _check_count(mesh: Mesh, count: int) -> None:
    if count % mesh.shape[DATA]:
        raise UserError(
            f"{count} images cannot be spread over {mesh.shape[DATA]} devices; give a multiple of {mesh.shape[DATA]}"
        )


T = TypeVar("T")
R = TypeVar("R")


class Placement:
    """What has to be done to arrays before and after a step on `mesh`; nothing without one."""

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.mesh = mesh
        self.process_shard = (0, 1) if mesh is None else data_share(mesh)
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

    def shard_batch(self, share: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """A batch on the devices, of which every process gives its share."""
        return share if self.mesh is None else place_batch(self.mesh, share)

    def replicate(self, state: Any) -> Any:
        """A state on every device, which every process has whole."""
        return state if self.mesh is None else replicate(self.mesh, state)

    def to_host(self, tree: Any) -> Any:
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


MATMUL_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default", "float64": "highest"}
"""JAX's name for each precision; its own default on recent NVIDIA GPUs would be TF32, not float32."""

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def configure_jax(precision: str, deterministic: bool = False) -> str:
    """Set JAX up for `precision` and return a line that names device and precision: `cpu (2 cores), float32`.

    Call it before anything is computed: `deterministic` is an XLA flag, which is read when the device is first used.
    Warns on standard error when the machine has an NVIDIA GPU that JAX does not use. Raises `UserError` if JAX finds
    no device at all.
    """
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_default_matmul_precision", MATMUL_PRECISION[precision])
    dispatch_in_turn()
    gpu = nvidia_gpu()
    if deterministic and gpu and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise UserError(f"JAX finds no device: {error}; JAX_PLATFORMS=cpu runs on the processor") from None
    platform = devices[0].platform
    if platform == "cpu" and gpu and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        print(
            f"warning: this machine has a GPU ({gpu}) but JAX runs on the CPU; pip install 'pdrunet-jax[cuda12]'",
            file=sys.stderr,
        )
    here = jax.local_devices()
    where = f"cpu ({_cores()} cores)" if platform == "cpu" else f"{platform} ({len(here)} x {here[0].device_kind})"
    return f"{where}, {precision}{', deterministic' if deterministic and platform != 'cpu' else ''}"


def nvidia_gpu() -> str | None:
    """The name of an NVIDIA GPU of this machine, whether or not JAX can use it; None without one."""
    if not (Path("/proc/driver/nvidia/gpus").is_dir() or Path("/dev/nvidia0").exists()):
        return None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            names = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            names = []
        if names:
            return names[0].strip()
    return "NVIDIA"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
