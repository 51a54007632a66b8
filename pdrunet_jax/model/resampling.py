"""Halve and double the resolution as PyTorch does: pooling, strided and transposed convolution, bilinear resizing."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.fast.convolution import per_channel
from pdrunet_jax.model.fast.phases import ROWS, Activation
from pdrunet_jax.model.layers import BatchNorm, Conv, batch_norm, uniform

if TYPE_CHECKING:
    from pdrunet_jax.model.execution import Execution

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class TransposedConv(nnx.Module):
    """torch.nn.ConvTranspose2d with stride 2, which doubles the resolution.

    A kernel of 2 pixels has no padding; one of 3 has a padding of 1 and an output padding of 1.

    Attributes:
        kernel: (size, size, inputs, outputs), in PyTorch's orientation: not flipped.
        bias: (outputs,).
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        # PyTorch takes the second axis of its weight (inputs, outputs, size, size) for the inputs.
        bound = (outputs * size * size) ** -0.5
        self.kernel = nnx.Param(uniform(rngs, (size, size, inputs, outputs), bound, dtype))
        self.bias = nnx.Param(uniform(rngs, (outputs,), bound, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (N, H, W, inputs) to (N, 2H, 2W, outputs), in the parameters' dtype."""
        kernel, bias = self.kernel[...], self.bias[...]
        return transposed_convolve(x, kernel.astype(x.dtype)).astype(bias.dtype) + per_channel(bias)


class Up(nnx.Module):
    """Double the resolution, with other channels.

    Attributes:
        conv: a transposed convolution, or the 1x1 convolution after bilinear resizing.
        bnorm: normalisation, followed by ReLU; None for neither.
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        config: ModelConfig,
        *,
        size: int,
        activated: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.name, self.method, self.activated = name, config.up, activated
        self.conv: Any
        if config.up == "transposed":
            self.conv = TransposedConv(inputs, outputs, size, dtype=dtype, rngs=rngs)
        else:
            self.conv = Conv(inputs, outputs, size=1, init=config.init, dtype=dtype, rngs=rngs)
        self.bnorm = BatchNorm(outputs, dtype=dtype) if activated and config.norm == "batch" else None

    def __call__(self, x: Activation, size: tuple[int, int], *, train: bool, execution: "Execution") -> Activation:
        """Map `x` to (height, width) `size`, which is twice its own or, where that was odd, one more."""
        values = x.image()
        dtype, tap = values.dtype, execution.tap
        if self.method == "transposed":
            z = self.conv(values)
        else:
            kernel, bias = self.conv.kernel[...], self.conv.bias[...]
            double = 2 * values.shape[1], 2 * values.shape[2]
            large = resize_bilinear(values, double, corners=self.method == "bilinear_corners")
            z = (large @ kernel[0, 0].astype(dtype)).astype(bias.dtype) + per_channel(bias)
        if tap is not None:
            tap(f"{self.name}.conv", z)
        if self.bnorm is not None:
            z = batch_norm(z, self.bnorm, train)
            if tap is not None:
                tap(f"{self.name}.bnorm", z)
        z = jax.nn.relu(z) if self.activated else z
        return Activation.of(match(z.astype(dtype), size), x.limit)


def down(conv: Conv | None, x: Activation, name: str, execution: "Execution") -> Activation:
    """Halve the resolution of `x` by `conv`, with stride 2, or by the maximum over 2x2 pixels if that is None."""
    if conv is None and x.phases == ROWS:
        return x.with_values(max_pool(x.values, 3))
    values = x.image()
    if conv is None:
        return Activation.of(max_pool(values), x.limit)
    bias = conv.bias[...]
    z = lax.conv_general_dilated(
        values, conv.kernel[...].astype(values.dtype), (2, 2), ((1, 1), (1, 1)), dimension_numbers=DIMENSIONS
    )
    z = z.astype(bias.dtype) + per_channel(bias)
    if execution.tap is not None:
        execution.tap(name, z)
    return Activation.of(z.astype(values.dtype), x.limit)


def transposed_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution with stride 2 of `x` (N, H, W, C) and a kernel (s, s, C, K), s = 2 or 3: (N, 2H, 2W, K).

    It is the gradient of a strided convolution: the input with zeros between its pixels, and the kernel flipped.
    PyTorch counts padding from the strided convolution's side, so that s = 3 is padded by 1 before, and by 2 after,
    where its output padding of 1 asks for one more pixel.
    """
    size = kernel.shape[0]
    padding = (1, 1) if size == 2 else (1, 2)
    return lax.conv_general_dilated(
        x, jnp.flip(kernel, (0, 1)), (1, 1), (padding, padding), lhs_dilation=(2, 2), dimension_numbers=DIMENSIONS
    )


def resize_bilinear(x: jax.Array, size: tuple[int, int], *, corners: bool) -> jax.Array:
    """torch.nn.functional.interpolate(mode="bilinear") of `x` (N, H, W, C) to (height, width), without antialiasing.

    `corners` is its align_corners: the centres of the corner pixels stay where they are. Otherwise the outer edges do.
    """
    rows, columns = (
        jnp.asarray(_weights(have, want, corners), x.dtype) for have, want in zip(x.shape[1:3], size, strict=True)
    )
    x = jnp.einsum("ph,nhwc->npwc", rows, x)
    return jnp.einsum("qw,npwc->npqc", columns, x)


def _weights(source: int, target: int, corners: bool) -> np.ndarray:
    """Interpolation weights (target, source), float64."""
    place = np.arange(target, dtype=np.float64)
    if corners:
        place = place * ((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        place = np.maximum((place + 0.5) * (source / target) - 0.5, 0)
    first = np.minimum(place.astype(np.int64), source - 1)
    second = np.minimum(first + 1, source - 1)
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target), first), 1 - (place - first))
    np.add.at(weights, (np.arange(target), second), place - first)
    return weights


def match(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Cut `x` (N, H, W, C) at the bottom and on the right to (height, width), or pad it there with zeros."""
    height, width = size
    x = x[:, :height, :width]
    return jnp.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)))


def _quarters(x: jax.Array, axis: int) -> list[jax.Array]:
    """The pixels of each 2x2 square in row order, without an odd last row or column. `axis` is the axis of columns."""
    quarters = []
    for i in range(2):
        rows = x[:, i : x.shape[1] // 2 * 2 : 2]
        quarters += [lax.slice_in_dim(rows, j, x.shape[axis] // 2 * 2, 2, axis) for j in range(2)]
    return quarters


def _max_pool(x: jax.Array, axis: int = 2) -> jax.Array:
    a, b, c, d = _quarters(x, axis)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


max_pool = jax.custom_vjp(_max_pool, nondiff_argnums=(1,))
max_pool.__doc__ = """Maximum over squares of 2x2 pixels of `x` (N, H, W, C): (N, H // 2, W // 2, C).

`axis` is the axis of columns: 2 by default, 3 for `x` (N, H, C, W). As in PyTorch, the gradient goes to the first of
several equal values, and an odd last row or column counts for nothing.
"""


def _max_pool_gradient(axis: int, x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    most, free, parts = _max_pool(x, axis), jnp.ones(g.shape, bool), []
    for quarter in _quarters(x, axis):
        first = free & (quarter == most)
        parts.append(jnp.where(first, g, 0))
        free &= ~first
    shape = list(g.shape)
    shape[axis] *= 2
    rows = [jnp.stack(pair, axis + 1).reshape(shape) for pair in (parts[:2], parts[2:])]
    shape[1] *= 2
    whole = jnp.stack(rows, 2).reshape(shape)
    left = [(0, have - got) for have, got in zip(x.shape, shape, strict=True)]
    return (jnp.pad(whole, left),)


max_pool.defvjp(lambda x, axis=2: (_max_pool(x, axis), x), _max_pool_gradient)
