from pathlib import Path

import numpy as np
import pytest

from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.train.progress import Progress


def test_the_sequence_depends_on_every_index_and_their_order() -> None:
    start = Progress(data="x")
    one = start.seen(np.array([1, 2])).seen(np.array([3]))
    assert one == start.seen(np.array([1, 2])).seen(np.array([3]))
    assert one.sequence != start.seen(np.array([2, 1])).seen(np.array([3])).sequence
    assert one.sequence != start.seen(np.array([1])).seen(np.array([2, 3])).sequence


def test_the_best_is_kept_and_of_equal_ones_the_first() -> None:
    progress = Progress(data="x").scored(10, 0.5).scored(20, 0.7).scored(30, 0.7).scored(40, float("nan"))
    assert (progress.best_step, progress.best_dice, progress.validated) == (20, 0.7, 40)


def test_a_run_is_not_resumed_on_other_data() -> None:
    saved = {"data": "x", "sequence": "s", "best_dice": 0.5, "best_step": 10, "validated": 10}
    assert Progress(data="x").resumed(saved, Path("run")).best_dice == 0.5
    with pytest.raises(UserError, match="run was trained on other data"):
        Progress(data="y").resumed(saved, Path("run"))
