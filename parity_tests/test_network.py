"""Levels 3, 5 and 6: every activation and logit, the gradient of every parameter, and BatchNorm's buffers.

Buffers are also compared after several training passes on 2x8x8. There the unbiased variance is 0.8 % above the biased
one; at usual image sizes the difference would be invisible.
"""

import pytest

from parity_tests.support.budget import Budget
from parity_tests.support.case import Case, Pass, make_images, make_masks
from parity_tests.support.cases import CASES, SWEEP, eval_passes, state_of, train_passes
from parity_tests.support.compare import compare_buffers, compare_gradients, compare_outputs
from parity_tests.support.jax_side import make_flax, make_jax_pass
from parity_tests.support.torch_side import network_pass, on_torch


@pytest.mark.parametrize("case", CASES + SWEEP, ids=str)
def test_every_activation_agrees_in_evaluation(case: Case, budget: Budget) -> None:
    compare_outputs(budget, case, "eval", *eval_passes(case))


@pytest.mark.parametrize("case", CASES + SWEEP, ids=str)
def test_every_activation_agrees_in_training_with_injected_dropout_masks(case: Case, budget: Budget) -> None:
    compare_outputs(budget, case, "train", *train_passes(case))


@pytest.mark.parametrize("case", CASES + SWEEP, ids=str)
def test_gradient_of_every_parameter_agrees(case: Case, budget: Budget) -> None:
    compare_gradients(budget, case, *train_passes(case))


PASSES = 5

BUFFER_CASES = [
    Case(shape=(2, 8, 8)),
    Case(shape=(2, 8, 8), dtype="float32"),
    Case(shape=(1, 7, 5), shortcut="conv1", outputs=2, in_channels=3),
    Case(shape=(2, 8, 8), path="polyphase"),
    Case(shape=(2, 8, 8), path="fused", shortcut="conv1"),
    Case(shape=(2, 8, 8), path="fused", shortcut="conv1", dtype="float32"),
]


def after_passes(case: Case) -> tuple[Pass, Pass]:
    """Return the last of `PASSES` training passes, each on new images, in JAX and in PyTorch."""
    arrays = state_of(case)
    inputs = [(make_images(case, 10 + number), make_masks(case, 30 + number)) for number in range(PASSES)]
    ours = make_jax_pass(make_flax(arrays, case), train=True)
    return [ours(*each) for each in inputs][-1], on_torch(network_pass, case, arrays, inputs, True)


@pytest.mark.parametrize("case", BUFFER_CASES, ids=str)
def test_buffers_agree_after_five_training_passes(case: Case, budget: Budget) -> None:
    got, want = after_passes(case)
    compare_buffers(budget, case, got, want)
    assert want.buffers["d5.bnorm2.num_batches_tracked"] == 3 + PASSES


@pytest.mark.parametrize("case", [case for case in SWEEP if case.norm == "batch"], ids=str)
def test_buffers_agree_after_one_training_pass_in_every_combination(case: Case, budget: Budget) -> None:
    compare_buffers(budget, case, *train_passes(case))
