"""Levels 8 and 9: fifty training steps in one framework, and 25 in each, carried over by files and `convert`.

In float32 training is chaotic: each step doubles the rounding of the one before, so that only the first few are held.
"""

from functools import cache
from pathlib import Path

import pytest

from parity_tests.support import jax_training, torch_training
from parity_tests.support.budget import Budget
from parity_tests.support.case import Case, Trajectory
from parity_tests.support.cases import state_of
from parity_tests.support.compare import compare_trajectories, largest
from parity_tests.support.jax_training import Training
from parity_tests.support.torch_side import on_torch
from pdrunet_jax import config as config_io
from pdrunet_jax.config import OptimConfig
from pdrunet_jax.convert import __main__ as convert

SMALL = Case(shape=(2, 16, 16))
SGD = OptimConfig(name="sgd", learning_rate=0.01, weight_decay=1e-3)

ADAM = Training(SMALL)
TRAININGS = (
    ADAM,
    Training(SMALL.replace(path="fused")),
    Training(
        Case(shape=(1, 20, 13), outputs=2, in_channels=3, shortcut="conv1"),
        OptimConfig(name="adamw", weight_decay=0.05),
        "ce_dice",
    ),
    Training(SMALL.replace(norm="none"), SGD, "bce"),
)
FEW = 5


@cache
def in_torch(training: Training) -> Trajectory:
    arrays, steps = state_of(training.case), jax_training.as_steps(training)
    return on_torch(torch_training.train, training.case, arrays, vars(training.optim), training.loss, steps)


@cache
def in_jax(training: Training) -> Trajectory:
    state = jax_training.start(training, state_of(training.case))
    return jax_training.train(training, state, slice(0, training.steps))[1]


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_fifty_steps_agree_in_float64(training: Training, budget: Budget) -> None:
    compare_trajectories(budget, 8, training.case, in_jax(training), in_torch(training), str(training))


def test_a_few_steps_agree_in_float32(budget: Budget) -> None:
    training = Training(SMALL.replace(dtype="float32"), steps=FEW)
    compare_trajectories(budget, 8, training.case, in_jax(training), in_torch(training), f"{FEW} steps")


def test_float32_has_left_the_trajectory_after_fifty_steps(budget: Budget) -> None:
    """Not a fault of either side: float32 beside float64 of the same framework is as far off."""
    rough = Training(SMALL.replace(dtype="float32"))
    between = largest(in_jax(rough).logits, in_torch(rough).logits)
    within = largest(in_torch(rough).logits.astype("float64"), in_torch(ADAM).logits)
    budget.note(8, "logits after 50 steps, JAX to torch", "float32", between)
    budget.note(8, "logits after 50 steps, torch to float64", "float32", within)
    assert between > 1e-3
    assert within > 1e-3


HALF = 25

RESUMED = (
    Training(SMALL),
    Training(SMALL.replace(outputs=2, shortcut="conv1"), OptimConfig(name="adamw", weight_decay=0.05), "ce_dice"),
    Training(SMALL.replace(norm="none"), SGD, "bce"),
)


def torch_then_jax(training: Training, folder: Path) -> Trajectory:
    """PyTorch's half, its training state in a .pth, converted to a run folder, and JAX's half."""
    steps, file, run = jax_training.as_steps(training)[:HALF], folder / "half.pth", folder / "run"
    config = config_io.to_dict(training.config)
    first = on_torch(
        torch_training.train_and_save, training.case, state_of(training.case), config, training.loss, steps, file
    )
    convert.main([str(file), str(run)])
    state = jax_training.restore(training, run)
    rest = jax_training.train(training, state, slice(HALF, training.steps))[1]
    return Trajectory(first.losses + rest.losses, rest.arrays, rest.logits)


def jax_then_torch(training: Training, folder: Path) -> Trajectory:
    """JAX's half, its checkpoint in a run folder, converted to a .pth, and PyTorch's half."""
    steps, file, run = jax_training.as_steps(training)[HALF:], folder / "half.pth", folder / "run"
    state = jax_training.start(training, state_of(training.case))
    state, first = jax_training.train(training, state, slice(0, HALF))
    jax_training.save(training, state, run)
    convert.main([str(run), str(file), "--to-torch-training-state"])
    rest = on_torch(torch_training.load_and_train, file, training.loss, steps)
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
