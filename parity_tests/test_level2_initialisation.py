"""Level 2: PyTorch's default initial weights, as a distribution, since the random streams cannot agree."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity_tests.budget import Budget
from parity_tests.case import Arrays
from parity_tests.cases import DTYPES
from parity_tests.compare import compare_initialisation
from parity_tests.torch_side import state_arrays
from pdrunet_jax.model import PDRUNet
from pdrunet_jax.weights import to_public
from pdrunet_torch_ref import PDRUNet as Twin


def initial_twin() -> Arrays:
    torch.manual_seed(0)
    return {name: array for name, array in state_arrays(Twin()).items() if not name.startswith("e5.")}


@cache
def initial_model(dtype: str) -> Arrays:
    model = PDRUNet(param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    return to_public(nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat), dead_block=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_initial_weights_come_from_one_distribution(dtype: str, budget: Budget) -> None:
    got, want = initial_model(dtype), initial_twin()
    compare_initialisation(budget, dtype, got, want)
    for name, array in want.items():  # what is not random is equal: scales, shifts, statistics
        if ".bnorm" in name:
            np.testing.assert_array_equal(got[name], array)
