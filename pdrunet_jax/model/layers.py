"""Convolution, batch normalisation with PyTorch's semantics, and their execution paths."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from pdrunet_jax.model.fast import convolution as fused
from pdrunet_jax.model.fast.block import LayerWeights, Shortcut, block
from pdrunet_jax.model.fast.convolution import EPSILON, convolve, moments, per_channel, pixel_count
from pdrunet_jax.model.fast.phases import Activation, finest_phases

Path = Literal["plain", "polyphase", "fused"]
"""How a 3x3 convolution is carried out; parity level 10 holds them to one another.

plain: XLA's dilated convolution. polyphase: dense convolutions on phases. fused: polyphase, with the gradient of
`pdrunet_jax.fused_block` in training, and in evaluation with the normalisation folded into the kernel and, where it
pays, convolutions by `pdrunet_jax.winograd`.
"""

PATHS: tuple[Path, ...] = ("plain", "polyphase", "fused")

MOMENTUM = 0.1
"""Weight of the newest batch in the running statistics (PyTorch's convention)."""

Tap = Callable[[str, jax.Array], None]
"""Is called with the public name and the value (N, H, W, C) of intermediate activations."""


def choose_path(conv: str) -> Path:
    """The execution path that `model.conv` stands for; "auto" chooses by platform, from measurement."""
    if conv == "auto":
        return "fused" if jax.default_backend() == "cpu" else "plain"
    for path in PATHS:
        if path == conv:
            return path
    raise ValueError(f"conv = {conv!r}; it is one of auto, {', '.join(PATHS)}")


def from_image(images: jax.Array, path: Path) -> Activation:
    """`images` (N, H, W, C) as the network's first activation, with the layouts that `path` and the size allow."""
    height, width = images.shape[1:3]
    return Activation.of(images, 1 if path == "plain" else finest_phases(height, width))


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
            # torch.nn.Conv2d draws kernel and bias from U(-b, b) with b = 1 / sqrt(fan_in): its kaiming_uniform with
            # a = sqrt(5) comes to just that.
            bound = fan_in**-0.5
            kernel = jax.random.uniform(rngs.params(), shape, dtype, -bound, bound)
            bias = jax.random.uniform(rngs.params(), (outputs,), dtype, -bound, bound)
        elif init == "he":
            kernel = jax.random.normal(rngs.params(), shape, dtype) * (2 / fan_in) ** 0.5
            bias = jnp.zeros((outputs,), dtype)
        else:
            raise ValueError(f"init = {init!r}; it is torch or he")
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(bias)


class BatchNorm(nnx.Module):
    """Batch normalisation as torch.nn.BatchNorm2d has it (eps 1e-5, momentum 0.1).

    The batch is normalised with its biased variance; `running_var` averages the unbiased one. Flax's own stores the
    biased one, keeps it in float32 whatever the parameters' type, and counts momentum the other way round.

    Attributes:
        scale, bias: (channels,), parameters.
        running_mean, running_var: (channels,).
        num_batches_tracked: batches that the running statistics have seen, int32.
    """

    def __init__(self, channels: int, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((channels,), dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), dtype))
        self.running_mean = nnx.BatchStat(jnp.zeros((channels,), dtype))
        self.running_var = nnx.BatchStat(jnp.ones((channels,), dtype))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def track(self, mean: jax.Array, var: jax.Array, pixels: int) -> None:
        """Bring a batch's mean and biased variance, each (channels,) over `pixels` values, into the running ones."""
        mean, var = lax.stop_gradient(mean), lax.stop_gradient(var)
        unbiased = var * (pixels / (pixels - 1))
        self.running_mean[...] = (1 - MOMENTUM) * self.running_mean[...] + MOMENTUM * mean
        self.running_var[...] = (1 - MOMENTUM) * self.running_var[...] + MOMENTUM * unbiased
        self.num_batches_tracked[...] = self.num_batches_tracked[...] + 1


