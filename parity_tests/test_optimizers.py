"""Level 7: updates of every optimizer, learning rates of every schedule, optimizer state in both directions."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from parity_tests.support import jax_training, torch_training
from parity_tests.support.budget import Budget
from parity_tests.support.case import Arrays, Case
from parity_tests.support.cases import DTYPES, state_of
from parity_tests.support.compare import compare_updates, largest
from parity_tests.support.torch_side import make_twin, on_torch, state_arrays
from pdrunet_jax.config import OptimConfig
from pdrunet_jax.convert import training as training_state
from pdrunet_jax.model.weights import from_public, name_table
from pdrunet_jax.train.optim import make_optimizer, make_schedule
from pdrunet_torch_ref.training_state import make_optimizer as make_torch_optimizer

UPDATES = 100

OPTIMIZERS = {
    "adam": OptimConfig(),
    "adam with L2": OptimConfig(weight_decay=0.01, b1=0.8, b2=0.99, eps=1e-6, learning_rate=3e-3),
    "adamw": OptimConfig(name="adamw", weight_decay=0.01),
    "adamw, strong decay": OptimConfig(name="adamw", weight_decay=0.3, learning_rate=1e-2),
    "sgd": OptimConfig(name="sgd", learning_rate=0.05, weight_decay=1e-3),
    "sgd, plain momentum": OptimConfig(name="sgd", learning_rate=0.05, nesterov=False),
    "sgd without momentum": OptimConfig(name="sgd", learning_rate=0.05, momentum=0.0),
    "adam, clipped": OptimConfig(clip_norm=1.0),
}

SHAPES = {"kernel": (3, 3, 4, 4), "bias": (4,), "scale": (5,)}


def gradients(dtype: str) -> list[Arrays]:
    """Gradients of very different magnitudes, as in training."""
    rng = np.random.default_rng(0)
    sizes = {name: 10.0 ** rng.uniform(-6, 1, shape) for name, shape in SHAPES.items()}
    return [
        {name: (rng.standard_normal(shape) * sizes[name]).astype(dtype) for name, shape in SHAPES.items()}
        for _ in range(UPDATES)
    ]


def parameters(dtype: str) -> Arrays:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def updates_in_jax(optimizer: optax.GradientTransformation, dtype: str, others: Sequence[Arrays] = ()) -> list[Arrays]:
    return jax_training.updates(optimizer, parameters(dtype), gradients(dtype), others)


def updates_in_torch(config: OptimConfig, dtype: str) -> list[Arrays]:
    make = partial(make_torch_optimizer, settings=dataclasses.asdict(config))
    return on_torch(torch_training.updates, make, parameters(dtype), gradients(dtype), config.clip_norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_updates_agree(name: str, dtype: str, budget: Budget) -> None:
    config = OPTIMIZERS[name]
    want = updates_in_torch(config, dtype)
    # In float32 the rounding errors of the parameters accumulate, differently in each framework.
    got = updates_in_jax(make_optimizer(config, UPDATES), dtype, want if dtype == "float32" else ())
    compare_updates(budget, dtype, got, want, name)


SCHEDULES = {
    "constant": OptimConfig(learning_rate=1.0),
    "constant after warm-up": OptimConfig(learning_rate=1.0, warmup_steps=10),
    "cosine": OptimConfig(learning_rate=1.0, schedule="cosine"),
    "cosine after warm-up": OptimConfig(learning_rate=1.0, schedule="cosine", warmup_steps=20, final_fraction=0.01),
    "polynomial": OptimConfig(learning_rate=1.0, schedule="polynomial", power=0.9),
    "onecycle": OptimConfig(learning_rate=1.0, schedule="onecycle"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_those_of_pytorchs_schedulers(name: str, budget: Budget) -> None:
    config = SCHEDULES[name]
    schedule = make_schedule(config, UPDATES)
    got = [float(schedule(jnp.asarray(step, jnp.int32))) for step in range(UPDATES)]
    want = on_torch(
        torch_training.learning_rates,
        config.schedule,
        UPDATES,
        config.warmup_steps,
        config.final_fraction,
        config.power,
    )
    errors = {f"step {step}": abs(ours - theirs) for step, (ours, theirs) in enumerate(zip(got, want, strict=True))}
    budget.hold(7, "learning rate", "float32", errors, name)


def trained(case: Case, config: OptimConfig) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return the twin and its optimizer after three updates."""
    twin = make_twin(case)
    optimizer = make_torch_optimizer(twin, dataclasses.asdict(config))
    for _ in range(3):
        optimizer.zero_grad()
        twin(torch.rand(1, case.in_channels, 8, 8, dtype=getattr(torch, case.dtype))).square().mean().backward()
        optimizer.step()
    return twin, optimizer


STATES = ("adam", "adamw", "sgd", "sgd without momentum")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STATES)
def test_optimizer_state_survives_torch_to_jax_to_torch(name: str, dtype: str, budget: Budget) -> None:
    case, config = Case(dtype=dtype, outputs=2, in_channels=3), OPTIMIZERS[name]
    twin, optimizer = trained(case, config)
    names = [key for key, _ in twin.named_parameters()]
    state = optimizer.state_dict()["state"]
    before = {
        names[index]: {key: value.numpy() for key, value in mine.items() if value is not None}
        for index, mine in state.items()
    }
    before = {key: mine for key, mine in before.items() if mine}
    rows = [row for row in name_table(case.in_channels, case.outputs, case.filters, case.norm) if row.parameter]
    blank = make_optimizer(config, 10).init(from_public(state_arrays(twin), "the twin").params)
    converted = training_state.from_torch(config, rows, blank, before, 3)
    assert training_state.updates_done(converted) == 3
    assert jax.tree.structure(converted) == jax.tree.structure(blank)
    after = training_state.to_torch(config, rows, converted)
    assert after.keys() == before.keys()
    errors = {}
    for key, mine in before.items():
        assert after[key].keys() == mine.keys()
        errors |= {f"{what} of {key}": largest(after[key][what], array) for what, array in mine.items()}
    budget.hold(7, "state, torch -> JAX -> torch", dtype, errors or {"step": 0.0}, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STATES)
def test_optimizer_state_survives_jax_to_torch_to_jax(name: str, dtype: str, budget: Budget) -> None:
    case, config = Case(dtype=dtype), OPTIMIZERS[name]
    params = jax.tree.map(jnp.asarray, from_public(state_of(case), "the twin").params)
    optimizer = make_optimizer(config, 10)
    blank = state = optimizer.init(params)
    for number in range(3):
        gradient = jax.tree.map(partial(_wave, number), params)
        _, state = optimizer.update(gradient, state, params)
    rows = [row for row in name_table(1, 1, case.filters, case.norm) if row.parameter]
    back = training_state.from_torch(config, rows, blank, training_state.to_torch(config, rows, state), 3)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    errors = {
        jax.tree_util.keystr(path): largest(np.asarray(leaf), np.asarray(same))
        for (path, leaf), same in zip(jax.tree_util.tree_leaves_with_path(back), jax.tree.leaves(state), strict=True)
    }
    budget.hold(7, "state, JAX -> torch -> JAX", dtype, errors, name)


def _wave(number: int, leaf: jax.Array) -> jax.Array:
    return jnp.sin(leaf * (number + 1))
