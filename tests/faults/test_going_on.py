"""A run that goes on with other settings: finished early, prolonged, and killed while it is."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from pdrunet_jax.runtime.checkpoint import checkpoint_steps
from tests.support.live import (
    EVAL_EVERY,
    FILTERS,
    SAVE_EVERY,
    STEPS,
    Place,
    assert_same_run,
    content,
    read_until,
    resumed_at,
)

STOPPED_AT = STEPS - SAVE_EVERY
EVERY = 4
STILL = (
    *("--train.freeze", "[!f]*", "--optim.learning-rate", "1e-12", "--loss.class-weights", "balanced"),
    *("--train.eval-every", str(EVERY), "--train.save-every", "2"),
)
"""Options with which nothing improves: the last layer alone is trained, and hardly."""
SHOWN = ("--train.log-every", "5", "--train.keep-latest", "3", "--train.save-every", "5")


def test_a_stopped_run_is_finished_with_scores_and_goes_on_all_the_same(place: Place) -> None:
    run = Path(shutil.copytree(place.undisturbed, place.path / "finished"))
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    shutil.rmtree(run / "evaluation")
    finished = place.train("--finish", *SHOWN, workdir=run)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert resumed_at(finished.stdout) == STOPPED_AT
    assert f"changed train.steps: {STEPS} -> {STOPPED_AT}\n" in finished.stdout
    assert f"validation at step {STOPPED_AT}" in finished.stdout
    assert finished.stdout.splitlines()[-1].startswith("test dice ")
    assert (run / "evaluation" / "test" / "summary.json").is_file()
    assert f"steps = {STOPPED_AT}\n" in (run / "config.toml").read_text()

    again = place.train(workdir=run)
    assert (again.returncode, again.stderr) == (0, "")
    assert resumed_at(again.stdout) == STOPPED_AT
    assert f"changed train.steps: {STOPPED_AT} -> {STEPS}\n" in again.stdout
    assert content(run)["arrays"] == content(place.undisturbed)["arrays"]


@pytest.mark.stress
def test_a_finished_run_is_prolonged_and_killed_and_equals_one_of_that_length(place: Place) -> None:
    run = place.path / "prolonged"
    short = place.train("--train.steps", str(EVAL_EVERY), workdir=run)
    assert (short.returncode, short.stderr) == (0, "")
    for step in range(EVAL_EVERY + 2, STEPS, 5):
        with place.start("--train.keep-latest", str(1 + step % 3), workdir=run) as process:
            assert read_until(process, step, [])
            process.kill()
            process.communicate()
        assert place.train("--verify", str(run)).returncode == 0
    last = place.train(workdir=run)
    assert (last.returncode, last.stderr) == (0, "")
    assert_same_run(run, place.undisturbed)


def test_frozen_weights_that_do_not_improve_end_a_run_early(place: Place) -> None:
    run = place.path / "early"
    ended = place.train("--train.weights", str(place.undisturbed), *STILL, "--train.patience", "2", workdir=run)
    assert (ended.returncode, ended.stderr) == (0, "")
    last = 3 * EVERY  # the first validation is the best
    assert f"stopped early at step {last}: no better Dice in 2 validations than" in ended.stdout
    assert re.search(rf"^frozen: \[!f\]\*; {FILTERS + 1} of [\d,]+ parameters are trained$", ended.stdout, re.MULTILINE)
    assert ended.stdout.splitlines()[-1].startswith("test dice ")
    assert max(checkpoint_steps(run / "checkpoints")) == last

    about = json.loads((run / "evaluation/test/summary.json").read_text())["about"]
    assert (about["steps"], about["patience"], about["stopped_early"]) == (STEPS, 2, last)
    assert "training steps, stopped early" in (run / "report.html").read_text()
    recorded = tomllib.loads((run / "config.toml").read_text())
    weights = recorded["environment"]["class_weights"]
    assert recorded["loss"]["class_weights"] == "balanced"
    assert f"background {weights[0]:g}; bone {weights[1]:g}" in ended.stdout

    before, after = (load_file(each / "best.safetensors") for each in (place.undisturbed, run))
    changed = {name for name, array in before.items() if not (array == after[name]).all()}
    assert changed <= {"final_conv.weight", "final_conv.bias"}


@pytest.mark.stress
def test_an_early_end_is_the_same_after_a_kill_and_a_higher_patience_goes_on(place: Place) -> None:
    options = "--train.weights", str(place.undisturbed), *STILL
    whole, killed = place.path / "whole", place.path / "killed"
    assert place.train(*options, "--train.patience", "2", workdir=whole).returncode == 0
    for step in (3, 10):
        with place.start(*options, "--train.patience", "2", workdir=killed) as process:
            assert read_until(process, step, [])
            process.kill()
            process.communicate()
    last = place.train(*options, "--train.patience", "2", workdir=killed)
    assert (last.returncode, last.stderr) == (0, "")
    assert_same_run(killed, whole, 3 * EVERY)

    further = place.train(*options, "--train.patience", "3", workdir=whole)
    assert "changed train.patience: 2 -> 3\n" in further.stdout
    assert f"stopped early at step {4 * EVERY}" in further.stdout
    end = place.train(*options, workdir=whole)
    assert "changed train.patience: 3 -> 0\n" in end.stdout
    assert "stopped early" not in end.stdout
    assert max(checkpoint_steps(whole / "checkpoints")) == STEPS


@pytest.mark.stress
def test_a_run_prolonged_by_another_schedule_equals_one_that_had_both_from_the_start(place: Place) -> None:
    run, whole, half = place.path / "again", place.path / "both", str(EVAL_EVERY)
    schedule = "--optim.schedule", "onecycle"
    assert place.train(*schedule, "--train.steps", half, workdir=run).returncode == 0
    prolonged = place.train(*schedule, "--optim.restarts", half, workdir=run)
    assert f"the onecycle schedule goes from step {half} to {STEPS}: the learning rate goes on at" in prolonged.stdout
    assert place.train(*schedule, "--optim.restarts", half, workdir=whole).returncode == 0
    assert_same_run(run, whole)
