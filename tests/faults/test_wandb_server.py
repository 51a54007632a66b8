"""A W&B server that refuses, fails or hangs, at the start or later: training succeeds, and no data is lost."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdrunet_jax.train.wandb_run import CALL_TIMEOUT, GRACE
from tests.support.fake_wandb import serve
from tests.support.live import Place, assert_same_run, lines_of, record

STEPS = 12
OPTIONS = ("--tracking.wandb", "online", "--train.steps", str(STEPS), "--train.save-every", "6")
START, END = 3, 9
"""Time limits of W&B in these tests, in seconds."""
# Servers that fail from the start are also in tests/train/test_tracking.py, without a training.
BEHAVIOURS = [
    "errors later",
    *(pytest.param(name, marks=pytest.mark.stress) for name in ("refuses", "errors", "hangs", "hangs later")),
]


@pytest.fixture(scope="module")
def without_wandb(place: Place) -> Path:
    run = place.path / "no-wandb"
    began = time.monotonic()
    result = place.train(*OPTIONS, "--tracking.wandb", "disabled", workdir=run)
    assert result.returncode == 0, result.stderr
    (run / "seconds").write_text(str(time.monotonic() - began))
    return run


def account(place: Place, url: str) -> dict[str, str]:
    return {
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": "a" * 40,
        "WANDB_INIT_TIMEOUT": str(START),
        "WANDB_FINISH_TIMEOUT": str(END),
        "HOME": str(place.path),
    }


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_training_ends_as_without_wandb_in_bounded_time_and_can_be_synced_later(
    place: Place, without_wandb: Path, behaviour: str
) -> None:
    run = place.path / f"wandb-{behaviour.replace(' ', '-')}"
    began = time.monotonic()
    with serve(behaviour) as server:
        result = place.train(*OPTIONS, workdir=run, **account(place, server.url))
    seconds = time.monotonic() - began - float((without_wandb / "seconds").read_text())
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("warning: W&B") == 1
    assert seconds < START + CALL_TIMEOUT + END + 2 * GRACE + 20  # the machine may be busy
    assert place.left_behind() == []
    assert_same_run(run, without_wandb, STEPS)
    assert (run / "report.html").is_file()

    with serve("accepts") as server:
        kept = [*run.glob("wandb/offline-run-*")] or [*run.glob("wandb/run-*")]
        command = [sys.executable, "-m", "wandb", "sync", "--no-skip-online", *map(str, kept)]
        environment = {**place.environment, **account(place, server.url)}
        synced = subprocess.run(
            command, cwd=place.path, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert synced.returncode == 0, synced.stderr
        sent = {line["_step"]: line for line in server.history}
    for line in lines_of(run):
        if "train/loss" in line:
            assert sent[line["step"]]["train/loss"] == pytest.approx(line["train/loss"], rel=1e-12)
    record(f"W&B {behaviour}", extra_seconds=round(seconds, 1), steps_synced_later=len(sent))


def test_a_server_that_works_gets_everything_at_once(place: Place) -> None:
    with serve("accepts") as server:
        result = place.train(*OPTIONS, workdir=place.path / "wandb-online", **account(place, server.url))
        assert (result.returncode, "warning" in result.stderr) == (0, False), result.stderr
        assert {line["_step"] for line in server.history} == set(range(1, STEPS + 1))
