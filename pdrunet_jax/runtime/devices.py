"""Devices: set up JAX, describe the hardware, split batches over a mesh, and map work over devices.

A mesh has one axis, "data": each batch is split over it, and parameters and optimizer state are on every device.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pdrunet_jax.runtime.compile import disable_async_dispatch, enable_compilation_cache
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.extras import how_to_install
from pdrunet_jax.runtime.malloc import cores

DATA = "data"
"""Mesh axis that the images of a batch are split over."""

MATMUL_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default", "float64": "highest"}
"""JAX's name for each precision. JAX's own default on recent NVIDIA GPUs is TF32, not float32."""

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

T = TypeVar("T")
R = TypeVar("R")


def configure_jax(precision: str, deterministic: bool = False) -> None:
    """Set precision and determinism. Call it before JAX's devices are used, and before `processes.join`.

    `deterministic` is an XLA flag, which is read when the devices start.
    """
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_default_matmul_precision", MATMUL_PRECISION[precision])
    disable_async_dispatch()
    if deterministic and nvidia_gpu() and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()


@cache
def start_devices() -> list[jax.Device]:
    """Start JAX's devices, with synchronous dispatch and the compilation cache, and return those of this process.

    Prints one warning on standard error if JAX runs on the CPU of a machine that has an NVIDIA GPU, or although a
    plug-in for another device is installed. Raises `UserError` if JAX_PLATFORMS asks for a device that is not there.
    """
    disable_async_dispatch()
    enable_compilation_cache()
    wanted = os.environ.get("JAX_PLATFORMS", "")
    with _captured_log() as log:
        try:
            here = jax.local_devices()
        except (RuntimeError, AssertionError) as error:  # a bare assertion where a plug-in did not start
            what = next(iter(str(error).splitlines()), "") or f"none of JAX_PLATFORMS={wanted} starts"
            gpu = "cuda" in wanted or "gpu" in wanted
            raise UserError(
                f"JAX finds no device: {_why_no_gpu(log) if gpu else what}; set JAX_PLATFORMS=cpu to run on the CPU"
            ) from None
    if here[0].platform == "cpu" and wanted != "cpu" and (log or nvidia_gpu()):
        reason = _why_no_gpu(log) if nvidia_gpu() or _cuda_plugin() else log[0]
        print(f"warning: JAX runs on the CPU: {reason}", file=sys.stderr)
    return here


def describe_device(precision: str, deterministic: bool = False) -> str:
    """Start JAX's devices and describe them: `cpu (2 cores), float32`. Warns and raises as `start_devices` does."""
    here = start_devices()
    if here[0].platform != "cpu":
        suffix = ", deterministic" if deterministic else ""
        return f"{here[0].platform} ({len(here)} x {here[0].device_kind}), {precision}{suffix}"
    return f"cpu ({cores()} cores), {precision}"


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Keep what JAX logs about its plug-ins, tracebacks included, off standard error; yields the reasons it gives."""
    reasons: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            cause = record.exc_info[1] if record.exc_info else None
            reasons.append(next(iter(str(cause or record.getMessage()).splitlines()), ""))

    logger, handler = logging.getLogger("jax._src.xla_bridge"), Handler(logging.WARNING)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield reasons
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def _cuda_plugin() -> bool:
    """Whether a CUDA plug-in of JAX is installed."""
    return bool(find_spec("jax_plugins")) and any(find_spec(f"jax_plugins.xla_cuda{major}") for major in (12, 13))


def _why_no_gpu(log: Sequence[str]) -> str:
    """What keeps JAX from an NVIDIA GPU on this machine, and the remedy."""
    if not nvidia_gpu():
        plugin = "; JAX's CUDA plug-in is installed" if _cuda_plugin() else ""
        return f"this machine has no NVIDIA GPU, or the GPU's driver is not loaded (see nvidia-smi){plugin}"
    if not _cuda_plugin():
        return f"this machine has an NVIDIA GPU, but JAX has no CUDA plug-in; {how_to_install('cuda12')}"
    reason = f" ({log[0]})" if log else ""
    return f"JAX's CUDA plug-in is installed but does not start{reason}; {how_to_install('cuda12')}, and see nvidia-smi"


def nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, usable by JAX or not."""
    return Path("/proc/driver/nvidia/gpus").is_dir() or Path("/dev/nvidia0").exists()


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with the single axis "data" from `devices`; from all devices of all processes if None.

    Raises:
        UserError: the processes have different numbers of devices.
    """
    chosen = sorted(jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id))
    processes = [device.process_index for device in chosen]
    counts = {processes.count(process) for process in processes}
    if len(counts) > 1:
        raise UserError(
            f"the processes have {' and '.join(map(str, sorted(counts)))} devices; give each process the same number"
        )
    return Mesh(np.array(chosen), (DATA,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that is equal on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: the leading axis is split over the devices."""
    return NamedSharding(mesh, P(DATA))


