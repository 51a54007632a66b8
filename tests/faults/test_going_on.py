"""A run that goes on with other settings: finished early, prolonged, and killed while it is."""

import shutil
from pathlib import Path

import pytest

from tests.support.live import EVAL_EVERY, SAVE_EVERY, STEPS, Place, assert_same_run, content, read_until, resumed_at

STOPPED_AT = STEPS - SAVE_EVERY
SHOWN = ("--train.log-every", "5", "--train.keep-latest", "3", "--train.save-every", "4")


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
