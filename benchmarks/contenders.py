"""Training step and inference of JAX and PyTorch, on the same inputs."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Work:
    """Image size, batch size and precision to measure."""

    size: int
    """Height and width, in pixels."""
    batch: int
    precision: str = "float32"
    """Precision of the convolutions: float32, tf32 or bfloat16."""
    filters: int = 40
    """Channels of every hidden layer."""

    def images(self) -> np.ndarray:
        """(N, H, W, 1), uint8."""
        return np.random.default_rng(0).integers(0, 256, (self.batch, self.size, self.size, 1), np.uint8)

    def masks(self) -> np.ndarray:
        """(N, H, W), uint8, 0 or 1."""
        return np.random.default_rng(1).integers(0, 2, (self.batch, self.size, self.size), np.uint8)


@dataclasses.dataclass(frozen=True)
class Sides:
    """A compiled contender; each call returns when the device has finished."""

    train: Callable[[], None]
    infer: Callable[[], None]
    notes: dict[str, Any]
    """Device, compilation times, and the temporary memory that JAX reports."""
    device_memory: Callable[[], int | None]
    """Peak memory on the device in bytes; None on a CPU."""


def jax_side(variant: str, work: Work) -> Sides:
    """Compile the package's own training step and forward pass, with `variant` as `model.conv`.

    "naive" is `plain` with XLA's default compiler options; "remat" is the default path with rematerialisation. The name
    of a network may follow, as in "auto unet depth=3".
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pdrunet_jax.config import Config, DataConfig, ModelConfig, TrainConfig
    from pdrunet_jax.model.build import with_network
    from pdrunet_jax.model.pixels import unit_range
    from pdrunet_jax.runtime.compile import compiler_options, enable_compilation_cache
    from pdrunet_jax.runtime.devices import configure_jax, describe_device
    from pdrunet_jax.train.step import build_model, create_state, train_step

    variant, _, network = variant.partition(" ")
    conv: Any = {"naive": "plain", "remat": "auto"}.get(variant, variant)
    precision: Any = work.precision
    config = Config(
        model=ModelConfig(filters=work.filters, conv=conv),
        data=DataConfig(size=(work.size,)),
        train=TrainConfig(batch_size=work.batch, precision=precision, remat=variant == "remat"),
    )
    if network:
        config = with_network(config, network)
    configure_jax(precision)
    enable_compilation_cache()
    options = {} if variant == "naive" else compiler_options()
    graphdef, state = create_state(config, build_model(config, 1))
    batch = {
        "image": jnp.asarray(work.images()),
        "mask": jnp.asarray(work.masks()),
        "index": jnp.arange(work.batch, dtype=jnp.int32),
        "epoch": jnp.zeros(work.batch, jnp.int32),
    }

    def step(state: Any, batch: Any) -> Any:
        return train_step(config, graphdef, 1, state, batch)

    def forward(params: Any, stats: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, stats, copy=True)(unit_range(images, jnp.float32))

    params, stats = jax.tree.map(jnp.copy, (state.params, state.stats))  # copies, because the step donates its state
    started = time.perf_counter()
    step = jax.jit(step, compiler_options=options, donate_argnums=0).lower(state, batch).compile()
    step_compiled = time.perf_counter() - started
    started = time.perf_counter()
    forward = jax.jit(forward, compiler_options=options).lower(params, stats, batch["image"]).compile()
    holder = [state]
    notes = {
        "device": describe_device(precision),
        "compile_train_s": step_compiled,
        "compile_infer_s": time.perf_counter() - started,
        "temporary_mib": _temporary(step) / 2**20,
    }

    def train() -> None:
        holder[0], values = step(holder[0], batch)
        jax.block_until_ready((holder[0], values))

    def device_memory() -> int | None:
        stats = jax.local_devices()[0].memory_stats()
        return None if stats is None else int(stats["peak_bytes_in_use"])

    return Sides(train, lambda: jax.block_until_ready(forward(params, stats, batch["image"])), notes, device_memory)


def _temporary(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


def torch_side(variant: str, work: Work) -> Sides:
    """Prepare the PyTorch twin with the same loss and optimizer, and no metrics.

    `variant` combines the words "nchw" or "channels_last", "compiled" for torch.compile, and "retained" for a C
    allocator that keeps freed memory (`pdrunet_jax.runtime.malloc`), which PyTorch users do not have by default.
    """
    import torch

    from pdrunet_torch_ref import PDRUNet, training

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.benchmark = True
    exact = work.precision == "float32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not exact
    model = PDRUNet(filters=work.filters, dead_block=False).to(device)
    last = "channels_last" in variant
    if last:
        training.channels_last(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=cuda)
    loss = training.make_loss("bce_dice", 1)
    order = torch.channels_last if last else torch.contiguous_format
    images = torch.from_numpy(np.moveaxis(work.images(), -1, 1).copy()).to(device)
    images = (images.float() / 255).contiguous(memory_format=order)
    target = torch.from_numpy(work.masks()).to(device).float()
    valid = torch.ones_like(target, dtype=torch.bool)
    run: Any = torch.compile(model) if "compiled" in variant else model

    def precision() -> contextlib.AbstractContextManager[Any]:
        half = work.precision == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()

    def finish() -> None:
        if cuda:
            torch.cuda.synchronize()

    def train() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with precision():
            logits = run(images)
        loss(logits.float(), target, valid).backward()
        optimizer.step()
        finish()

    def infer() -> None:
        model.eval()
        with torch.inference_mode(), precision():
            run(images)
        finish()

    notes: dict[str, Any] = {"device": torch.cuda.get_device_name() if cuda else "CPU"}
    started = time.perf_counter()
    train()
    notes["compile_train_s"] = time.perf_counter() - started
    started = time.perf_counter()
    infer()
    notes["compile_infer_s"] = time.perf_counter() - started
    return Sides(train, infer, notes, lambda: torch.cuda.max_memory_allocated() if cuda else None)


SIDES = {"jax": jax_side, "torch": torch_side}


@contextlib.contextmanager
def resident_peak() -> Iterator[Callable[[], int]]:
    """Measure the peak resident memory of this process within the block, in bytes; Linux only."""
    from pathlib import Path

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak() -> int:
        return _status("VmHWM")

    yield peak


def resident() -> int:
    """Resident memory of this process in bytes."""
    return _status("VmRSS")


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0
