"""Level 5: the gradient of every parameter, by name."""

import pytest

from parity_tests.budget import Budget
from parity_tests.case import Case
from parity_tests.cases import CASES, SWEEP, train_passes
from parity_tests.compare import compare_gradients


@pytest.mark.parametrize("case", CASES + SWEEP, ids=str)
def test_gradient_of_every_parameter_agrees(case: Case, budget: Budget) -> None:
    compare_gradients(budget, case, *train_passes(case))
