"""Runs that must be bit-equal: another number of reading threads, a restart, an older version's files."""

import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.runtime.run_folder import RunFolder
from tests.support.live import (
    EVAL_EVERY,
    FILTERS,
    SAVE_EVERY,
    STEPS,
    Place,
    assert_same_run,
    content,
    lines_of,
    read_until,
    resumed_at,
)


@pytest.mark.stress
@pytest.mark.parametrize("threads", [0, 1, 16])
def test_the_same_seed_gives_the_same_run_bit_for_bit_whatever_the_number_of_threads(
    place: Place, threads: int
) -> None:
    run = place.path / f"threads-{threads}"
    result = place.train("--data.threads", str(threads), workdir=run)
    assert (result.returncode, result.stderr) == (0, "")
    assert_same_run(run, place.undisturbed)


@pytest.mark.stress
def test_another_seed_gives_another_run(place: Place) -> None:
    run = place.path / "another-seed"
    assert place.train("--seed", "4", "--train.steps", "1", workdir=run).returncode == 0
    assert content(run, 1)["metrics"][0] != content(place.undisturbed)["metrics"][0]


@pytest.mark.stress
def test_a_run_resumes_in_the_middle_of_an_epoch_with_other_threads(place: Place) -> None:
    run = place.path / "elsewhere"
    with place.start(workdir=run) as process:
        assert read_until(process, EVAL_EVERY + 2, [])  # 5 images in batches of 2: no epoch ends at a checkpoint
        process.kill()
        process.communicate()
    result = place.train("--data.threads", "1", "--data.cache", "none", workdir=run)
    assert result.returncode == 0, result.stderr
    assert resumed_at(result.stdout) == EVAL_EVERY
    assert_same_run(run, place.undisturbed)


def test_a_changed_setting_is_refused_with_a_diff(place: Place) -> None:
    before = content(place.undisturbed)
    result = place.train("--optim.learning-rate", "0.003", workdir=place.undisturbed)
    assert result.returncode == 2
    assert "optim.learning_rate: 0.001 -> 0.003" in result.stderr
    assert "Traceback" not in result.stderr
    assert content(place.undisturbed) == before


def test_a_changed_pixel_is_refused(place: Place) -> None:
    run = shutil.copytree(place.undisturbed, place.path / "other-data")
    data = shutil.copytree(place.path / "data", place.path / "changed")
    image = next((data / "images").glob("*.png"))
    pixels = np.asarray(Image.open(image)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(image)
    result = place.train("--data.root", "changed", workdir=run)
    assert result.returncode == 2
    assert "was trained on other data" in result.stderr
    assert (run / "checkpoints" / str(STEPS)).is_dir()


def test_a_second_trainer_on_one_folder_is_refused_within_two_seconds(place: Place) -> None:
    run = RunFolder(shutil.copytree(place.undisturbed, place.path / "shared"))
    place.train("--help")  # so that Python's files are in memory
    with run.lock():
        began = time.monotonic()
        result = place.train(workdir=run.path)
        seconds = time.monotonic() - began
    assert result.returncode == 2
    assert re.fullmatch(rf"error: .* in use by process {os.getpid()} on .*\n", result.stderr)
    assert seconds < 2


def test_two_trainers_started_at_once_make_one_run(place: Place) -> None:
    run = place.path / "raced"
    both = [place.start(workdir=run) for _ in range(2)]
    ends = []
    for process in both:
        with process:
            _, err = process.communicate(timeout=120)
            ends.append((process.returncode, err))
    assert sorted(code for code, _ in ends) == [0, 2]
    assert all(err == "" if code == 0 else "in use by process" in err for code, err in ends)
    assert_same_run(run, place.undisturbed)


def test_a_run_of_version_0_1_resumes(place: Place) -> None:
    """Its config.toml has settings that were removed since."""
    run = Path(shutil.copytree(place.undisturbed, place.path / "older"))
    text = (run / "config.toml").read_text()
    removed = '[train]\nspike = "off"\nspike_factor = 3.0\nspike_window = 100\n'
    assert "[train]\n" in text
    (run / "config.toml").write_text(text.replace("[train]\n", removed))
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    result = place.train(workdir=run)
    assert (result.returncode, result.stderr) == (0, "")
    assert resumed_at(result.stdout) == STEPS - SAVE_EVERY
    assert_same_run(run, place.undisturbed)


def test_a_run_starts_from_trained_weights_and_resumes_without_them(place: Place) -> None:
    weights = shutil.copy(place.undisturbed / "best.safetensors", place.path / "trained.safetensors")
    run = place.path / "second-round"
    first = place.train("--train.weights", str(weights), workdir=run)  # with the stored programs of other tests
    assert first.returncode == 0, first.stderr
    assert f"started from the weights of {weights}" in first.stdout
    losses = [lines_of(folder)[0]["train/loss"] for folder in (run, place.undisturbed)]
    assert losses[0] < losses[1]
    Path(weights).unlink()
    again = place.train("--train.weights", str(weights), workdir=run)
    assert again.returncode == 0, again.stderr
    assert resumed_at(again.stdout) == STEPS


def test_weights_that_do_not_fit_leave_no_run_behind(place: Place) -> None:
    run = place.path / "unfit"
    result = place.train("--train.weights", str(place.undisturbed), "--model.filters", "5", workdir=run)
    assert result.returncode == 2
    assert f"--model.filters is 5, there it is {FILTERS}" in result.stderr
    assert not run.exists()
