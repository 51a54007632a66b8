"""A comparison that is killed and resumed ends as one that was left alone."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.live import Place, assert_same_run, stream

NETWORKS = ("unet depth=1", "fusionnet depth=1")
"""Quick to compile."""
KILLS = 4


def start(place: Place, output: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pdrunet_jax.compare", "--config", "tiny.toml", "--models", *NETWORKS]
    command += ["--seeds", "2", "--folds", "2", "--train.steps", "6", "--output", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=place.path, env=place.environment, text=True, **pipes)  # type: ignore[call-overload]


@pytest.mark.stress
def test_a_comparison_killed_and_resumed_ends_with_the_same_results(place: Place) -> None:
    alone, killed = place.path / "compare_alone", place.path / "compare_killed"
    with start(place, alone) as process:
        printed = process.communicate(timeout=900)[0]
    assert process.returncode == 0, printed
    # First while it measures, then in the middle of a training, then anywhere.
    draw = stream("compare")
    for moment in ("measuring ", "step 4/", *[""] * (KILLS - 2)):
        with start(place, killed) as process:
            assert process.stdout is not None
            if moment:
                next(line for line in process.stdout if line.startswith(moment))
            else:
                time.sleep(draw.uniform(4.0, 20.0))
            process.kill()
    with start(place, killed) as process:
        printed = process.communicate(timeout=900)[0]
    assert process.returncode == 0, printed
    assert "seed 3, network 1 of 2, unet depth=1: finished" in printed
    assert (killed / "compare.csv").read_bytes() == (alone / "compare.csv").read_bytes()
    one, other = (json.loads((folder / "compare.json").read_text()) for folder in (alone, killed))
    assert one["differences"] == other["differences"]
    assert [model["scores"] for model in one["models"]] == [model["scores"] for model in other["models"]]
    for run in sorted(path.parent.relative_to(alone) for path in alone.glob("*/seed_*/fold_*/config.toml")):
        assert_same_run(killed / run, alone / run, step=6)
