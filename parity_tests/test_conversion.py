"""Level 1: the name table is a bijection, and conversion changes no bit."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity_tests.support.budget import Budget
from parity_tests.support.case import Arrays, Case
from parity_tests.support.cases import DTYPES
from parity_tests.support.compare import largest, same_names
from parity_tests.support.jax_side import make_flax
from parity_tests.support.torch_side import make_twin, state_arrays
from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.build import build
from pdrunet_jax.model.files import read_weights, write_pth, write_safetensors
from pdrunet_jax.model.layers import split_state
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.weights import Entry, dead_entries, from_public, name_table, to_public
from pdrunet_torch_ref import TWINS
from pdrunet_torch_ref import PDRUNet as Twin

CASES = [
    Case(shortcut=shortcut, norm=norm, in_channels=channels, outputs=outputs, filters=5)
    for shortcut in ("input", "conv1")
    for norm in ("batch", "none")
    for channels in (1, 3)
    for outputs in (1, 2, 5)
]
CASES += [
    Case(network=network, norm=norm, filters=4, outputs=2, down=down, up=up, depth=depth)
    for network in ("unet", "fusionnet")
    for norm, down, up, depth in (
        ("batch", "max", "transposed", 3), ("none", "stride", "bilinear", 2), ("batch", "stride", "bilinear_corners", 1)
    )
]  # fmt: skip


def live(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if not name.startswith("e5.")}


def differences(got: Arrays, want: Arrays) -> dict[str, float]:
    same_names(got, want, "arrays")
    return {name: largest(got[name], array) for name, array in want.items()}


def table(case: Case) -> tuple[Entry, ...]:
    options = {key: value for key, value in case.options.items() if key not in ("shortcut", "dropout")}
    return name_table(name=case.network, **options)


def make_model(case: Case, dtype: str = "float32") -> Network:
    config = ModelConfig(name=case.network, **case.options)
    return build(config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(7))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_table_is_a_bijection_between_the_two_networks(case: Case, budget: Budget) -> None:
    rows = table(case)
    assert len({row.public for row in rows}) == len({row.path for row in rows}) == len(rows)

    state = state_arrays(TWINS[case.network](**case.options))
    unused = dead_entries(case.filters, case.norm) if case.network == "pdrunet" else ()
    dead = {row.public: row.shape for row in unused}
    assert {name: array.shape for name, array in state.items()} == {row.public: row.shape for row in rows} | dead
    assert [name for name in state if name not in dead] == [row.public for row in rows], "the order differs"

    model = nnx.eval_shape(lambda: make_model(case))
    for kind in (nnx.Param, nnx.BatchStat):
        paths = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, kind))}
        assert paths == {row.path: row.to_flax(np.empty(row.shape)).shape for row in rows if row.variable is kind}
    found = from_public(state, "the twin").options
    assert found.pop("name", "pdrunet") == case.network
    assert found | {"up": case.up} == {key: case.options.get(key, case.up) for key in (*found, "up")}
    assert case.up.startswith(found.get("up", ""))
    budget.hold(1, "names, shapes, dtypes", "float64", dict.fromkeys(state, 0.0), str(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES[:24:5], *CASES[24:]], ids=str)
def test_torch_to_jax_to_torch_is_bit_equal(case: Case, dtype: str, budget: Budget) -> None:
    case = case.replace(dtype=dtype)
    before = state_arrays(make_twin(case))
    imported = from_public(before, "the twin")
    back = to_public(imported.params, imported.stats)
    other = TWINS[case.network](**case.options).to(getattr(torch, dtype))
    other.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()}, strict=True)
    budget.hold(1, "torch -> JAX -> torch", dtype, differences(live(state_arrays(other)), live(before)), str(case))
    assert all(not array.any() for name, array in back.items() if name.startswith("e5."))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES[3:24:10], *CASES[24:]], ids=str)
def test_jax_to_torch_to_jax_is_bit_equal(case: Case, dtype: str, budget: Budget) -> None:
    case = case.replace(dtype=dtype)
    model = make_model(case, dtype)
    _, params, stats = split_state(model)
    twin = TWINS[case.network](**case.options).to(getattr(torch, dtype))
    arrays = to_public(params, stats)
    twin.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=True)
    imported = from_public(state_arrays(twin), "the twin")
    errors = {}
    for before, after in ((params, imported.params), (stats, imported.stats)):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        flat = dict(nnx.to_flat_state(after))
        errors |= {".".join(path): largest(flat[path][...], leaf[...]) for path, leaf in nnx.to_flat_state(before)}
    budget.hold(1, "JAX -> torch -> JAX", dtype, errors, str(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_files_carry_every_bit(suffix: str, dtype: str, tmp_path: Path, budget: Budget) -> None:
    before = state_arrays(make_twin(Case(dtype=dtype)))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        write_safetensors(path, before, {})
    else:
        write_pth(path, before)
    after = read_weights(path).arrays
    budget.hold(1, "torch -> JAX -> torch", dtype, differences(after, before), suffix)


def test_parameter_counts_are_those_of_the_public_code() -> None:
    def count(arrays: Arrays) -> int:
        return sum(array.size for name, array in arrays.items() if not name.endswith(BUFFERS))

    public = state_arrays(Twin())
    assert count(public) == 392_561
    assert count(live(public)) == 363_521
    assert count(public) - count(live(public)) == 29_040
    assert count(live(state_arrays(Twin(outputs=2)))) == 363_562
    assert count(live(state_arrays(Twin(outputs=2, norm="none")))) == 361_482
    model = nnx.eval_shape(lambda: PDRUNet(ModelConfig(), rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 363_521


def test_the_count_of_batches_survives_the_change_of_its_type() -> None:
    model = make_flax(state_arrays(make_twin(Case())), Case())
    assert model.e1.bnorm1.num_batches_tracked[...].dtype == jnp.int32
    _, params, stats = split_state(model)
    count = to_public(params, stats)["e1.bnorm1.num_batches_tracked"]
    assert (count, count.dtype, count.shape) == (3, np.int64, ())


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
