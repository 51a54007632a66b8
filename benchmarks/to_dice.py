"""python -m benchmarks.to_dice: time until a validation Dice is reached, with our command and with a loop in PyTorch.

Ours is the training command as a user types it: from its start to the validation line, with imports, compilation,
checkpoints and logs; programs are stored from an earlier start. PyTorch has every advantage: its clock starts after
imports and data, its batches are augmented beforehand, by our code and with the same random numbers, and it writes
nothing. Both start with the same weights, see the same images in the same order, and differ in their dropout masks
alone. They take turns, a whole training each.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import machine, output


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure the time to a validation Dice."""

    data: Path
    """Dataset folder."""
    dice: float = 0.93
    """Validation Dice to reach."""
    size: int = 128
    """Height and width of the images."""
    filters: int = 20
    """Channels of every hidden layer."""
    batch_size: int = 4
    """Images a step."""
    steps: int = 400
    """Length of the schedule, and most steps."""
    every: int = 20
    """Steps between validations."""
    rounds: int = 2
    """Trainings of each side; the median is reported."""
    output: Path | None = None
    """JSON file for the results."""

    def settings(self) -> list[str]:
        """Options of the training command."""
        given = {
            "data.root": self.data.resolve(),
            "data.size": self.size,
            "model.filters": self.filters,
            "train.batch-size": self.batch_size,
            "train.steps": self.steps,
            "train.eval-every": self.every,
            "train.save-every": self.every,
            "tracking.wandb": "disabled",
        }
        return ["--config", "mura", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]


def ours(options: Options, folder: Path) -> dict[str, float]:
    """Seconds and steps until the validation line of the command's metrics shows the Dice."""
    command = [sys.executable, "-m", "pdrunet_jax.train", *options.settings(), "--workdir", str(folder)]
    metrics = folder / "metrics.jsonl"
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            time.sleep(0.1)
            for line in metrics.read_text("utf-8").splitlines() if metrics.exists() else ():
                found = json.loads(line)
                if found.get("val/dice", 0) >= options.dice:
                    return {"seconds": time.perf_counter() - started, "step": found["step"], "dice": found["val/dice"]}
    finally:
        process.kill()
        process.wait()
    sys.exit(f"our training did not reach a Dice of {options.dice}")


def theirs(options: Options, kind: str) -> dict[str, float]:
    """The same for PyTorch, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.to_dice_torch", kind, str(options.dice), str(options.every)]
    done = subprocess.run(
        [*command, *options.settings()], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.to_dice")
    sides: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        ours(options, Path(name) / "first")  # stores the programs
        for number in range(options.rounds):
            runs: dict[str, Any] = {"ours": lambda number=number: ours(options, Path(name) / f"run_{number}")}
            for kind in ("channels_last", "channels_last compiled"):
                runs[f"torch {kind}"] = lambda kind=kind: theirs(options, kind)
            for side, run in runs.items():
                sides.setdefault(side, []).append(run())
                print(side, sides[side][-1], flush=True)
    print(f"| | seconds to a validation Dice of {options.dice} | steps |\n|---|---|---|")
    for side, found in sides.items():
        print(f"| {side} | {np.median([run['seconds'] for run in found]):.0f} | {found[0]['step']:.0f} |")
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | float)}
    output.write({"machine": machine.facts(), "settings": settings, "runs": sides}, options.output)


if __name__ == "__main__":
    main()
