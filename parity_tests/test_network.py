"""Levels 3, 5 and 6: every activation and logit, the gradient of every parameter, and BatchNorm's buffers.

Buffers are also compared after several training passes on 2x8x8. There the unbiased variance is 0.8 % above the biased
one; at usual image sizes the difference would be invisible.
"""

import pytest

from parity_tests.support import harness
from parity_tests.support.budget import Budget
from parity_tests.support.case import Case
from parity_tests.support.cases import CASES, HERE, SWEEP, eval_passes, train_passes
from parity_tests.support.compare import compare_buffers
from parity_tests.support.pair import our_pair

NAMED = {"std_block", "e1", "bottleneck.0", "bottleneck.4", "d5", "final_conv"}


@pytest.mark.parametrize("case", CASES + SWEEP, ids=str)
def test_every_activation_agrees_in_evaluation(case: Case, budget: Budget) -> None:
    got, want = eval_passes(case)
    assert case.network != "pdrunet" or got.activations.keys() >= NAMED
    harness.outputs(budget, our_pair(case), False, got, want)


@pytest.mark.parametrize("case", CASES + SWEEP, ids=str)
def test_every_activation_agrees_in_training_with_injected_dropout_masks(case: Case, budget: Budget) -> None:
    harness.outputs(budget, our_pair(case), True, *train_passes(case))


@pytest.mark.parametrize("case", CASES + SWEEP, ids=str)
def test_gradient_of_every_parameter_agrees(case: Case, budget: Budget) -> None:
    harness.gradients(budget, our_pair(case), *train_passes(case))


BUFFER_CASES = [
    Case(shape=(2, 8, 8)),
    Case(shape=(2, 8, 8), dtype="float32"),
    Case(shape=(1, 7, 5), shortcut="conv1", outputs=2, in_channels=3),
    Case(shape=(2, 8, 8), path="polyphase"),
    Case(shape=(2, 8, 8), path="fused", shortcut="conv1"),
    Case(shape=(2, 8, 8), path="fused", shortcut="conv1", dtype="float32"),
    Case(shape=(2, 8, 8), path=HERE[-1], dtype="float32"),
]


@pytest.mark.parametrize("case", BUFFER_CASES, ids=str)
def test_buffers_agree_after_five_training_passes(case: Case, budget: Budget) -> None:
    _, want = harness.buffers(budget, our_pair(case))
    assert want.buffers["d5.bnorm2.num_batches_tracked"] == 3 + harness.PASSES


@pytest.mark.parametrize("case", [case for case in SWEEP if case.norm == "batch"], ids=str)
def test_buffers_agree_after_one_training_pass_in_every_combination(case: Case, budget: Budget) -> None:
    compare_buffers(budget, case, *train_passes(case))
