"""Training processes for the fault tests, and the comparison of two finished runs.

Every process is a real `python -m pdrunet_jax.train`. All share one store of compiled programs; without it most of the
time would go into compiling.
"""

import fcntl
import json
import random
import re
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file

from tests.support import LONG, ROOT

FIGURES = ROOT / "benchmarks" / "results" / "stress.json"

STEPS, SAVE_EVERY, EVAL_EVERY = (36, 3, 12) if LONG else (16, 4, 8)
FILTERS = 4

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
filters = {FILTERS}
[optim]
ema = 0.9
[train]
steps = {STEPS}
batch_size = 2
log_every = 1
eval_every = {EVAL_EVERY}
save_every = {SAVE_EVERY}
samples = 0
[tracking]
wandb = "disabled"
"""


@dataclass
class Place:
    """A folder with a configuration, data and a finished, undisturbed run."""

    path: Path
    environment: dict[str, str]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Environment variable by which `left_behind` finds the processes started here and their descendants."""

    @property
    def undisturbed(self) -> Path:
        return self.path / "undisturbed"

    def start(self, *options: str, workdir: Path | None = None, **environment: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "pdrunet_jax.train", "--config", "tiny.toml"]
        command += ["--workdir", str(workdir or self.path / "run"), *options]
        return subprocess.Popen(
            command,
            cwd=self.path,
            env={**self.environment, "MARK": self.mark, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(
        self, *options: str, workdir: Path | None = None, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        with self.start(*options, workdir=workdir, **environment) as process:
            out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def left_behind(self, patience: float = 5.0) -> list[str]:
        """Return the command lines of processes started here, or by those, that still run after `patience` seconds."""
        end = time.monotonic() + patience
        while (found := self._alive()) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def _alive(self) -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"MARK={self.mark}".encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text())
            except OSError:  # the process has ended, or belongs to another user
                continue
        return found


def content(run: Path, step: int = STEPS) -> dict[str, Any]:
    """Collect everything that must be equal in two finished runs: array bytes, metadata, metrics, best weights."""
    final = run / "checkpoints" / str(step)
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(final / "state")
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {jax.tree_util.keystr(name): (str(leaf.dtype), np.asarray(leaf).tobytes()) for name, leaf in leaves}
    meta = json.loads((final / "meta" / "metadata").read_text())
    metrics = [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines_of(run)]
    best = {name: array.tobytes() for name, array in load_file(run / "best.safetensors").items()}
    return {"arrays": arrays, "meta": meta, "metrics": metrics, "best": best}


def assert_same_run(found: Path, expected: Path, step: int = STEPS) -> None:
    a, b = content(found, step), content(expected, step)
    kinds = {part.split("'")[1] for part in b["arrays"]}
    assert kinds >= {"params", "stats", "opt_state", "ema", "ema_stats", "step", "diverged"}
    assert len(b["meta"]["extra"]["sequence"]) == 64
    assert a["arrays"].keys() == b["arrays"].keys()
    assert [name for name in a["arrays"] if a["arrays"][name] != b["arrays"][name]] == []
    assert a["meta"] == b["meta"]
    assert a["metrics"] == b["metrics"]
    assert a["best"] == b["best"]


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Read the complete lines of metrics.jsonl; a killed process may leave half a line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def done(run: Path) -> int:
    """Return the last step of a run in metrics.jsonl."""
    return max((line["step"] for line in lines_of(run)), default=0)


def resumed_at(out: str) -> int:
    found = re.search(r"^resumed .* at step (\d+)$", out, re.MULTILINE)
    return int(found[1]) if found else 0


def steps_in(out: str, pattern: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, out)]


def read_until(process: "subprocess.Popen[str]", step: int, seen: list[str]) -> bool:
    """Read lines into `seen` until one reports `step` or a later step; False if the process ends first."""
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if (found := re.match(r"step (\d+)/", line)) and int(found[1]) >= step:
            return True
    return False


def record(name: str, **figures: Any) -> None:
    """In the long form, write the figures to benchmarks/results/stress.json."""
    if LONG:
        FIGURES.parent.mkdir(parents=True, exist_ok=True)
        with FIGURES.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # tests run in several processes
            file.seek(0)
            known = json.loads(file.read() or "{}")
            file.truncate(0)
            file.write(json.dumps(known | {name: figures}, indent=2, sort_keys=True) + "\n")


def stream(*seed: object) -> random.Random:
    """Return a random generator that is the same in every run of the tests."""
    return random.Random(repr(seed))