def require_divisible(mesh: Mesh, count: int) -> None:
    """Raise `UserError` unless `count` images can be split evenly over the devices of `mesh`."""
    if count % mesh.size:
        raise UserError(f"{count} images cannot be split over {mesh.size} devices; give a multiple of {mesh.size}")


class Placement:
    """Move batches and training state to the devices of `mesh` and back; without a mesh, leave them to `jax.jit`."""

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.mesh = mesh
        processes = [0] if mesh is None else sorted({device.process_index for device in mesh.devices.flat})
        self.process_shard = (0, 1) if len(processes) == 1 else (processes.index(jax.process_index()), len(processes))
        """(index, count): the part of each batch that this process reads."""

    @classmethod
    def here(cls) -> "Placement":
        """Use all devices of this process, whatever other processes do."""
        devices = jax.local_devices()
        return cls(make_mesh(devices) if len(devices) > 1 else None)

    def eval_batch_size(self, wanted: int) -> int:
        """Round `wanted` up to a multiple of the number of devices."""
        devices = 1 if self.mesh is None else self.mesh.size
        return -(-wanted // devices) * devices

    def shard_batch(self, share: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """Return arrays over the whole mesh of which `share` is this process's part along the leading axis.

        Raises:
            UserError: the images cannot be split evenly.
        """
        if self.mesh is None:
            return share
        mesh, count = self.mesh, self.process_shard[1]

        def place(array: np.ndarray) -> jax.Array:
            shape = (array.shape[0] * count, *array.shape[1:])
            require_divisible(mesh, shape[0])
            return jax.make_array_from_process_local_data(batch_sharding(mesh), array, shape)

        return {name: place(np.asarray(array)) for name, array in share.items()}

    def replicate(self, state: T) -> T:
        """Put `state`, which every process holds in full, on every device."""
        if self.mesh is None:
            return state
        sharding = replicated(self.mesh)

        def place(array: Any) -> jax.Array:
            if isinstance(array, jax.Array) and array.sharding == sharding:
                return array
            # A copy, since the training step overwrites its arguments.
            return jax.make_array_from_process_local_data(sharding, np.array(array))

        placed: T = jax.tree.map(place, state)
        return placed

    def to_host(self, tree: Any) -> Any:
        """Return the arrays of all devices as NumPy arrays, in every process."""
        return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def over_devices(function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, Callable[[], R]]]:
    """Yield each of `items`, in order, with a function that returns (or raises) the result of `function(item)`.

    The devices of this process take turns, ahead of the consumer; a single device computes on demand.
    """
    devices = jax.local_devices()
    if len(devices) == 1:
        yield from ((item, partial(function, item)) for item in items)
        return

    def compute(device: jax.Device, item: T) -> R:
        with jax.default_device(device):
            return function(item)

    pools = [ThreadPoolExecutor(1) for _ in devices]
    ahead: deque[tuple[T, Future[R]]] = deque()
    try:
        for item, (device, pool) in zip(items, cycle(zip(devices, pools, strict=True)), strict=False):
            ahead.append((item, pool.submit(compute, device, item)))
            if len(ahead) > 2 * len(devices):
                first, future = ahead.popleft()
                yield first, future.result
        yield from ((item, future.result) for item, future in ahead)
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
