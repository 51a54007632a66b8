from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pdrunet_jax.config import TrainConfig
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.progress import Clock, Progress, StepLog

SETTINGS = TrainConfig(steps=30, log_every=5, eval_every=12, save_every=4)


def test_the_sequence_depends_on_every_index_and_their_order() -> None:
    start = Progress(data="x")
    one = start.advanced(np.array([1, 2])).advanced(np.array([3]))
    assert one == start.advanced(np.array([1, 2])).advanced(np.array([3]))
    assert one.step == 2
    assert one.sequence != start.advanced(np.array([2, 1])).advanced(np.array([3])).sequence
    assert one.sequence != start.advanced(np.array([1])).advanced(np.array([2, 3])).sequence


def test_the_best_is_kept_and_of_equal_ones_the_first() -> None:
    progress = Progress(data="x")
    for step, dice in ((10, 0.5), (20, 0.7), (30, 0.7), (40, float("nan"))):
        progress = Progress(**{**vars(progress), "step": step}).scored(dice, SETTINGS)
    assert (progress.best_step, progress.best_dice, progress.validated) == (20, 0.7, 40)


def test_patience_counts_regular_validations_without_a_better_one() -> None:
    settings = replace(SETTINGS, patience=2)
    progress = Progress(data="x")
    seen = []
    for step, dice in ((12, 0.5), (24, 0.4), (25, 0.3), (36, 0.6), (48, 0.6), (60, float("nan"))):
        progress = replace(progress, step=step).scored(dice, settings)
        seen.append((progress.stale, progress.stopped_early(settings)))
    assert seen == [(0, False), (1, False), (1, False), (0, False), (1, False), (2, True)]
    assert replace(progress, step=1).finished(settings)
    assert not progress.stopped_early(replace(settings, patience=3))  # raised: it goes on
    assert not progress.stopped_early(SETTINGS)
    saved = {name: value for name, value in progress.to_dict().items() if name != "stale"}  # of an earlier version
    assert Progress.resumed(saved, 60, "x", "s", Path("run")).stale == 0


def test_a_run_is_not_resumed_on_other_data() -> None:
    saved = {"data": "x", "sequence": "s", "best_dice": 0.5, "best_step": 10, "validated": 10}
    progress = Progress.resumed(saved, 12, "x", "s", Path("run"))
    assert (progress.best_dice, progress.step, progress.data) == (0.5, 12, "x")
    assert Progress.resumed({**saved, "data": ""}, 12, "y", "s", Path("run")).data == "y"  # converted: it fits any data
    with pytest.raises(UserError, match="run was trained on other data"):
        Progress.resumed(saved, 12, "y", "s", Path("run"))


def test_a_run_is_not_resumed_from_a_checkpoint_with_other_settings() -> None:
    saved = {**Progress(data="x").to_dict(), "settings": "one", "options": {"outputs": 1}}
    assert Progress.resumed(saved, 3, "x", "one", Path("run")).step == 3
    with pytest.raises(UserError, match="other settings"):
        Progress.resumed(saved, 3, "x", "two", Path("run"))


def test_checkpoints_of_runs_begun_before_skipping_was_cut_are_resumed() -> None:
    saved = {**Progress(data="x", sequence="s").to_dict(), "skipped": []}
    assert Progress.resumed(saved, 3, "x", "s", Path("run")) == Progress(data="x", step=3, sequence="s")


def test_what_is_due_at_each_step() -> None:
    at = [Progress(data="x", step=step) for step in range(1, 31)]
    assert [each.step for each in at if each.log_due(SETTINGS)] == [5, 10, 15, 20, 25, 30]
    assert [each.step for each in at if each.validation_due(SETTINGS)] == [12, 24, 30]
    assert [each.step for each in at if each.save_due(SETTINGS)] == [4, 8, 16, 20, 28]  # not where a validation is
    assert not Progress(data="x", step=12, validated=12).validation_due(SETTINGS)
    assert Progress(data="x", step=31).finished(SETTINGS)  # a run whose configuration asks for fewer steps now


class NotReady(float):
    """A result that the device has not delivered yet."""

    def is_ready(self) -> bool:
        return False


def test_images_per_second_are_those_of_training_also_before_and_after_a_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, rates = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    tracker: Any = SimpleNamespace(log=lambda _, entry: rates.append(entry["time/images_per_second"]))
    state: Any = SimpleNamespace(diverged=False)
    log = StepLog(RunFolder(tmp_path), [], tracker, 0, 8, writes=False)
    progress = Progress(data="x")
    for step in range(1, 7):
        metrics: Any = {"loss": 1.0, "dice": 0.5, "grad_norm": 1.0, "learning_rate": 0.1, "diverged": False}
        now[0] += 2.0
        log.add(progress, np.array([0]), metrics)
        progress = progress.advanced(np.array([0]))
        log.report(state, progress, metrics, due=True)
        if step % 3 == 0:
            log.flush(state)
            now[0] += 50.0  # a validation
            log.clock.restart()
    assert rates == [4.0] * 6


def test_a_step_that_is_done_is_reported_at_once_and_another_when_the_next_has_started(tmp_path: Path) -> None:
    seen: list[int] = []
    tracker: Any = SimpleNamespace(log=lambda step, _: seen.append(step))
    state: Any = SimpleNamespace(diverged=False)
    log, progress = StepLog(RunFolder(tmp_path), [], tracker, 0, 8, writes=False), Progress(data="x")
    for step, done in enumerate((True, False, False, True), 1):
        metrics: Any = dict.fromkeys(("dice", "grad_norm", "learning_rate"), 1.0) | {"diverged": False}
        metrics["loss"] = np.float32(1.0) if done else NotReady(1.0)
        progress = progress.advanced(np.array([0]))
        log.report(state, progress, metrics, due=True)
        assert seen == {1: [1], 2: [1], 3: [1, 2], 4: [1, 2, 3, 4]}[step]


def test_a_clock_that_stands_still_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 1.0)
    assert Clock().lap() == (1e-9, 0.0)
