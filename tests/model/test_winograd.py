"""Winograd's convolutions against direct ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax.model.fast import convolution as fused
from pdrunet_jax.model.fast import winograd
from pdrunet_jax.model.fast.convolution import convolve
from pdrunet_jax.model.fast.xla import map_into


def operands(shape: tuple[int, ...], inputs: int, outputs: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    one, two = jax.random.split(jax.random.key(0))
    x = jax.random.normal(one, (*shape, inputs), dtype)
    return x, jax.random.normal(two, (3, 3, inputs, outputs), dtype) / (3 * inputs**0.5)


@pytest.mark.parametrize("strip", [64, 512, 8192])
@pytest.mark.parametrize("shape", [(1, 64, 48), (6, 8, 8), (2, 34, 26), (3, 2, 2)])
def test_it_is_the_direct_convolution(shape: tuple[int, int, int], strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "STRIP_PIXELS", strip)
    with jax.enable_x64(True):
        x, kernel = operands(shape, 5, 7, "float64")
        got = jax.jit(lambda x, kernel: winograd.winograd_convolve(x, kernel))(x, kernel)
        np.testing.assert_allclose(got, convolve(x, kernel), rtol=0, atol=1e-13)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_in_float32_it_is_about_as_exact_as_the_direct_convolution(mean: float) -> None:
    x, kernel = operands((1, 64, 64), 40, 40, "float32")
    x = x + mean
    with jax.enable_x64(True):
        exact = np.asarray(convolve(x.astype("float64"), kernel.astype("float64")))
    far = [np.sqrt(np.square(np.asarray(f(x, kernel)) - exact).mean()) for f in (winograd.winograd_convolve, convolve)]
    assert far[0] < 2 * far[1]


def test_it_is_for_dense_kernels_of_many_channels_on_even_sizes() -> None:
    x, kernel = operands((4, 64, 64), 40, 40, "float32")
    assert winograd.is_faster(x, kernel)
    assert not winograd.is_faster(x.astype(jnp.bfloat16), kernel)
    assert not winograd.is_faster(x[:, 1:], kernel)
    assert not winograd.is_faster(x[..., :8], kernel[:, :, :8])
    assert not winograd.is_faster(x[:1], kernel)
    assert not winograd.is_faster(x, kernel[1:2, 1:2])


def test_what_uses_it_has_the_gradients_of_the_direct_convolution() -> None:
    x, kernel = operands((4, 64, 64), 32, 32, "float32")
    assert winograd.is_faster(x, kernel)
    g = jnp.cos(jnp.arange(x.size, dtype="float32")).reshape(x.shape)
    got, back = jax.vjp(lambda x, kernel: fused.convolution(x, kernel, 1), x, kernel)
    want, direct = jax.vjp(convolve, x, kernel)
    for one, other in zip((got, *back(g)), (want, *direct(g)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    ("size", "rows"), [((64, 64), 64), ((256, 256), 32), ((1022, 1000), 14), ((254, 254), 254), ((1006, 1006), 2)]
)
def test_strips_come_close_to_what_the_caches_hold(size: tuple[int, int], rows: int) -> None:
    assert winograd.strip_rows(*size) == rows


def test_results_are_collected_in_order() -> None:
    x = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(map_into(lambda i: 2 * x[i], 4, x), 2 * x)
