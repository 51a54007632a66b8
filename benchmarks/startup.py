"""python -m benchmarks.startup: import time and time to the first step of the training command.

Every figure comes from fresh processes. The command trains on phantoms of the given size, first with an empty cache of
compiled programs, then with a warm one. Time to the first step runs from process start until the step's line appears in
metrics.jsonl; the process is then killed.
"""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks import machine, output

IMPORTS = ("pdrunet_jax", "jax", "torch", "pdrunet_jax.train.run")


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure import time and time to the first training step."""

    size: int = 256
    """Image size in pixels."""
    filters: int = 40
    """Channels of every hidden layer."""
    rounds: int = 5
    """Processes per figure; the median is reported."""
    output: Path | None = None
    """JSON file for the results."""


def import_seconds(module: str, rounds: int) -> float:
    """Median time to import `module` in a fresh process, without interpreter start-up."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return statistics.median(
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=machine.environment()
            ).stdout
        )
        for _ in range(rounds)
    )


def first_step_seconds(folder: Path, cache: Path, number: int, options: Options) -> float:
    """Time from the start of the training command to its first logged step."""
    workdir = folder / f"run_{number}"
    command = [sys.executable, "-m", "pdrunet_jax.train", "--config", "phantom", "--workdir", str(workdir)]
    command += ["--data.root", str(folder / "data"), "--data.size", str(options.size), "--train.batch-size", "1"]
    command += ["--model.filters", str(options.filters), "--train.steps", "50", "--train.log-every", "1"]
    command += ["--train.eval-every", "1000", "--tracking.wandb", "disabled"]
    environment = machine.environment(XDG_CACHE_HOME=str(cache))
    metrics = workdir / "metrics.jsonl"
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and "train/loss" not in (metrics.read_text("utf-8") if metrics.exists() else ""):
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.poll() is not None and process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read() if process.stderr else ''}")
    process.kill()
    process.communicate()
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.startup")
    result: dict[str, Any] = {"machine": machine.facts(), "settings": {"size": options.size, "rounds": options.rounds}}
    result["import_s"] = {module: import_seconds(module, options.rounds) for module in IMPORTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw = [sys.executable, "-m", "pdrunet_jax.data", "phantom", str(folder / "data"), "--count", "24"]
        subprocess.run([*draw, "--size", str(options.size)], check=True, capture_output=True)
        cold = first_step_seconds(folder, folder / "cache", 0, options)
        first_step_seconds(folder, folder / "cache", 1, options)  # completes the cache after the killed process
        warm = [first_step_seconds(folder, folder / "cache", number + 2, options) for number in range(options.rounds)]
    result["first_step_s"] = {"cold": cold, "warm": statistics.median(warm)}
    for module, seconds in result["import_s"].items():
        print(f"import {module:20} {seconds:6.2f} s")
    for cache, seconds in result["first_step_s"].items():
        print(f"first step, {cache} cache     {seconds:6.2f} s")
    output.write(result, options.output)


if __name__ == "__main__":
    main()
