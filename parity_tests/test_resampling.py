"""Level 2 for the baselines: halving and doubling the resolution, values and gradients, and what goes wrong there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax
from scipy.stats import ks_2samp

from parity_tests.support import torch_side
from parity_tests.support.budget import Budget
from parity_tests.support.case import Arrays
from parity_tests.support.cases import DTYPES
from parity_tests.support.compare import relative
from parity_tests.support.torch_side import on_torch
from pdrunet_jax.model import resampling
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.fast.phases import Activation
from pdrunet_jax.model.layers import Conv
from pdrunet_jax.model.resampling import TransposedConv

SHAPE = (2, 7, 10, 3)
KERNELS = {"stride": (4, 3, 3, 3), "transposed 2": (3, 4, 2, 2), "transposed 3": (3, 4, 3, 3)}
"""In PyTorch's layout: (O, I, H, W), and (I, O, H, W) for a transposed convolution."""
KINDS = ("max", "stride", "transposed 2", "transposed 3", "bilinear", "bilinear_corners")
LARGE = (15, 19)  # one more than twice the height, one less than twice the width

Resample = Callable[[jax.Array, Arrays], jax.Array]


def ours(kind: str) -> Resample:
    """The function under test; weights are in PyTorch's layout."""

    def apply(x: jax.Array, weights: Any) -> jax.Array:
        if kind == "max":
            return resampling.max_pool(x)
        if kind == "stride":
            conv = Conv(3, 4, dtype=x.dtype, rngs=nnx.Rngs(0))
            conv.kernel[...], conv.bias[...] = weights["weight"].transpose(2, 3, 1, 0), weights["bias"]
            return resampling.down(conv, Activation.of(x, 1), "down", Execution()).values
        if kind.startswith("transposed"):
            conv = TransposedConv(3, 4, int(kind[-1]), dtype=x.dtype, rngs=nnx.Rngs(0))
            conv.kernel[...], conv.bias[...] = weights["weight"].transpose(2, 3, 0, 1), weights["bias"]
            return conv(x)
        return resampling.resize_bilinear(x, LARGE, corners=kind == "bilinear_corners")

    return apply


def inputs(kind: str, dtype: str) -> tuple[np.ndarray, Arrays]:
    rng = np.random.default_rng(0)
    # After a ReLU, many pixels of a square are equal: zero.
    x = np.maximum(rng.standard_normal(SHAPE), 0) if kind == "max" else rng.standard_normal(SHAPE)
    shape = KERNELS.get(kind)
    weights = {"weight": rng.standard_normal(shape), "bias": rng.standard_normal(4)} if shape else {}
    return x.astype(dtype), {name: array.astype(dtype) for name, array in weights.items()}


def compare(budget: Budget, kind: str, dtype: str, function: Resample) -> None:
    """Compare values and gradients with PyTorch's."""
    x, weights = inputs(kind, dtype)
    run = jax.jit(lambda x, weights: jax.vjp(function, x, weights)[0])
    output = np.asarray(run(x, weights))
    g = np.random.default_rng(1).standard_normal(output.shape).astype(dtype)
    d_x, d_weights = jax.jit(lambda x, weights, g: jax.vjp(function, x, weights)[1](g))(x, weights, g)
    got = {"output": output, "x": np.asarray(d_x), **{name: np.asarray(array) for name, array in d_weights.items()}}
    whole = g if output.shape == shape_of(kind) else None  # a wrong shape has no gradient to compare
    want = on_torch(torch_side.resampled, kind.split()[0], x, weights, LARGE, whole)
    budget.hold(2, "resampling", dtype, {name: relative(got[name], array) for name, array in want.items()}, kind)


def shape_of(kind: str) -> tuple[int, ...]:
    n, h, w, c = SHAPE
    if kind == "max":
        return n, h // 2, w // 2, c
    if kind == "stride":
        return n, (h + 1) // 2, (w + 1) // 2, 4
    return (n, 2 * h, 2 * w, 4) if kind.startswith("transposed") else (n, *LARGE, c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_resampling_agrees_in_value_and_gradient(kind: str, dtype: str, budget: Budget) -> None:
    compare(budget, kind, dtype, ours(kind))


@pytest.mark.parametrize(("inputs", "outputs", "size"), [(64, 32, 2), (64, 32, 3)])
def test_initial_weights_of_a_transposed_convolution(
    inputs: int, outputs: int, size: int, budget: Budget, caught: Any
) -> None:
    def scaled(ours: bool, fan: int) -> np.ndarray:
        if ours:
            layer = TransposedConv(inputs, outputs, size, dtype=jnp.float64, rngs=nnx.Rngs(0))
            values = np.asarray(layer.kernel[...])
        else:
            torch.manual_seed(0)
            extra = size - 2
            twin = torch.nn.ConvTranspose2d(inputs, outputs, size, stride=2, padding=extra, output_padding=extra)
            values = twin.weight.detach().double().numpy()
        return values.ravel() * (fan * size**2) ** 0.5

    def same(budget: Budget, fan: int) -> None:
        distance = float(ks_2samp(scaled(True, outputs), scaled(False, fan)).statistic)
        budget.hold(2, "initial kernels of transposed convolutions", "float64", {"weight": distance})

    same(budget, outputs)
    caught(same, inputs)


def transposed_by(change: Callable[[jax.Array, jax.Array], jax.Array]) -> Resample:
    def apply(x: jax.Array, weights: Any) -> jax.Array:
        kernel = jnp.asarray(weights["weight"]).transpose(2, 3, 0, 1)
        return change(x, kernel) + jnp.asarray(weights["bias"]).reshape(1, 1, 1, -1)

    return apply


def test_kernel_of_a_transposed_convolution_not_flipped(caught: Any) -> None:
    def change(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return resampling.transposed_convolve(x, kernel[::-1, ::-1])

    assert "first output" in caught(compare, "transposed 2", "float32", transposed_by(change))


def test_padding_of_a_transposed_convolution_as_jax_has_it(caught: Any) -> None:
    def change(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "SAME", dimension_numbers=resampling.DIMENSIONS)

    assert "first output" in caught(compare, "transposed 3", "float32", transposed_by(change))


def test_padding_of_a_strided_convolution_as_jax_has_it(caught: Any) -> None:
    """ "SAME" pads an even side by 0 before and 1 after, PyTorch by 1 and 1."""

    def apply(x: jax.Array, weights: Any) -> jax.Array:
        kernel = jnp.asarray(weights["weight"]).transpose(2, 3, 1, 0)
        y = lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=resampling.DIMENSIONS)
        return y + jnp.asarray(weights["bias"]).reshape(1, 1, 1, -1)

    assert "first output" in caught(compare, "stride", "float32", apply)


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_corners"])
def test_corners_aligned_on_one_side_only(kind: str, caught: Any) -> None:
    def apply(x: jax.Array, weights: Any) -> jax.Array:
        return resampling.resize_bilinear(x, LARGE, corners=kind == "bilinear")

    assert "first output" in caught(compare, kind, "float32", apply)


def test_gradient_of_equal_pixels_shared(caught: Any) -> None:
    """Values agree; automatic differentiation of a maximum gives equal pixels equal parts."""

    def apply(x: jax.Array, weights: Any) -> jax.Array:
        n, h, w, c = x.shape
        return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))

    assert "first x" in caught(compare, "max", "float32", apply)
