"""Level 3: every named activation of the whole network, and the logits."""

import pytest

from parity_tests.budget import Budget
from parity_tests.case import Case
from parity_tests.cases import CASES, SWEEP, eval_passes, train_passes
from parity_tests.compare import compare_outputs


@pytest.mark.parametrize("case", CASES + SWEEP, ids=str)
def test_every_activation_agrees_in_evaluation(case: Case, budget: Budget) -> None:
    compare_outputs(budget, case, "eval", *eval_passes(case))


@pytest.mark.parametrize("case", CASES + SWEEP, ids=str)
def test_every_activation_agrees_in_training_with_injected_dropout_masks(case: Case, budget: Budget) -> None:
    compare_outputs(budget, case, "train", *train_passes(case))
