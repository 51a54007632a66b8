"""Level 9: 25 steps in one framework, 25 in the other, through files on disk and the `convert` command."""

from pathlib import Path

import pytest

from parity_tests import jax_training, torch_training
from parity_tests.budget import Budget
from parity_tests.case import Trajectory
from parity_tests.cases import state_of
from parity_tests.compare import compare_trajectories
from parity_tests.jax_training import Training
from parity_tests.test_level8_trajectory import SGD, SMALL, in_jax, in_torch
from parity_tests.torch_side import on_torch
from pdrunet_jax import config_io, convert
from pdrunet_jax.config import OptimConfig

HALF = 25

TRAININGS = (
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


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_begun_in_pytorch_and_finished_in_jax(training: Training, tmp_path: Path, budget: Budget) -> None:
    got = torch_then_jax(training, tmp_path)
    compare_trajectories(budget, 9, training.case, got, in_torch(training), f"torch -> JAX, to torch, {training}")
    compare_trajectories(budget, 9, training.case, got, in_jax(training), f"torch -> JAX, to JAX, {training}")


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_begun_in_jax_and_finished_in_pytorch(training: Training, tmp_path: Path, budget: Budget) -> None:
    got = jax_then_torch(training, tmp_path)
    compare_trajectories(budget, 9, training.case, got, in_torch(training), f"JAX -> torch, to torch, {training}")
    compare_trajectories(budget, 9, training.case, got, in_jax(training), f"JAX -> torch, to JAX, {training}")
