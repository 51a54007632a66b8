"""Convolution, batch normalisation with PyTorch's semantics, dropout, and the layer that the network is made of."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from pdrunet_jax.model.fast import block, native, native_block, pallas, pallas_block
from pdrunet_jax.model.fast import convolution as fused
from pdrunet_jax.model.fast.convolution import EPSILON as EPSILON
from pdrunet_jax.model.fast.convolution import convolve, moments, per_channel, pixel_count
from pdrunet_jax.model.fast.phases import ROWS, Activation
from pdrunet_jax.model.sharding import axis_size

if TYPE_CHECKING:
    from pdrunet_jax.model.execution import Execution

Path = Literal["plain", "polyphase", "fused", "native", "pallas"]
"""Implementation of a 3x3 convolution; parity level 10 compares them.

plain: XLA's dilated convolution. polyphase: dense convolutions on phases (`fast/phases.py`). fused: polyphase; in
training with the gradient of `fast/block.py`, in evaluation with the normalisation folded into the kernel and, where it
is faster, Winograd convolutions (`fast/winograd.py`). native: on one CPU, kernels compiled for it that take the
normalisation, ReLU and shortcut along with the convolution (`fast/native.py`). pallas: such kernels on an NVIDIA GPU
(`fast/pallas.py`).
"""

PATHS: tuple[Path, ...] = ("plain", "polyphase", "fused")
"""Paths that run anywhere."""

OTHER_PATHS: tuple[Path, ...] = ("native", "pallas")
"""Paths that run on one device, of some computers only."""

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

    if tap is None or fold:
        own = {"native": native.layer, "pallas": pallas.layer}.get(execution.path)
        if own is not None and norm is None:
            added = None if skip is None else skip.in_phases(x.phases).values
            return x.with_values(own(values, kernel.astype(dtype), bias, added, dilation))
        if execution.path == "native" and norm is not None and train and not norm.frozen:
            return _native_training_layer(x, conv, norm, skip, dilation)

    paths = {"fused": fused.convolution, "native": native.convolution, "pallas": pallas.convolution}
    z = x.with_values(paths.get(execution.path, convolve)(values, kernel.astype(dtype), dilation // (x.phases or 1)))
    if z.phases == ROWS:
        z = z.in_phases(1)
    y = z.values.astype(bias.dtype) + per_channel(bias)
    if tap is not None and not fold:
        tap(names[0], z.with_values(y).image())
    if norm is not None:
        y = batch_norm(y, norm, train)
        if tap is not None:
            tap(names[1], z.with_values(y).image())
    if skip is not None:
        y = y + skip.in_phases(z.phases).values.astype(y.dtype)
    return z.with_values(jax.nn.relu(y).astype(dtype))


def _native_training_layer(
    x: Activation, conv: Conv, norm: BatchNorm, skip: Activation | None, dilation: int
) -> Activation:
    """`conv_norm_relu` with the gradient of `fast/native_block.py`; `x` is in the row layout."""
    pixels = x.values.size // x.values.shape[x.channel_axis]
    _check_pixels(pixels)
    weights = block.LayerWeights(conv.kernel[...], norm.scale[...], norm.bias[...])
    added = None if skip is None else skip.in_phases(x.phases).values
    out, (mean, var) = native_block.layer(x.values, weights, added, dilation)
    norm.track(mean + conv.bias[...], var, pixels)
    return x.with_values(out)


def fused_training_block(
    x: Activation,
    first: tuple[Conv, BatchNorm],
    second: tuple[Conv, BatchNorm],
    *,
    shortcut: str,
    dilation: int,
    execution: "Execution",
) -> Activation:
    """Train through two layers of `conv_norm_relu` at once, with the gradient of `fast/block.py` or its like.

    Updates the running statistics of both. `shortcut` is the term added before the last ReLU: "none", "input" or
    "conv1". Raises `ValueError` for a single pixel a channel.
    """
    x = x.for_dilation(dilation)
    dtype, pixels = x.values.dtype, x.values.size // x.values.shape[x.channel_axis] * axis_size()
    _check_pixels(pixels)
    weights = [
        block.LayerWeights(conv.kernel[...].astype(dtype), norm.scale[...], norm.bias[...])
        for conv, norm in (first, second)
    ]
    function = {"native": native_block.block, "pallas": pallas_block.block}.get(execution.path, block.block)
    out, *batch = function(x.values, *weights, shortcut, dilation // (x.phases or 1))
    for (conv, norm), (mean, var) in zip((first, second), batch, strict=True):
        norm.track(mean + conv.bias[...], var, pixels)
    return x.with_values(out)


def final_layer(x: Activation, conv: Conv) -> jax.Array:
    """Apply the last, 1x1 convolution in the parameters' dtype: logits (N, H, W, outputs)."""
    kernel, bias = conv.kernel[...], conv.bias[...]
    if x.phases == ROWS and x.values.dtype == kernel.dtype:
        return x.with_values(native.convolution(x.values, kernel, 1)).image() + per_channel(bias)
    return x.image().astype(kernel.dtype) @ kernel[0, 0] + per_channel(bias)


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
