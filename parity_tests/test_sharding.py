"""Level 10: the network with its batch split over devices, against the plain path on one device."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.budget import Budget
from parity_tests.support.case import Arrays
from parity_tests.support.compare import compare_paths
from parity_tests.support.sharded import ENVIRONMENT, SPLITS
from parity_tests.test_execution_paths import outcome

INTACT = [name for name, split in SPLITS.items() if split.broken is None]


@pytest.fixture(scope="module")
def split_outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrays]:
    folder = tmp_path_factory.mktemp("sharded")
    search = (str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(search)}
    subprocess.run([sys.executable, "-m", "parity_tests.support.sharded", folder], check=True, env=environment)
    return {name: dict(np.load(folder / f"{name}.npz")) for name in SPLITS}


def compare(budget: Budget, name: str, outcomes: dict[str, Arrays]) -> None:
    split = SPLITS[name]
    want = outcome(split.case.replace(path="plain"))
    what = "sharding" if split.case.network == "pdrunet" else "sharding of other networks"
    compare_paths(budget, what, "float64", split.case, outcomes[name], want, f"{name}: {split.case}")


@pytest.mark.parametrize("name", INTACT)
def test_a_batch_split_over_devices_gives_the_results_of_one_device(
    name: str, split_outcomes: dict[str, Arrays], budget: Budget
) -> None:
    compare(budget, name, split_outcomes)


def test_averaged_variances_of_the_parts_are_detected(
    split_outcomes: dict[str, Arrays], caught: Callable[..., str]
) -> None:
    assert "level 10, sharding: logits" in caught(compare, "variances of the parts averaged", split_outcomes)
