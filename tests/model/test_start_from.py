"""Training that starts from trained weights."""

import jax
import numpy as np
import pytest
from flax import nnx

from pdrunet_jax.model import load as loading
from pdrunet_jax.runtime.errors import UserError
from tests.support import tiny
from tests.support.tiny import brightness_model, save_model


def network(**options):
    return tiny.network(1, filters=2, dropout=0.1, **options)


def arrays(model):
    return jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))


def test_every_array_is_that_of_the_weights(tmp_path):
    trained, model = network(), network()
    for leaf in nnx.iter_graph(trained):
        if isinstance(leaf[1], nnx.Param | nnx.BatchStat):
            leaf[1].set_value(leaf[1][...] + 1)
    loading.start_from(model, save_model(trained, tmp_path / "w.safetensors", filters=2))
    for found, expected in zip(arrays(model), arrays(trained), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_another_network_is_refused_with_each_option_that_differs(tmp_path):
    weights = save_model(brightness_model(3), tmp_path / "w.safetensors")
    with pytest.raises(UserError) as refused:
        loading.start_from(network(shortcut="conv1"), weights)
    for words in ("--model.outputs is 1, there it is 3", "--model.filters is 2, there it is 1", "--model.shortcut"):
        assert words in str(refused.value)
