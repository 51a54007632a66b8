"""Options of folds, and which folds are finished."""

import json
import os
from pathlib import Path

import pytest

from pdrunet_jax.config import TrainConfig
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.folds import is_finished, train_folds
from pdrunet_jax.train.options import parse


def test_folds_are_numbered_from_one() -> None:
    assert parse(["--config", "phantom"]).fold_numbers == ((), 0)
    assert parse(["--config", "phantom", "--folds", "3"]).fold_numbers == ((1, 2, 3), 3)
    assert parse(["--config", "phantom", "--fold", "2/5"]).fold_numbers == ((2,), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--folds 1", "--folds 1: give 2 or more"),
        ("--folds 10000", "--folds 10000"),
        ("--fold 6/5", "--fold 6/5: give K/N"),
        ("--fold two", "--fold two: give K/N, as in 2/5"),
        ("--folds 3 --fold 1/3", "exclude one another"),
        ("--folds 3 --finish", "to end all folds sooner, lower --train.steps"),
    ],
)
def test_wrong_folds_are_refused_before_anything_is_loaded(options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["--config", "phantom", *options.split()])


def test_a_fold_is_finished_with_scores_and_report_of_its_last_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    summary = run.evaluation / "test" / "summary.json"
    assert not is_finished(run, TrainConfig(steps=24))
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps({"about": {"steps": 24}}))
    assert not is_finished(run, TrainConfig(steps=24))  # killed before the report
    run.report.touch()
    assert is_finished(run, TrainConfig(steps=24))
    assert not is_finished(run, TrainConfig(steps=36))  # prolonged
    os.utime(run.report, ns=(0, 0))
    assert not is_finished(run, TrainConfig(steps=24))  # the report of an earlier end
    for text in ("{", "[]", '{"about": 3}', '{"about": {}}'):
        summary.write_text(text)
        assert not is_finished(run, TrainConfig(steps=24))


def test_folds_do_not_mix_with_a_run_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    options = parse(["--config", "phantom", "--folds", "3", "--workdir", str(tmp_path)])
    with pytest.raises(UserError, match="holds a run of its own; choose another --workdir for folds"):
        train_folds(options, Group(), StopFlag())
