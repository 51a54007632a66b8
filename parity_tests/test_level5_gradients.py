"""Level 5: the gradient of every parameter, by name."""

import pytest

from parity_tests.budget import Budget
from parity_tests.cases import CASES, train_passes
from parity_tests.compare import compare_gradients
from parity_tests.pairs import Case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_every_parameter_agrees(case: Case, budget: Budget) -> None:
    compare_gradients(budget, case, *train_passes(case))
