"""Commands run by several real processes on this machine, and the tolerance between two runs."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.support import LONG
from tests.support.tiny import bright_square, save_image

STEPS, SAVE_EVERY, EVAL_EVERY, BATCH = (20, 5, 10, 8) if LONG else (10, 5, 5, 8)
NETWORK = "filters = 2" if LONG else 'name = "unet"\ndepth = 1\nfilters = 2'
CLOSE = 1e-10

CONFIG = f"""
seed = 3
[data]
root = "data"
size = [32]
phantoms = 25
val_fraction = 0.4
test_fraction = 0.2
[augment]
flip_horizontal = 0.5
gamma = 0.3
[model]
{NETWORK}
[optim]
ema = 0.9
[train]
precision = "float64"
steps = {STEPS}
batch_size = {BATCH}
log_every = 1
eval_every = {EVAL_EVERY}
save_every = {SAVE_EVERY}
keep_latest = 10
samples = 2
[tracking]
wandb = "disabled"
"""

Process = subprocess.Popen[str]


@dataclass
class Site:
    """A folder with a configuration and data, and the environment of the processes started there."""

    path: Path
    environment: dict[str, str]

    def start(self, *words: object, devices: int = 1) -> Process:
        """Start `python WORDS` in the folder, with so many virtual devices."""
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=self.path,
            env={**self.environment, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def command(self, name: str, *options: object, devices: int = 1) -> Process:
        return self.start("-m", f"pdrunet_jax.{name}", *options, devices=devices)

    def train(self, run: Path, *options: object, devices: int = 1) -> Process:
        return self.command("train", "--config", "tiny.toml", "--workdir", run, *options, devices=devices)

    @contextmanager
    def together(
        self, count: int, name: str, *options: object, each: Sequence[Sequence[object]] = (), devices: int = 1
    ) -> Iterator[list[Process]]:
        """Start so many processes of a command; process i also gets the options `each[i]`. Kill the rest on exit."""
        address = f"127.0.0.1:{free_port()}"
        where = ["--distributed.coordinator", address, "--distributed.processes", count, "--distributed.timeout", 120]
        processes = [
            self.command(name, *options, *where, "--distributed.index", index, *own, devices=devices)
            for index, own in enumerate(each or [()] * count)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    def train_together(
        self, run: Path, count: int, each: Sequence[Sequence[object]] = ()
    ) -> AbstractContextManager[list[Process]]:
        return self.together(count, "train", "--config", "tiny.toml", "--workdir", run, each=each)


def ends(processes: Sequence[Process], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Wait for processes; return exit code, output and errors of each."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        found.append((process.returncode, out, err))
    return found


def save_squares(root: Path, count: int, split: str) -> Path:
    """Save a dataset of bright squares, no two alike; the truth of every tenth is larger than its square."""
    rows = []
    for number in range(count):
        image = bright_square(24, 32, 2 + number % 8, 2 + number // 8, 12)
        truth = np.where(image > 128, 255, 0)
        if number % 10 == 0:
            truth[:2] = 255
        save_image(root / f"images/{number:03}.png", image)
        save_image(root / f"masks/{number:03}.png", truth)
        rows.append(f"images/{number:03}.png,masks/{number:03}.png,p{number},{split}")
    (root / "manifest.csv").write_text("\n".join(["image,mask,patient,split", *rows]))
    (root / "dataset.toml").write_text('name = "squares"\n[classes]\nsquare = 255\n')
    return root


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port


def wait_for(run: Path, step: int, processes: Sequence[Process]) -> None:
    """Wait until metrics.jsonl has `step`."""
    path = run / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.05)


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))


def state_of(run: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(run / "checkpoints" / str(step) / "state")
    return {
        jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(found: Path, expected: Path) -> None:
    """Parameters, statistics and optimizer state are bit-equal after the last step."""
    a, b = state_of(found), state_of(expected)
    assert [name for name in b if a[name].tobytes() != b[name].tobytes()] == []


def assert_close_runs(found: Path, expected: Path) -> None:
    """The samples of every step are equal; losses, parameters, statistics and optimizer state are within `CLOSE`."""
    lines, others = lines_of(found), lines_of(expected)
    for name in ("step", "data/sequence"):
        assert [line.get(name) for line in lines] == [line.get(name) for line in others]
    for name in ("train/loss", "val/loss"):
        a, b = ([line[name] for line in each if name in line] for each in (lines, others))
        np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE)
        assert len(a) == (STEPS if name == "train/loss" else STEPS // EVAL_EVERY)
    state, other = state_of(found), state_of(expected)
    assert state.keys() == other.keys()
    assert any(name.startswith("['params']") for name in state)
    for name in state:
        # relative, too, for running variances, which are far above 1
        np.testing.assert_allclose(state[name], other[name], rtol=CLOSE, atol=CLOSE, err_msg=name)
    rows = [(run / "evaluation" / "test" / "per_image.csv").read_text() for run in (found, expected)]
    assert rows[0] == rows[1]
