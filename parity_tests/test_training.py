"""Levels 8 and 9: 50 training steps in one framework, and 25 in each with the state carried over by `convert`.

Training in float32 is chaotic: each step doubles the rounding error, so only the first few steps are compared.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from parity_tests.support import harness, jax_training, torch_training
from parity_tests.support.budget import Budget
from parity_tests.support.case import Case, Trajectory
from parity_tests.support.cases import HERE, state_of
from parity_tests.support.compare import compare_trajectories, largest
from parity_tests.support.jax_training import Training
from parity_tests.support.pair import Pair, our_pair
from parity_tests.support.torch_side import TorchHalf, on_torch, our_torch
from pdrunet_jax.config import OptimConfig, to_dict
from pdrunet_jax.convert import __main__ as convert
from pdrunet_torch_ref.training_state import make_optimizer

SMALL = Case(shape=(2, 16, 16))
SGD = OptimConfig(name="sgd", learning_rate=0.01, weight_decay=1e-3)

ADAM = Training(SMALL)
TRAININGS = (
    ADAM,
    Training(SMALL.replace(path="fused")),
    *(Training(SMALL.replace(path=path)) for path in HERE if path == "native"),
    Training(
        Case(shape=(1, 20, 13), outputs=2, in_channels=3, shortcut="conv1"),
        OptimConfig(name="adamw", weight_decay=0.05),
        "ce_dice",
    ),
    Training(SMALL.replace(norm="none"), SGD, "bce"),
    Training(Case(network="unet", filters=3, shape=(2, 14, 17))),
    Training(Case(network="fusionnet", filters=3, depth=1, shape=(2, 14, 17), path="fused", up="bilinear"), SGD),
)
ROUGH = Training(SMALL.replace(dtype="float32"))
FEW, HALF, ALL = 5, 25, 50


def torch_half(training: Training) -> TorchHalf:
    return our_torch(training.case, partial(make_optimizer, settings=vars(training.optim)))


def pair_of(training: Training) -> Pair:
    """The pair of the network with the batches and the optimizer of a training."""
    batches, pair = jax_training.as_steps(training), our_pair(training.case)
    return dataclasses.replace(pair, name=str(training), torch=torch_half(training), batch=batches.__getitem__)


@cache
def in_torch(training: Training, steps: int = ALL) -> Trajectory:
    batches = jax_training.as_steps(training, slice(0, steps))
    return on_torch(torch_training.train, torch_half(training), state_of(training.case), batches)


@cache
def in_jax(training: Training, steps: int = ALL) -> Trajectory:
    state = jax_training.start(training, state_of(training.case))
    return jax_training.train(training, state, slice(0, steps))[1]


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_fifty_steps_agree_in_float64(training: Training, budget: Budget) -> None:
    harness.trajectory(budget, pair_of(training), ALL, in_jax(training), in_torch(training))


def test_a_few_steps_agree_in_float32(budget: Budget) -> None:
    got, want = in_jax(ROUGH, FEW), in_torch(ROUGH, FEW)
    compare_trajectories(budget, 8, ROUGH.case, got, want, f"{FEW} steps")


def test_float32_has_left_the_trajectory_after_fifty_steps(budget: Budget) -> None:
    """Neither side is wrong: float32 and float64 of the same framework differ as much."""
    between = largest(in_jax(ROUGH).logits, in_torch(ROUGH).logits)
    within = largest(in_torch(ROUGH).logits.astype("float64"), in_torch(ADAM).logits)
    budget.note(8, "logits after 50 steps, JAX to torch", "float32", between)
    budget.note(8, "logits after 50 steps, torch to float64", "float32", within)
    assert between > 1e-3
    assert within > 1e-3


RESUMED = [training for training in TRAININGS if training.case.path == "plain"]


def torch_then_jax(training: Training, folder: Path) -> Trajectory:
    """Train the first half in PyTorch, convert its .pth to a run folder, and train the second half in JAX."""
    batches, file, run = jax_training.as_steps(training, slice(0, HALF)), folder / "half.pth", folder / "run"
    half, header = torch_half(training), {"config": to_dict(training.config)}
    first = on_torch(torch_training.train_and_save, half, state_of(training.case), batches, file, header)
    convert.main([str(file), str(run)])
    state = jax_training.restore(training, run)
    rest = jax_training.train(training, state, slice(HALF, ALL))[1]
    return Trajectory(first.losses + rest.losses, rest.arrays, rest.logits)


def jax_then_torch(training: Training, folder: Path) -> Trajectory:
    """Train the first half in JAX, convert its run folder to a .pth, and train the second half in PyTorch."""
    batches, file, run = jax_training.as_steps(training, slice(HALF, ALL)), folder / "half.pth", folder / "run"
    state = jax_training.start(training, state_of(training.case))
    state, first = jax_training.train(training, state, slice(0, HALF))
    jax_training.save(training, state, run)
    convert.main([str(run), str(file), "--to-torch-training-state"])
    rest = on_torch(torch_training.load_and_train, torch_half(training), file, batches)
    return Trajectory(first.losses + rest.losses, rest.arrays, rest.logits)


@pytest.mark.parametrize("training", RESUMED, ids=str)
def test_begun_in_pytorch_and_finished_in_jax(training: Training, tmp_path: Path, budget: Budget) -> None:
    got = torch_then_jax(training, tmp_path)
    compare_trajectories(budget, 9, training.case, got, in_torch(training), f"torch -> JAX, to torch, {training}")
    compare_trajectories(budget, 9, training.case, got, in_jax(training), f"torch -> JAX, to JAX, {training}")


@pytest.mark.parametrize("training", RESUMED, ids=str)
def test_begun_in_jax_and_finished_in_pytorch(training: Training, tmp_path: Path, budget: Budget) -> None:
    got = jax_then_torch(training, tmp_path)
    compare_trajectories(budget, 9, training.case, got, in_torch(training), f"JAX -> torch, to torch, {training}")
    compare_trajectories(budget, 9, training.case, got, in_jax(training), f"JAX -> torch, to JAX, {training}")


def test_learning_rate_a_millionth_off(caught: Callable[..., str]) -> None:
    other = Training(SMALL, OptimConfig(learning_rate=1e-3 * (1 + 1e-6)))
    message = caught(compare_trajectories, 8, ADAM.case, in_jax(ADAM), in_torch(other), "50 steps")
    assert "level 8, loss of training steps" in message


@pytest.mark.parametrize("lost", ["moments", "count"])
def test_optimizer_state_lost_on_the_way(lost: str, caught: Callable[..., str]) -> None:
    """Only weights and buffers arrive, as with most converters; or Adam's moments without the number of updates."""
    state = jax_training.start(ADAM, state_of(ADAM.case))
    state, first = jax_training.train(ADAM, state, slice(0, HALF))
    adam = state.opt_state
    if lost == "moments":
        zeros = {key: jax.tree.map(jnp.zeros_like, optax.tree.get(adam, key)) for key in ("mu", "nu")}
        adam = optax.tree.set(adam, **zeros)
    else:
        adam = optax.tree.set(adam, count=jnp.zeros((), jnp.int32))
    state = dataclasses.replace(state, opt_state=adam)
    rest = jax_training.train(ADAM, state, slice(HALF, ALL))[1]
    got = dataclasses.replace(rest, losses=first.losses + rest.losses)
    message = caught(compare_trajectories, 9, ADAM.case, got, in_jax(ADAM), "without the optimizer")
    # The first loss afterwards still comes from the right weights; the second shows the mistake.
    assert f"first step {HALF + 2} " in message
