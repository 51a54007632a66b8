"""Level 8 with frozen layers: `train.freeze` against requires_grad_(False), and eval() of frozen normalisations."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from parity_tests.support import jax_training, torch_training
from parity_tests.support.budget import Budget
from parity_tests.support.case import Case, Trajectory
from parity_tests.support.cases import state_of
from parity_tests.support.compare import compare_trajectories
from parity_tests.support.jax_training import Training
from parity_tests.support.torch_side import TorchHalf, on_torch, our_torch
from pdrunet_jax.config import OptimConfig
from pdrunet_jax.convert import __main__ as convert
from pdrunet_torch_ref.training_state import make_optimizer

STEPS, HALF = 6, 3
SMALL = Case(shape=(2, 16, 16))
ENCODER = Training(
    SMALL.replace(path="fused"),
    OptimConfig(name="adamw", weight_decay=0.05),
    steps=STEPS,
    freeze=("std_block", "e?", "bottleneck.0"),
)
TRAININGS = (
    ENCODER,
    Training(SMALL, OptimConfig(weight_decay=0.01), steps=STEPS, freeze=("d?", "e1.bnorm1", "*.second.bias")),
    Training(
        Case(network="fusionnet", filters=3, depth=1, shape=(2, 14, 17)),
        OptimConfig(name="sgd", learning_rate=0.01, weight_decay=1e-3),
        steps=STEPS,
        freeze=("encoder_*", "up_0.bnorm"),
    ),
)
"""The frozen layers come first, or last, so that gradients pass through them."""


def torch_half(training: Training, trains: bool = False) -> TorchHalf:
    half = our_torch(training.case, partial(make_optimizer, settings=vars(training.optim)))
    return dataclasses.replace(half, build=partial(torch_training.frozen, half.build, training.freeze, trains))


def in_torch(training: Training, trains: bool = False) -> Trajectory:
    batches = jax_training.as_steps(training)
    return on_torch(torch_training.train, torch_half(training, trains), state_of(training.case), batches)


def in_jax(training: Training) -> Trajectory:
    state = jax_training.start(training, state_of(training.case))
    return jax_training.train(training, state, slice(0, STEPS))[1]


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_steps_with_frozen_layers_agree(training: Training, budget: Budget) -> None:
    compare_trajectories(budget, 8, training.case, in_jax(training), in_torch(training), str(training))


def test_a_training_with_frozen_layers_is_begun_in_jax_and_finished_in_pytorch(tmp_path: Path, budget: Budget) -> None:
    file, run = tmp_path / "half.pth", tmp_path / "run"
    state = jax_training.start(ENCODER, state_of(ENCODER.case))
    state, first = jax_training.train(ENCODER, state, slice(0, HALF))
    jax_training.save(ENCODER, state, run)
    convert.main([str(run), str(file), "--to-torch-training-state"])
    convert.main([str(file), str(tmp_path / "back")])
    batches = jax_training.as_steps(ENCODER, slice(HALF, STEPS))
    theirs = on_torch(torch_training.load_and_train, torch_half(ENCODER), file, batches)
    ours = jax_training.train(ENCODER, jax_training.restore(ENCODER, tmp_path / "back"), slice(HALF, STEPS))[1]
    got = Trajectory(first.losses + theirs.losses, theirs.arrays, theirs.logits)
    compare_trajectories(budget, 9, ENCODER.case, got, in_torch(ENCODER), f"JAX -> torch, {ENCODER}")
    back = Trajectory(first.losses + ours.losses, ours.arrays, ours.logits)
    compare_trajectories(budget, 9, ENCODER.case, back, in_torch(ENCODER), f"JAX -> torch -> JAX, {ENCODER}")


def test_frozen_normalisations_left_in_training_mode(caught: Callable[..., str]) -> None:
    """requires_grad_(False) alone: the batch's statistics are used, and the running ones move."""
    message = caught(compare_trajectories, 8, ENCODER.case, in_jax(ENCODER), in_torch(ENCODER, trains=True), "steps")
    assert "level 8, loss of training steps" in message


def test_frozen_layers_trained_after_all(caught: Callable[..., str]) -> None:
    other = dataclasses.replace(ENCODER, freeze=())
    message = caught(compare_trajectories, 8, ENCODER.case, in_jax(ENCODER), in_torch(other), "steps")
    assert "level 8, loss of training steps" in message
