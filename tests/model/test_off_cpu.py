"""The branches for other platforms than the CPU, taken on the CPU: JAX is made to name another one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.fast import xla
from pdrunet_jax.model.fast.convolution import moments
from pdrunet_jax.model.layers import split_state
from pdrunet_jax.model.network import PDRUNet

TOLERANCE = 1e-11  # of parity level 10 in float64


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not xla.on_cpu()
    return monkeypatch


def computed(images: jax.Array, *, train: bool, execution: Execution) -> dict[str, np.ndarray]:
    """Logits, gradients and statistics of a small network, in float64."""
    config = ModelConfig(filters=6, dropout=0.0)
    graph, params, stats = split_state(PDRUNet(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))

    @jax.jit
    def run(params, stats):
        def loss(params):
            network = nnx.merge(graph, params, stats, copy=True)
            logits = network(images, train=train, execution=execution)
            return jnp.square(logits - 1).mean(), (logits, nnx.state(network, nnx.BatchStat))

        (_, kept), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return kept, gradients

    leaves = jax.tree_util.tree_leaves_with_path(run(params, stats))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("size", [(64, 32), (33, 41)], ids=str)
@pytest.mark.parametrize(("train", "remat"), [(True, False), (True, True), (False, False)])
def test_the_branches_off_the_cpu_compute_the_same(
    elsewhere: pytest.MonkeyPatch, size: tuple[int, int], train: bool, remat: bool
) -> None:
    with jax.enable_x64(True):
        images = jnp.asarray(np.random.default_rng(0).random((2, *size, 1)))
        found = computed(images, train=train, execution=Execution.of("auto", remat=remat))
        elsewhere.undo()
        expected = computed(images, train=train, execution=Execution("plain"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= TOLERANCE * max(1.0, np.abs(value).max()), name


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_one_pass_over_an_activation_gives_its_variance_at_large_means(
    elsewhere: pytest.MonkeyPatch, mean: float
) -> None:
    values = np.random.default_rng(0).normal(mean, [1.0, 3.0], (4, 40, 24, 2)).astype(np.float32)
    found = [np.asarray(part) for part in jax.jit(moments)(jnp.asarray(values))]
    exact = values.astype(np.float64)
    assert found[0] == pytest.approx(exact.mean((0, 1, 2)), rel=1e-6, abs=1e-6)
    assert found[1] == pytest.approx(exact.var((0, 1, 2)), rel=1e-5)
