"""The branches for other platforms than the CPU, taken on the CPU: JAX is made to name another one."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.execution import Execution, run_block
from pdrunet_jax.model.fast import xla
from pdrunet_jax.model.fast.convolution import moments
from pdrunet_jax.model.layers import split_state
from pdrunet_jax.model.network import Block
from pdrunet_jax.runtime.errors import UserError

TOLERANCE = 1e-11  # of parity level 10 in float64


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not xla.on_cpu()
    return monkeypatch


def block_of(train: bool, size: tuple[int, int], execution: Execution) -> Callable[[], Any]:
    """A function that gives activations, gradients and statistics of a block at dilation 4, in float64."""
    config = ModelConfig(filters=6)
    graph, params, stats = split_state(
        Block("e2", 6, 6, config, shortcut="input", dilation=4, dtype=jnp.float64, rngs=nnx.Rngs(0))
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, 6)))

    def loss(params: Any, x: jax.Array) -> Any:
        block = nnx.merge(graph, params, stats, copy=True)
        # The plain path stays in the ordinary layout; odd sizes leave no phases, and dilation within the only one.
        out = run_block(block, execution.first_activation(x), train=train, execution=execution).image()
        return jnp.square(out - 1).mean(), (out, nnx.state(block, nnx.BatchStat))

    return lambda: jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize("size", [(16, 12), (15, 13)], ids=str)
@pytest.mark.parametrize(("train", "remat"), [(True, False), (True, True), (False, False)])
def test_the_branches_off_the_cpu_compute_the_same(
    elsewhere: pytest.MonkeyPatch, size: tuple[int, int], train: bool, remat: bool
) -> None:
    with jax.enable_x64(True):
        found = block_of(train, size, Execution.of("auto", remat=remat))()
        elsewhere.undo()
        expected = block_of(train, size, Execution("plain"))()
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(got - want).max() <= TOLERANCE * max(1.0, np.abs(want).max())


@pytest.mark.parametrize(("version", "runs"), [("cuda 12090", True), ("rocm 60200", False)])
def test_the_pallas_path_is_refused_where_it_does_not_run(
    version: str, runs: bool, elsewhere: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(client=SimpleNamespace(platform_version=version))
    elsewhere.setattr(jax, "devices", lambda: [device])
    if runs:
        assert Execution.of("pallas").path == "pallas"
    else:
        with pytest.raises(UserError, match="not on a GPU of AMD"):
            Execution.of("pallas")
    elsewhere.undo()
    with pytest.raises(UserError, match="not on a cpu"):
        Execution.of("pallas")


def test_without_the_cpus_chunks_an_activation_is_one(elsewhere: pytest.MonkeyPatch) -> None:
    x = jnp.ones((8, 4, 4, 1))
    seen: list[int] = []
    xla.map_chunks(lambda part: seen.append(len(part)) or part, x, 16)
    elsewhere.undo()
    xla.map_chunks(lambda part: seen.append(len(part)) or part, x, 16)
    assert (seen[0], set(seen[1:])) == (8, {1})


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_one_pass_over_an_activation_gives_its_variance_at_large_means(
    elsewhere: pytest.MonkeyPatch, mean: float
) -> None:
    values = np.random.default_rng(0).normal(mean, [1.0, 3.0], (4, 40, 24, 2)).astype(np.float32)
    found = [np.asarray(part) for part in jax.jit(moments)(jnp.asarray(values))]
    exact = values.astype(np.float64)
    assert found[0] == pytest.approx(exact.mean((0, 1, 2)), rel=1e-6, abs=1e-6)
    assert found[1] == pytest.approx(exact.var((0, 1, 2)), rel=1e-5)
