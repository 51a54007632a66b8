import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.fast.convolution import (
    channel_sum,
    channel_sum_of,
    convolution_gradients,
    convolve,
    filter_gradient,
    moments,
    pad_rows,
    product_filter_gradient,
)
from pdrunet_jax.model.fast.phases import finest_phases, to_phases
from pdrunet_jax.model.fast.xla import force_materialize
from pdrunet_jax.model.layers import PATHS, BatchNorm
from pdrunet_jax.model.network import BLOCKS, PDRUNet


def build(**options) -> PDRUNet:
    build_options = {name: options.pop(name) for name in ("dtype", "param_dtype", "size", "rngs") if name in options}
    return PDRUNet(ModelConfig(**{"filters": 4} | options), **{"rngs": nnx.Rngs(0)} | build_options)


def run(model: PDRUNet, images: jax.Array, **options) -> jax.Array:
    """Logits, compiled: one operation after the other, compiling takes far longer."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, images: nnx.merge(graphdef, state, copy=True)(images, **options))(state, images)


def count(model: PDRUNet) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({}, 363_521), ({"outputs": 2}, 363_562), ({"outputs": 2, "norm": "none"}, 361_482)],
)
def test_parameter_counts_are_those_of_the_architecture(options: dict, parameters: int) -> None:
    assert count(build(filters=40, **options)) == parameters


@pytest.mark.parametrize("path", PATHS)
def test_any_size_keeps_its_size(path: str) -> None:
    model = build(conv=path, in_channels=3, outputs=2)
    for height, width in ((32, 64), (24, 40), (17, 5)):
        assert run(model, jnp.zeros((1, height, width, 3))).shape == (1, height, width, 2)


def test_the_receptive_field_is_633_pixels() -> None:
    # Positive kernels without normalisation let every tap through, so that what changes is what is seen.
    model = build(filters=1, norm="none", conv="plain")
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: jnp.full_like(p, 0.05 if p.ndim == 4 else 0.0), params))
    size = 701
    centre = size // 2
    image = jnp.ones((1, 1, size, 1))
    seen = jax.grad(lambda x: run(model, x)[0, 0, centre, 0])(image)[0, 0, :, 0] != 0
    first, last = np.flatnonzero(seen)[[0, -1]]
    assert last - first + 1 == 633
    assert centre - first == 316


def test_wrong_options_and_shapes_are_refused() -> None:
    for options in ({"shortcut": "none"}, {"norm": "layer"}, {"conv": "fast"}, {"init": "zeros"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(**options)
    with pytest.raises(ValueError, match=r"\(N, H, W, 1\)"):
        build()(jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="dropout_key"):
        build()(jnp.zeros((1, 8, 8, 1)), train=True)


def test_one_pixel_has_no_variance_to_train_on() -> None:
    with pytest.raises(ValueError, match="more than one pixel"):
        build(dropout=0.0)(jnp.zeros((1, 1, 1, 1)), train=True)


def test_evaluation_changes_no_state() -> None:
    model = build()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    model(jnp.ones((2, 32, 32, 1)))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), before, nnx.state(model))))


def test_every_block_is_tapped_in_order() -> None:
    names: list[str] = []
    execution = Execution("fused", tap=lambda name, value: names.append(name))
    build()(jnp.zeros((1, 32, 32, 1)), execution=execution)
    assert names == [name.replace("_", ".") if "bottleneck" in name else name for name in BLOCKS] + ["final_conv"]


def test_the_unbiased_variance_is_tracked() -> None:
    norm = BatchNorm(1, dtype=jnp.float32)
    norm.track(jnp.array([2.0]), jnp.array([3.0]), pixels=4)
    assert norm.running_mean[0] == pytest.approx(0.2)
    assert norm.running_var[0] == pytest.approx(0.9 + 0.1 * 4.0)
    assert int(norm.num_batches_tracked[...]) == 1


def test_moments_survive_a_large_mean() -> None:
    x = 1000 + jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
    assert float(moments(x)[1][0]) == pytest.approx(np.asarray(x, np.float64).var(), rel=1e-4)


@pytest.mark.parametrize("shape", [(2, 16, 16, 5), (1, 97, 61, 3), (1, 1, 1, 1), (2, 64, 48, 3)])
def test_channel_sums_are_sums(shape: tuple[int, ...]) -> None:
    x = jax.random.normal(jax.random.key(0), shape)
    np.testing.assert_allclose(channel_sum(x), np.asarray(x, np.float64).sum((0, 1, 2)), rtol=1e-5, atol=1e-4)
    got = channel_sum_of(lambda x, y: jnp.square(x - 3) * y, x, x)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(got, (np.square(exact - 3) * exact).sum((0, 1, 2)), rtol=1e-4, atol=1e-3)


def test_dropout_drops_its_share_and_only_in_training() -> None:
    model = build(dropout=0.5, filters=8)
    image = jax.random.uniform(jax.random.key(0), (1, 32, 32, 1))
    kept = build(dropout=0.0, filters=8)
    assert (run(model, image) == run(kept, image)).all()
    one, two = (run(model, image, train=True, dropout_key=jax.random.key(key)) for key in (1, 2))
    assert not (one == two).all()


PHASES = [(a, b) for a, b in itertools.product((1, 2, 8), (1, 4, 8)) if a % b == 0 or b % a == 0]


@pytest.mark.parametrize(("source", "target"), PHASES)
def test_each_pixel_goes_to_its_phase(source: int, target: int) -> None:
    x = jnp.arange(2 * 16 * 24 * 3).reshape(2, 16, 24, 3)
    phases = to_phases(to_phases(x, 1, source), source, target)
    for n, i, j in itertools.product(range(2), range(target), range(target)):
        assert (phases[(n * target + i) * target + j] == x[n, i::target, j::target]).all()
    assert (to_phases(phases, target, 1) == x).all()


FINEST = {(256, 256): 32, (96, 80): 16, (97, 61): 1, (512, 20): 4, (96, 32): 32, (64, 64): 16, (32, 16): 8, (2, 2): 1}


@pytest.mark.parametrize(("size", "phases"), FINEST.items())
def test_the_finest_phases_divide_both_sides_and_have_a_few_pixels(size: tuple[int, int], phases: int) -> None:
    assert finest_phases(*size) == phases


@pytest.mark.parametrize(("shape", "dilation"), [((2, 16, 16), 1), ((3, 7, 5), 2), ((1, 20, 12), 8)])
def test_both_gradients_of_a_convolution_are_those_of_autodiff(shape: tuple[int, int, int], dilation: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = jax.random.normal(keys[0], (*shape, 3)), jax.random.normal(keys[1], (*shape, 5))
    kernel = jax.random.normal(keys[2], (3, 3, 3, 5))
    expected = jax.vjp(lambda x, kernel: convolve(x, kernel, dilation), x, kernel)[1](g)
    for one, other in zip(convolution_gradients(x, kernel, g, dilation), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("function", [filter_gradient, product_filter_gradient])
@pytest.mark.parametrize(("shape", "dilation"), [((2, 64, 64), 1), ((3, 7, 5), 2), ((64, 4, 4), 1), ((1, 97, 61), 8)])
def test_the_filter_gradient_is_that_of_the_convolution(
    function: Callable[..., jax.Array], shape: tuple[int, int, int], dilation: int
) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = jax.random.normal(keys[0], (*shape, 3)), jax.random.normal(keys[1], (*shape, 5))
    kernel = jax.random.normal(keys[2], (3, 3, 3, 5))
    expected = jax.jit(jax.grad(lambda kernel: (convolve(x, kernel, dilation) * g).sum()))(kernel)
    actual = jax.jit(lambda x, g: function(x, pad_rows(g, dilation), dilation))(x, g)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("value", [1.5, -0.0, np.inf, np.nan])
def test_a_materialised_activation_and_its_gradient_are_what_they_were(value: float) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)).at[0, 0, 0, 0].set(value)
    out, back = jax.vjp(jax.jit(force_materialize), x)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(back(x)[0], x)
