from dataclasses import replace
from pathlib import Path

import pytest

from pdrunet_jax.config import Config, OptimConfig, TrainConfig, settings_digest
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.resume import describe_changes, end_here
from pdrunet_jax.train.run import open_run, require_same_settings

OLD = Config(optim=OptimConfig(schedule="cosine"), train=TrainConfig(steps=100))


def longer(steps: int, config: Config = OLD) -> Config:
    return replace(config, train=replace(config.train, steps=steps))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = open_run(tmp_path, OLD)
    (run.checkpoints / "50").mkdir(parents=True)
    return run


def test_other_steps_say_what_happens_to_the_learning_rate(run: RunFolder) -> None:
    rate = (
        "the cosine schedule spans the whole run, now 200 steps: the learning rate goes on at 0.000854, not 0.0005. "
        "To start it again here instead: --optim.restarts 50"
    )
    assert describe_changes(run, longer(200)) == ["changed train.steps: 100 -> 200", rate]
    assert describe_changes(run, longer(50)) == ["changed train.steps: 100 -> 50"]  # no step is left
    again = replace(longer(200), optim=replace(OLD.optim, restarts=(50,)))
    rate = "the cosine schedule goes from step 50 to 200: the learning rate goes on at 0.001, not 0.0005"
    assert describe_changes(run, again)[1:] == ["changed train.steps: 100 -> 200", rate]
    assert settings_digest(again) == settings_digest(OLD)
    assert end_here(again, run, Group()).optim.restarts == ()
    constant = replace(OLD, optim=OptimConfig())
    other = open_run(run.path / "other", constant)
    (other.checkpoints / "50").mkdir(parents=True)
    assert describe_changes(other, longer(200, constant)) == ["changed train.steps: 100 -> 200"]


def test_changes_are_recorded_and_keep_the_digest(run: RunFolder) -> None:
    changed = replace(longer(200), train=replace(OLD.train, steps=200, log_every=3, keep_best=4, eval_batch_size=2))
    assert settings_digest(changed) == settings_digest(OLD)
    open_run(run.path, changed)
    text = run.config_file.read_text()
    assert "changed = [" in text
    assert '"train.keep_best: 1 -> 4"' in text
    with pytest.raises(UserError, match=r"is at step 50, and --train\.steps 49 is before that: give 50 or more"):
        open_run(run.path, longer(49))
    assert run.config_file.read_text() == text


def test_a_run_cannot_be_finished_without_a_checkpoint_or_in_its_warmup(run: RunFolder, tmp_path: Path) -> None:
    assert end_here(OLD, run, Group()).train.steps == 50
    with pytest.raises(UserError, match="has no checkpoint to score"):
        end_here(OLD, RunFolder(tmp_path / "none"), Group())
    with pytest.raises(UserError, match=r"--finish at step 50 is not a valid configuration.*\n.*warmup_steps = 60"):
        end_here(replace(OLD, optim=OptimConfig(warmup_steps=60)), run, Group())


def test_processes_may_not_differ_in_what_a_resumed_run_may_change() -> None:
    class Other(Group):
        def broadcast(self, value: str) -> str:
            return value.replace("steps = 100\n", "steps = 200\n")

    with pytest.raises(UserError, match=r"train\.steps: 200 -> 100"):
        require_same_settings(Other(), OLD)
