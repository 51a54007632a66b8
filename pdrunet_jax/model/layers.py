"""Convolution, batch normalisation with PyTorch's semantics, dropout, and the layer that the network is made of."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from pdrunet_jax.model.fast import block, pallas, pallas_block
from pdrunet_jax.model.fast import convolution as fused
from pdrunet_jax.model.fast.convolution import EPSILON as EPSILON
from pdrunet_jax.model.fast.convolution import convolve, moments, per_channel, pixel_count
from pdrunet_jax.model.fast.phases import Activation

if TYPE_CHECKING:
    from pdrunet_jax.model.execution import Execution

Path = Literal["plain", "polyphase", "fused", "pallas"]
"""Implementation of a 3x3 convolution; parity level 10 compares them.

plain: XLA's dilated convolution. polyphase: dense convolutions on phases (`fast/phases.py`). fused: polyphase; in
training with the gradient of `fast/block.py`, in evaluation with the normalisation folded into the kernel and, where it
is faster, Winograd convolutions (`fast/winograd.py`). pallas: on NVIDIA GPUs, kernels that take the normalisation, ReLU
and shortcut along with the convolution (`fast/pallas.py`).
"""

PATHS: tuple[Path, ...] = ("plain", "polyphase", "fused")
"""Paths that run anywhere."""

GPU_PATHS: tuple[Path, ...] = ("pallas",)
"""Paths that run on NVIDIA GPUs only."""

State = nnx.State[Any, Any]
"""Arrays of a network, or of a part of it, by path."""

MOMENTUM = 0.1
"""Weight of the newest batch in the running statistics (PyTorch's convention)."""

Tap = Callable[[str, jax.Array], None]
"""Called with the public name and the value (N, H, W, C) of intermediate activations."""


class Conv(nnx.Module):
    """A 2-D convolution with bias; stride 1, zero padding that keeps the size.

    Attributes:
        kernel: (size, size, inputs, outputs).
        bias: (outputs,).
    """

    def __init__(
        self, inputs: int, outputs: int, size: int = 3, *, init: str = "torch", dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        shape = (size, size, inputs, outputs)
        fan_in = size * size * inputs
        if init == "torch":
            # torch.nn.Conv2d draws kernel and bias from U(-b, b) with b = 1 / sqrt(fan_in), which is its
            # kaiming_uniform with a = sqrt(5).
            kernel = uniform(rngs, shape, fan_in**-0.5, dtype)
            bias = uniform(rngs, (outputs,), fan_in**-0.5, dtype)
        elif init == "he":
            kernel = jax.random.normal(rngs.params(), shape, dtype) * (2 / fan_in) ** 0.5
            bias = jnp.zeros((outputs,), dtype)
        else:
            raise ValueError(f"init = {init!r}; it is torch or he")
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(bias)


def uniform(rngs: nnx.Rngs, shape: Sequence[int], bound: float, dtype: DTypeLike) -> jax.Array:
    """Draw initial weights of `shape` from U(-bound, bound)."""
    return jax.random.uniform(rngs.params(), tuple(shape), dtype, -bound, bound)


class BatchNorm(nnx.Module):
    """Batch normalisation with the semantics of torch.nn.BatchNorm2d (eps 1e-5, momentum 0.1).

    A batch is normalised with its biased variance; `running_var` averages the unbiased one. Flax's own layer stores the
    biased variance, always in float32, and defines momentum the other way round.

    Attributes:
        scale, bias: (channels,), parameters.
        running_mean, running_var: (channels,).
        num_batches_tracked: number of batches in the running statistics, int32.
        frozen: use and keep the running statistics in training too, as torch's layer does after `eval()`.
    """

    def __init__(self, channels: int, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((channels,), dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), dtype))
        self.running_mean = nnx.BatchStat(jnp.zeros((channels,), dtype))
        self.running_var = nnx.BatchStat(jnp.ones((channels,), dtype))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.frozen = False

    def track(self, mean: jax.Array, var: jax.Array, pixels: int) -> None:
        """Update the running statistics with a batch's mean and biased variance, (channels,), of `pixels` values."""
        mean, var = lax.stop_gradient(mean), lax.stop_gradient(var)
        unbiased = var * (pixels / (pixels - 1))
        self.running_mean[...] = (1 - MOMENTUM) * self.running_mean[...] + MOMENTUM * mean
        self.running_var[...] = (1 - MOMENTUM) * self.running_var[...] + MOMENTUM * unbiased
        self.num_batches_tracked[...] = self.num_batches_tracked[...] + 1


def conv_norm_relu(
    x: Activation,
    conv: Conv,
    norm: BatchNorm | None,
    skip: Activation | None,
    *,
    dilation: int,
    train: bool,
    execution: "Execution",
    names: tuple[str, str] = ("conv", "norm"),
) -> Activation:
    """Compute relu(norm(conv(x)) + skip), the layer that the whole network is made of.

    Args:
        x: input. Convolutions are computed in its dtype, statistics in the parameters' dtype.
        conv: a 3x3 convolution.
        norm: None for no normalisation.
        skip: None for no shortcut.
        dilation: spacing of the kernel's taps in pixels.
        train: normalise with the batch's statistics and update the running ones in `norm`.
        execution: its path and tap. The tap sees the values after convolution and after normalisation under `names`,
            except in evaluation on the fused and pallas paths, where they do not exist separately.
        names: see `execution`.

    Raises:
        ValueError: training with a single pixel a channel, which has no variance (PyTorch refuses it too).
    """
    x = x.for_dilation(dilation)
    values, dtype = x.values, x.values.dtype
    tap, fold = execution.tap, execution.folds and norm is not None and not train
    kernel, bias = conv.kernel[...], conv.bias[...]

    # In evaluation the normalisation is a fixed affine map: folded into kernel and bias it costs nothing.
    if fold and norm is not None:
        a = norm.scale[...] * lax.rsqrt(norm.running_var[...] + EPSILON)
        kernel = kernel * per_channel(a)
        bias = (bias - norm.running_mean[...]) * a + norm.bias[...]
        norm = None

    if execution.path == "pallas" and norm is None and (tap is None or fold):
        added = None if skip is None else skip.for_dilation(dilation).values
        return x.with_values(pallas.layer(values, kernel.astype(dtype), bias, added, dilation))
    convolution = {"fused": fused.convolution, "pallas": pallas.convolution}.get(execution.path, convolve)
    z = convolution(values, kernel.astype(dtype), dilation // x.phases).astype(bias.dtype) + per_channel(bias)
    if tap is not None and not fold:
        tap(names[0], x.with_values(z).image())
    if norm is not None:
        z = batch_norm(z, norm, train)
        if tap is not None:
            tap(names[1], x.with_values(z).image())
    if skip is not None:
        z = z + skip.for_dilation(dilation).values.astype(z.dtype)
    return x.with_values(jax.nn.relu(z).astype(dtype))


def fused_training_block(
    x: Activation,
    first: tuple[Conv, BatchNorm],
    second: tuple[Conv, BatchNorm],
    *,
    shortcut: str,
    dilation: int,
    execution: "Execution",
) -> Activation:
    """Train through two layers of `conv_norm_relu` at once, with the gradient of `fast/block.py` or `pallas_block.py`.

    Updates the running statistics of both. `shortcut` is the term added before the last ReLU: "none", "input" or
    "conv1". Raises `ValueError` for a single pixel a channel.
    """
    x = x.for_dilation(dilation)
    dtype, pixels = x.values.dtype, pixel_count(x.values)
    _check_pixels(pixels)
    weights = [
        block.LayerWeights(conv.kernel[...].astype(dtype), norm.scale[...], norm.bias[...])
        for conv, norm in (first, second)
    ]
    function = pallas_block.block if execution.path == "pallas" else block.block
    out, *batch = function(x.values, *weights, shortcut, dilation // x.phases)
    for (conv, norm), (mean, var) in zip((first, second), batch, strict=True):
        norm.track(mean + conv.bias[...], var, pixels)
    return x.with_values(out)


def split_state(module: nnx.Module) -> tuple[nnx.GraphDef[Any], State, State]:
    """Split a network, or a part of it, into its static structure, its parameters and its running statistics."""
    parts: Any = nnx.split(module, nnx.Param, nnx.BatchStat)
    return tuple(parts)


def batch_norm(z: jax.Array, norm: BatchNorm, train: bool) -> jax.Array:
    """Normalise `z` (N, H, W, C) with the batch's statistics, and update the running ones, or with the latter.

    Raises `ValueError` in training for a single pixel a channel.
    """
    if train and not norm.frozen:
        _check_pixels(pixel_count(z))
        mean, var = moments(z)
        norm.track(mean, var, pixel_count(z))
    else:
        mean, var = norm.running_mean[...], norm.running_var[...]
    factor = per_channel(norm.scale[...] * lax.rsqrt(var + EPSILON))
    return (z - per_channel(mean)) * factor + per_channel(norm.bias[...])


def _check_pixels(pixels: int) -> None:
    if pixels == 1:
        raise ValueError("batch normalisation needs more than one pixel a channel in training")


def keep_masks(key: jax.Array, rate: float, shapes: Sequence[Sequence[int]]) -> list[jax.Array]:
    """Draw boolean dropout masks of `shapes`, true (kept) with probability 1 - `rate`."""
    keys = jax.random.split(key, len(shapes))
    return [jax.random.bernoulli(part, 1 - rate, tuple(shape)) for part, shape in zip(keys, shapes, strict=True)]


def dropout(x: jax.Array, rate: float, keep: jax.Array) -> jax.Array:
    """Zero `x` where `keep` (bool, same shape) is false, and scale the rest by 1 / (1 - rate)."""
    return jnp.where(keep, x / (1 - rate), 0)