def conv_norm_relu(
    x: Activation,
    conv: Conv,
    norm: BatchNorm | None,
    residual: Activation | None,
    *,
    dilation: int,
    path: Path,
    train: bool,
    tap: Tap | None = None,
    names: tuple[str, str] = ("conv", "norm"),
) -> Activation:
    """relu(norm(conv(x)) + residual), the layer that the whole network is made of.

    Args:
        x: input in any layout; computation is in its dtype, statistics in that of the parameters.
        conv: a 3x3 convolution.
        norm: None leaves the normalisation out.
        residual: None adds nothing.
        dilation: spacing of the kernel's taps in pixels.
        path: how it is carried out.
        train: normalise with the batch's statistics and update the running ones in `norm`.
        tap: sees the values after convolution and normalisation under `names`, except on the fused path, where they
            do not exist one by one.
        names: see `tap`.

    Raises:
        ValueError: training with a single pixel a channel, which has no variance (PyTorch refuses it, too).
    """
    x = x.for_dilation(dilation)
    skip = None if residual is None else residual.for_dilation(dilation).values
    spacing = dilation // x.layout
    values, dtype = x.values, x.values.dtype
    pixels = pixel_count(values)
    kernel, bias = conv.kernel[...], conv.bias[...]
    if train and norm is not None:
        _check_pixels(pixels)

    if path == "fused" and norm is not None and not train:
        # In evaluation the normalisation is a fixed affine map: folded into kernel and bias it costs nothing.
        a = norm.scale[...] * lax.rsqrt(norm.running_var[...] + EPSILON)
        kernel = kernel * per_channel(a)
        bias = (bias - norm.running_mean[...]) * a + norm.bias[...]
        norm = None
        tap = None

    convolution = fused.convolution if path == "fused" else convolve
    z = convolution(values, kernel.astype(dtype), spacing).astype(bias.dtype) + per_channel(bias)
    if tap is not None:
        tap(names[0], x.with_values(z).image())
    if norm is not None:
        z = _normalise(z, norm, pixels, train)
        if tap is not None:
            tap(names[1], x.with_values(z).image())
    if skip is not None:
        z = z + skip.astype(z.dtype)
    return x.with_values(jax.nn.relu(z).astype(dtype))


def block_fused(
    x: Activation,
    first: Conv,
    norm1: BatchNorm,
    second: Conv,
    norm2: BatchNorm,
    *,
    shortcut: Shortcut,
    dilation: int,
) -> Activation:
    """Two layers of `conv_norm_relu` in training, with the gradient of `pdrunet_jax.fused_block`.

    Args:
        x: input in any layout.
        first: the 3x3 convolution that comes first.
        norm1: its normalisation, whose running statistics are updated.
        second: the 3x3 convolution that comes second.
        norm2: its normalisation, likewise.
        shortcut: what is added before the last ReLU.
        dilation: spacing of both kernels' taps in pixels.

    Raises:
        ValueError: a single pixel a channel.
    """
    x = x.for_dilation(dilation)
    dtype, pixels = x.values.dtype, pixel_count(x.values)
    _check_pixels(pixels)
    weights = [
        LayerWeights(conv.kernel[...].astype(dtype), norm.scale[...], norm.bias[...])
        for conv, norm in ((first, norm1), (second, norm2))
    ]
    out, *batch = block(x.values, *weights, shortcut, dilation // x.layout)
    for conv, norm, (mean, var) in zip((first, second), (norm1, norm2), batch, strict=True):
        norm.track(mean + conv.bias[...], var, pixels)
    return x.with_values(out)


def _check_pixels(pixels: int) -> None:
    if pixels == 1:
        raise ValueError("batch normalisation needs more than one pixel a channel in training")


def _normalise(z: jax.Array, norm: BatchNorm, pixels: int, train: bool) -> jax.Array:
    if train:
        mean, var = moments(z)
        norm.track(mean, var, pixels)
    else:
        mean, var = norm.running_mean[...], norm.running_var[...]
    factor = per_channel(norm.scale[...] * lax.rsqrt(var + EPSILON))
    return (z - per_channel(mean)) * factor + per_channel(norm.bias[...])


def keep_masks(key: jax.Array, rate: float, shape: Sequence[int], count: int = 2) -> list[jax.Array]:
    """Random boolean masks of `shape`, true with probability 1 - `rate`: what each dropout of a step keeps."""
    return [jax.random.bernoulli(part, 1 - rate, tuple(shape)) for part in jax.random.split(key, count)]


def dropout(x: jax.Array, rate: float, keep: jax.Array) -> jax.Array:
    """Zero where `keep` (bool, the shape of `x`) is false, and scale the rest by 1 / (1 - rate)."""
    return jnp.where(keep, x / (1 - rate), 0)
