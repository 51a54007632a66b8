"""Level 10: the Pallas kernels, interpreted, against the plain path. No GPU is needed, and none is tested."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parity_tests.support.budget import Budget
from parity_tests.support.case import Arrays, Case
from parity_tests.support.compare import compare_paths
from parity_tests.test_execution_paths import compute_outcome, outcome
from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.execution import Execution, run_block
from pdrunet_jax.model.fast import pallas
from pdrunet_jax.model.fast.convolution import convolve
from pdrunet_jax.model.fast.pallas_tiles import Pixels
from pdrunet_jax.model.layers import split_state
from pdrunet_jax.model.network import Block

ODD = Case(shape=(1, 13, 18))  # no multiple of a dilation, nor of a tile


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pallas, "INTERPRET", True)
    monkeypatch.setattr(pallas, "PROGRAMS", 3)  # so that a program has several tiles
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles in half the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(len(shape) + shape[0]).standard_normal(shape)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Operation by operation: as one program, the interpreted kernels of a network compile for minutes."""
    return function


@pytest.mark.parametrize(
    ("case", "train"), [(ODD, True), (ODD.replace(shortcut="conv1", outputs=2, in_channels=3), False)], ids=str
)
def test_the_kernels_agree_with_the_plain_path(case: Case, train: bool, budget: Budget) -> None:
    got = compute_outcome(case.replace(path="pallas"), train=train, run=one_by_one)
    compare_paths(budget, "convolution path", case.dtype, case, got, outcome(case, train=train), f"pallas {case}")


def block_outcome(path: str, size: tuple[int, int], *, remat: bool = False, **options: Any) -> Arrays:
    """Gradients, new buffers and, as logits, activations of a block at dilation 4 in training, in float64."""
    config = ModelConfig(**options)
    filters, shortcut = config.filters, config.shortcut
    block = Block("e2", filters, filters, config, shortcut=shortcut, dilation=4, dtype=jnp.float64, rngs=nnx.Rngs(0))
    graph, params, stats = split_state(block)
    x = jnp.asarray(random((2, *size, config.filters)))
    execution = Execution.of(path, remat=remat)

    def loss(params: Any, x: jax.Array) -> Any:
        inner = nnx.merge(graph, params, stats, copy=True)
        out = run_block(inner, execution.first_activation(x), train=True, execution=execution).image()
        return jnp.square(out - 1).sum(), (out, nnx.state(inner, nnx.BatchStat))

    (_, (out, buffers)), (d_params, d_x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    found = {"logits": out, "input": d_x}
    for name, leaf in [*nnx.to_flat_state(d_params), *nnx.to_flat_state(buffers)]:
        found[".".join(("e2", *map(str, name))).replace("kernel", "weight").replace("scale", "weight")] = leaf[...]
    return {name: np.asarray(array) for name, array in found.items()}


@pytest.mark.parametrize(
    ("size", "options"),
    [
        # More channels than a program of the gradient kernel takes.
        ((9, 14), {"filters": 20, "shortcut": "conv1", "remat": True}),
        ((9, 14), {"filters": 6, "norm": "none"}),
    ],
    ids=str,
)
def test_a_block_of_kernels_has_the_gradients_of_the_plain_one(
    size: tuple[int, int], options: dict[str, Any], budget: Budget
) -> None:
    case = Case(norm=options.get("norm", "batch"))
    got, want = block_outcome("pallas", size, **options), block_outcome("plain", size, **options)
    compare_paths(budget, "convolution path", "float64", case, got, want, f"pallas block {size} {options}")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 2e-2)])
def test_sums_are_those_of_the_stored_values_at_large_means(dtype: str, tolerance: float) -> None:
    x, kernel = (jnp.asarray(random(shape), dtype) for shape in ((2, 9, 21, 5), (3, 3, 5, 7)))
    x = x + 1000
    z, sums = pallas.forward(x, kernel, 2, sums=True)
    assert sums is not None
    mean, var = pallas.moments(sums, z.size // 7)
    exact = np.asarray(z, np.float64)
    assert np.abs(exact - np.asarray(convolve(x, kernel, 2), np.float64)).max() <= tolerance * np.abs(exact).max()
    assert np.asarray(mean) == pytest.approx(exact.mean((0, 1, 2)), rel=1e-5)
    assert np.asarray(var) == pytest.approx(exact.var((0, 1, 2)), rel=1e-5)


@pytest.mark.parametrize("fault", ["padding", "tap"])
def test_a_fault_in_a_kernel_is_caught(fault: str, caught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Pixels.shifted

    def shifted(self: Any, rows: Any, columns: Any) -> Any:
        if fault == "tap":
            return original(self, rows, -columns)
        there = original(self, rows, columns)  # wraps around instead of reading zeros
        return there._replace(row=there.row % self.height, column=there.column % self.width, inside=self.inside)

    x, kernel = (jnp.asarray(random(shape)) for shape in ((1, 5, 6, 4), (3, 3, 4, 4)))

    def outcome(convolution: Callable[..., jax.Array]) -> Arrays:
        z, pull = jax.vjp(lambda x, kernel: convolution(x, kernel, 2), x, kernel)
        return dict(zip(("logits", "input", "weight"), map(np.asarray, (z, *pull(z))), strict=True))

    monkeypatch.setattr(Pixels, "shifted", shifted)
    jax.clear_caches()
    got = outcome(pallas.convolution)
    jax.clear_caches()
    assert "level 10" in caught(compare_paths, "convolution path", "float64", Case(), got, outcome(convolve), fault)
    del got["logits"]
    wrong = {name: np.abs(got[name] - array).max() for name, array in outcome(convolve).items() if name in got}
    assert min(wrong.values()) > 0.1, wrong
