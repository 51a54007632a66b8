"""Level 2: each kind of layer separately, and the distribution of initial weights."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity_tests.support import torch_side
from parity_tests.support.budget import Budget
from parity_tests.support.case import Arrays, Case
from parity_tests.support.cases import DTYPES, HERE, state_of
from parity_tests.support.compare import compare_initialisation, relative
from parity_tests.support.jax_side import compiled, make_flax
from parity_tests.support.torch_side import on_torch, state_arrays
from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model import layers
from pdrunet_jax.model.execution import Execution, run_block
from pdrunet_jax.model.layers import split_state
from pdrunet_jax.model.network import BLOCKS, PDRUNet, public_name
from pdrunet_jax.model.weights import to_public
from pdrunet_torch_ref import PDRUNet as Twin

DILATIONS = (1, 2, 4, 8, 16, 32)
SIZES = {
    "plain": ((97, 61), (20, 12)),
    "polyphase": ((32, 96), (20, 12)),
    "fused": ((32, 96), (20, 12)),
    "native": ((97, 61), (20, 12)),
}


def random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def layer(
    x: jax.Array, conv: layers.Conv, norm: layers.BatchNorm | None, *, dilation: int, path: str, train: bool
) -> jax.Array:
    execution = Execution.of(path)
    inputs = execution.first_activation(x)
    out = layers.conv_norm_relu(inputs, conv, norm, None, dilation=dilation, train=train, execution=execution)
    return out.image()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", HERE)
def test_convolution_agrees_at_every_dilation(path: str, dtype: str, budget: Budget) -> None:
    for size in SIZES[path]:
        x, kernel, bias = random((2, *size, 5), dtype), random((7, 5, 3, 3), dtype, 1), random((7,), dtype, 2)
        conv = layers.Conv(5, 7, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        conv.kernel[...], conv.bias[...] = jnp.asarray(kernel.transpose(2, 3, 1, 0)), jnp.asarray(bias)

        def every(x: jax.Array, conv: layers.Conv = conv) -> dict[int, jax.Array]:
            return {d: layer(x, conv, None, dilation=d, path=path, train=False) for d in DILATIONS}

        got = compiled(every)(jnp.asarray(x))
        want = on_torch(torch_side.convolutions, x, kernel, bias, DILATIONS)
        errors = {f"dilation {d}": relative(np.asarray(got[d]), want[d]) for d in DILATIONS}
        budget.hold(2, "convolution", dtype, errors, f"{path} {size[0]}x{size[1]}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1000.0, 1.0), (0.0, 1e-4)])
def test_batch_norm_agrees_for_any_mean_and_deviation(
    mean: float, deviation: float, path: str, train: bool, dtype: str, budget: Budget
) -> None:
    compare_batch_norm(budget, mean, deviation, path, train, dtype)


def compare_batch_norm(budget: Budget, mean: float, deviation: float, path: str, train: bool, dtype: str) -> None:
    channels = 6
    x = (mean + deviation * random((3, 8, 16, channels), dtype)).astype(dtype)
    want = on_torch(torch_side.batch_norm, x, mean, deviation, train)
    norm = layers.BatchNorm(channels, dtype=jnp.dtype(dtype))
    norm.scale[...], norm.bias[...] = jnp.asarray(want["weight"]), jnp.asarray(want["bias"])
    norm.running_mean[...] = jnp.asarray(want["running_mean"])
    norm.running_var[...] = jnp.asarray(want["running_var"])
    # An identity kernel, so that the normalisation alone is compared.
    conv = layers.Conv(channels, channels, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.zeros_like(conv.kernel[...]).at[1, 1].set(jnp.eye(channels, dtype=dtype))
    conv.bias[...] = jnp.zeros_like(conv.bias[...])

    graph, state = nnx.split(norm)

    def run(x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        inner = nnx.merge(graph, state)
        out = layer(x, conv, inner, dilation=1, path=path, train=train)
        return out, (inner.running_mean[...], inner.running_var[...])

    out, (running_mean, running_var) = compiled(run)(jnp.asarray(x), state)
    # Rounding of the input limits the accuracy of both frameworks to `mean` times the rounding error.
    scale = max(1.0, abs(mean) / deviation)
    errors = {
        "output": relative(np.asarray(out), want["output"]) / scale,
        "running mean": relative(np.asarray(running_mean), want["new_running_mean"]),
        "running variance": relative(np.asarray(running_var), want["new_running_var"]) / scale,
    }
    budget.hold(2, f"batch norm, {'train' if train else 'eval'}", dtype, errors, f"{path}, {mean:g} +- {deviation:g}")


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("path", "shortcut", "norm", "dtype"),
    [
        ("plain", "input", "batch", "float64"),
        ("plain", "conv1", "batch", "float64"),
        ("plain", "input", "none", "float64"),
        ("plain", "conv1", "none", "float64"),
        ("polyphase", "input", "batch", "float64"),
        ("fused", "conv1", "batch", "float64"),
        ("fused", "input", "none", "float64"),
        ("plain", "conv1", "batch", "float32"),
        ("polyphase", "input", "batch", "float32"),
        ("fused", "input", "none", "float32"),
        *(
            ("native", *options)
            for options in (
                ("input", "batch", "float64"),
                ("conv1", "batch", "float32"),
                ("conv1", "none", "float64"),
            )
            if "native" in HERE
        ),
    ],
)
def test_every_block_agrees_on_an_input_of_its_own(
    path: str, shortcut: str, norm: str, dtype: str, train: bool, budget: Budget
) -> None:
    case = Case(shortcut=shortcut, norm=norm, path=path, dtype=dtype)
    height, width = SIZES[path][1]
    arrays = state_of(case)
    graph, params, stats = split_state(make_flax(arrays, case))
    execution = Execution.of(path)
    blocks = {name: public_name(name) for name in BLOCKS}
    inputs = {
        name: random((2, height, width, case.in_channels if name == "std_block" else case.filters), dtype, i)
        for i, name in enumerate(blocks)
    }

    def every(params: Any, stats: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        model = nnx.merge(graph, params, stats, copy=True)

        def output(name: str, x: jax.Array) -> jax.Array:
            inputs = execution.first_activation(x)
            return run_block(getattr(model, name), inputs, train=train, execution=execution).image()

        return {name: output(name, x) for name, x in inputs.items()}

    got = compiled(every)(params, stats, jax.tree.map(jnp.asarray, inputs))
    theirs = {public: inputs[name] for name, public in blocks.items()}
    want = on_torch(torch_side.blocks, case, arrays, theirs, train)
    errors = {name: relative(np.asarray(got[name]), want[public]) for name, public in blocks.items()}
    budget.hold(2, f"block, {'train' if train else 'eval'}", dtype, errors, str(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_agrees_on_an_injected_mask(dtype: str, budget: Budget) -> None:
    x, keep = random((2, 9, 7, 4), dtype), np.random.default_rng(1).random((2, 9, 7, 4)) >= 0.3
    got = layers.dropout(jnp.asarray(x), 0.3, jnp.asarray(keep))
    want = on_torch(torch_side.dropped, x, keep, 0.3)
    budget.hold(2, "dropout", dtype, {"output": relative(np.asarray(got), want)})
    # PyTorch's own dropout scales the same way: kept ones become 1 / 0.7.
    kept = torch.nn.functional.dropout(torch.ones(1000, dtype=getattr(torch, dtype)), 0.3).max().item()
    assert float(got.max() / x[keep].max()) == pytest.approx(kept, rel=1e-6)


def initial_twin() -> Arrays:
    torch.manual_seed(0)
    return {name: array for name, array in state_arrays(Twin()).items() if not name.startswith("e5.")}


@cache
def initial_model(dtype: str) -> Arrays:
    model = PDRUNet(ModelConfig(), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    return to_public(nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat), dead_block=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_initial_weights_come_from_one_distribution(dtype: str, budget: Budget) -> None:
    got, want = initial_model(dtype), initial_twin()
    compare_initialisation(budget, dtype, got, want)
    for name, array in want.items():  # scales, shifts and statistics are not random
        if ".bnorm" in name:
            np.testing.assert_array_equal(got[name], array)
