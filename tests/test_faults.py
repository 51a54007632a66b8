"""Faults that happen to a real training process: it is killed, stopped, misused, and its files are damaged.

Every process is `python -m pdrunet_jax.train` itself. They share JAX's compilation cache, or most of the time would go
into compiling.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from safetensors.numpy import load_file

from pdrunet_jax.runfolder import RunFolder

STEPS, SAVE_EVERY, KILLS = 36, 3, 10

CONFIG = f"""
seed = 3
[data]
root = "data"
size = [32]
phantoms = 12
val_fraction = 0.25
test_fraction = 0.25
[augment]
flip_horizontal = 0.5
gamma = 0.3
[model]
filters = 4
[optim]
ema = 0.9
[train]
steps = {STEPS}
batch_size = 2
log_every = 1
eval_every = 12
save_every = {SAVE_EVERY}
samples = 0
[tracking]
wandb = "disabled"
"""


@dataclass
class Place:
    """A folder with a configuration, data and a finished run that nothing disturbed."""

    path: Path
    environment: dict[str, str]

    @property
    def undisturbed(self) -> Path:
        return self.path / "undisturbed"

    def start(self, *options: str, workdir: Path | None = None) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "pdrunet_jax.train", "--config", "tiny.toml"]
        command += ["--workdir", str(workdir or self.path / "run"), *options]
        return subprocess.Popen(
            command, cwd=self.path, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def train(self, *options: str, workdir: Path | None = None) -> "subprocess.CompletedProcess[str]":
        with self.start(*options, workdir=workdir) as process:
            out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    path = tmp_path_factory.mktemp("faults")
    (path / "tiny.toml").write_text(CONFIG)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    place = Place(path, environment)
    result = place.train(workdir=place.undisturbed)
    assert result.returncode == 0, result.stderr
    return place


def content(run: Path) -> dict[str, Any]:
    """All that a finished run has to have in common with another: bytes of arrays, and what is saved beside them."""
    final = run / "checkpoints" / str(STEPS)
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(final / "state")
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {jax.tree_util.keystr(name): (str(leaf.dtype), np.asarray(leaf).tobytes()) for name, leaf in leaves}
    meta = json.loads((final / "meta" / "metadata").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]
    best = {name: array.tobytes() for name, array in load_file(run / "best.safetensors").items()}
    return {"arrays": arrays, "meta": meta, "metrics": metrics, "best": best}


def assert_same_run(found: Path, expected: Path) -> None:
    a, b = content(found), content(expected)
    assert {part.split("'")[1] for part in b["arrays"]} == {"params", "stats", "opt_state", "ema", "step", "halted"}
    assert len(b["meta"]["extra"]["sequence"]) == 64
    assert a["arrays"].keys() == b["arrays"].keys()
    assert [name for name in a["arrays"] if a["arrays"][name] != b["arrays"][name]] == []
    assert a["meta"] == b["meta"]
    assert a["metrics"] == b["metrics"]
    assert a["best"] == b["best"]


def read_until(process: "subprocess.Popen[str]", step: int, seen: list[str]) -> bool:
    """Read lines into `seen` until one reports `step` or a later one; False if the process ends before."""
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if (found := re.match(r"step (\d+)/", line)) and int(found[1]) >= step:
            return True
    return False


def steps_in(lines: list[str], pattern: str) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.match(pattern, line))]


def kills() -> Iterator[tuple[int | None, float]]:
    """When to kill: so many seconds after so many steps since the last checkpoint, or (None) after the start."""
    draw = random.Random(20)
    for number in range(KILLS):
        if number in (0, 5):
            yield None, draw.uniform(0.5, 4.0)
        elif number % 2:
            yield SAVE_EVERY, 0.04 * number  # a sweep over the save
        else:
            yield SAVE_EVERY + draw.randrange(1, SAVE_EVERY), draw.uniform(0.0, 0.3)


def test_a_run_killed_ten_times_ends_bit_equal_to_one_that_was_left_alone(place: Place) -> None:
    run = place.path / "killed"
    saved = 0
    for steps, delay in kills():
        lines: list[str] = []
        with place.start(workdir=run) as process:
            if steps is not None:
                assert read_until(process, saved + steps, lines), (lines, process.communicate()[1])
            time.sleep(delay)
            assert process.poll() is None, "the run ended before it could be killed"
            process.kill()
            out, err = process.communicate()
        lines += out.splitlines(keepends=True)
        assert "Traceback" not in err
        assert "damaged" not in err  # a kill leaves no half checkpoint under a checkpoint's name
        resumed = steps_in(lines, r"resumed .* at step (\d+)")
        if resumed or steps is not None:
            assert max(resumed, default=0) >= saved
        reached = max(steps_in(lines, r"step (\d+)/"), default=0)
        saved = max(saved, *resumed, (reached - 1) // SAVE_EVERY * SAVE_EVERY)  # what must be on the disk by now
    assert saved > 0
    result = place.train(workdir=run)
    assert result.returncode == 0, result.stderr
    assert_same_run(run, place.undisturbed)


def test_asked_to_stop_it_saves_exits_with_75_and_resumes_exactly(place: Place) -> None:
    run = place.path / "stopped"
    for step, numbers in ((4, (signal.SIGTERM,)), (11, (signal.SIGINT, signal.SIGINT))):
        with place.start(workdir=run) as process:
            assert read_until(process, step, [])
            for number in numbers:
                process.send_signal(number)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (75, "")
        saved = steps_in(out.splitlines(), r"asked to stop \(SIG\w+\): saved at step (\d+)")
        assert saved
        assert (run / "checkpoints" / str(saved[0])).is_dir()
    result = place.train(workdir=run)
    assert f"at step {saved[0]}\n" in result.stdout
    assert result.returncode == 0, result.stderr
    assert_same_run(run, place.undisturbed)


def test_a_stop_while_it_starts_is_minded_too(place: Place) -> None:
    with place.start(workdir=place.path / "early") as process:
        assert process.stdout is not None
        process.stdout.readline()  # the device: from here on it compiles
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")


def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before(place: Place) -> None:
    run = shutil.copytree(place.undisturbed, place.path / "truncated")
    newest = run / "checkpoints" / str(STEPS)
    victim = max((newest / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    os.truncate(victim, victim.stat().st_size // 2)
    result = place.train(workdir=run)
    assert result.returncode == 0, result.stderr
    assert f"warning: checkpoint {newest} is damaged" in result.stderr
    assert f"at step {STEPS - SAVE_EVERY}\n" in result.stdout
    assert_same_run(run, place.undisturbed)


def test_a_second_trainer_on_one_folder_is_refused(place: Place) -> None:
    run = RunFolder(shutil.copytree(place.undisturbed, place.path / "shared"))
    with run.lock():
        result = place.train(workdir=run.path)
    assert result.returncode == 2
    assert re.fullmatch(rf"error: .* in use by process {os.getpid()} on .*\n", result.stderr)


def test_a_changed_learning_rate_is_refused_with_a_diff(place: Place) -> None:
    before = content(place.undisturbed)
    result = place.train("--optim.learning-rate", "0.003", workdir=place.undisturbed)
    assert result.returncode == 2
    assert "optim.learning_rate: 0.001 -> 0.003" in result.stderr
    assert "Traceback" not in result.stderr
    assert content(place.undisturbed) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state_before(place: Place) -> None:
    run = place.path / "diverged"
    result = place.train("--optim.learning-rate", "1e30", "--train.save-every", "1", workdir=run)
    assert result.returncode == 1
    assert re.match(r"error: the loss or a gradient of step (\d+) is not finite", result.stderr)
    report = json.loads((run / "not_finite.json").read_text())
    assert len(report["samples"]) == 2
    assert all((place.path / "data" / sample).is_file() for sample in report["samples"])
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert newest == report["step"] - 1
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(run / "checkpoints" / str(newest) / "state")
    assert not state["halted"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def bad_image(data: Path) -> None:
    """Two images that are none, in a small dataset."""
    for number in range(8):
        for kind in ("images", "masks"):
            (data / kind).mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((32, 32), np.uint8)
            pixels[8:24, 4 + number : 20] = 255
            pixels[0, 0] = number if kind == "images" else 0
            Image.fromarray(pixels).save(data / kind / f"p{number}.png")
    for number in (2, 5):
        (data / "images" / f"p{number}.png").write_bytes(b"no image at all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim.learning-rat", "1"], ["learning-rat"]),
        (["--optim.learning-rate", "fast"], ["learning-rate"]),
        (["--optim.learning-rate", "-1"], ["optim.learning_rate"]),
        (["--config", "key.toml"], ["key.toml", "optim.learning_rat", "did you mean learning_rate?"]),
        (["--config", "absent"], ["--config absent"]),
        (["--data.root", "absent", "--data.phantoms", "0"], ["absent"]),
        (["--data.root", "bad", "--data.phantoms", "0"], ["p2.png", "p5.png"]),
    ],
    ids=["option", "type", "bound", "key", "configuration", "folder", "images"],
)
def test_bad_input_is_one_message_and_exit_code_2(place: Place, options: list[str], message: list[str]) -> None:
    (place.path / "key.toml").write_text("[optim]\nlearning_rat = 1\n")
    bad_image(place.path / "bad")
    result = place.train(*options, workdir=place.path / "never")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for part in message:
        assert part in result.stderr
    assert not (place.path / "never" / "checkpoints").exists()
