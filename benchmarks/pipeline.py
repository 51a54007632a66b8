"""python -m benchmarks.pipeline: images per second of the input pipeline and of equivalent PyTorch DataLoaders.

Both sides read the same PNG files (grey images, two-valued masks), resize them (bilinear; nearest) and yield shuffled
uint8 batches (`loaders.py`). Variants run in their own processes, in turns, for several rounds; medians are reported.
PyTorch is measured at its best: 0 or 2 persistent workers, and a variant that keeps decoded tensors in memory and
fetches a batch with one indexing operation.

The first epoch includes everything from closed files to the last batch. For us that is the check of the whole dataset
(two digests per file, patients, mask values), which also fills the cache; for PyTorch, starting workers and, for the
in-memory variants, decoding in threads. Imports and compilation are excluded on both sides.
"""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import machine, output
from benchmarks.loaders import Work

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = (
    "ours",
    "torch_0_workers",
    "torch_2_workers",
    "torch_in_memory",
    "ours_augmented",
    "torch_2_workers_augmented",
    "torch_in_memory_augmented",
)


@dataclass(frozen=True)
class Options:
    """Compare the throughput of the input pipeline with equivalent PyTorch DataLoaders."""

    images: int = 96
    """Images in the dataset, all in the training split."""
    source: int = 512
    """Height and width of the PNG files, in pixels."""
    size: int = 256
    """Height and width after resizing, in pixels."""
    batch_size: int = 8
    """Images per batch."""
    epochs: int = 6
    """Epochs; the first is reported separately."""
    rounds: int = 5
    """Processes per variant."""
    train_steps: int = 0
    """Also train this many steps with the phantom configuration and report the time spent waiting for data."""
    output: Path | None = None
    """JSON file for the results."""


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, prog="python -m benchmarks.pipeline")
    with tempfile.TemporaryDirectory() as name:
        result = compare(options, Path(name))
    print(table(result))
    output.write(result, options.output)


def compare(options: Options, folder: Path) -> dict[str, Any]:
    """Measure all variants in turn, `options.rounds` times."""
    data = folder / "data"
    draw(data, options.images, options.source)
    rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    shared = (options.images, options.size, options.batch_size, options.epochs)
    for number in range(options.rounds):
        for variant in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
            work = json.dumps(asdict(Work(variant, str(data), *shared)))
            command = [sys.executable, "-c", "from benchmarks import loaders; loaders.measure()", work]
            rounds[variant].append(json.loads(run(command).splitlines()[-1]))
            print(f"round {number + 1} of {options.rounds}: {variant} {rounds[variant][-1]}", flush=True)
    medians = {
        variant: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        for variant, measured in rounds.items()
    }
    result = {
        "benchmark": "pipeline",
        "settings": {name: value for name, value in vars(options).items() if isinstance(value, int)},
        "machine": {**machine.facts(), **{name: importlib.metadata.version(name) for name in ("grain", "pillow")}},
        "images_per_second": medians,
        "rounds": rounds,
    }
    if options.train_steps:
        result["training"] = train(folder, options.train_steps)
    return result


def draw(root: Path, count: int, side: int) -> None:
    """Draw phantoms and assign all of them to the training split."""
    from pdrunet_jax.data.phantoms.files import PhantomOptions, write_phantoms

    write_phantoms(root, PhantomOptions(count, size=side))
    rows = (root / "manifest.csv").read_text(encoding="utf-8").splitlines()
    kept = [rows[0], *(row.rsplit(",", 1)[0] + ",train" for row in rows[1:])]
    (root / "manifest.csv").write_text("\n".join(kept) + "\n", encoding="utf-8")


def train(folder: Path, steps: int) -> dict[str, float]:
    """Measure the wait for data in a run of the shipped phantom configuration."""
    run_folder = folder / "run"
    command = [sys.executable, "-m", "pdrunet_jax.train", "--config", str(ROOT / "configs" / "phantom.toml")]
    command += ["--workdir", str(run_folder), "--data.root", str(folder / "phantoms"), "--train.steps", str(steps)]
    run(command)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    later = [line for line in lines if "time/data_wait" in line][
        1:
    ]  # the first includes compilation and filling the cache
    return {
        "steps": steps,
        "data_wait": statistics.median(line["time/data_wait"] for line in later),
        "largest_data_wait": max(line["time/data_wait"] for line in later),
        "images_per_second": statistics.median(line["time/images_per_second"] for line in later),
    }


def run(command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def table(result: dict[str, Any]) -> str:
    """Format images per second and ratios to the fastest comparable PyTorch variant."""
    measured = result["images_per_second"]
    lines = [f"{'images/s':28}{'first epoch':>14}{'later epochs':>14}{'all epochs':>14}"]
    keys = ("first_epoch", "later_epochs", "all_epochs")
    for variant in VARIANTS:
        lines.append(f"{variant:28}" + "".join(f"{measured[variant][key]:14.0f}" for key in keys))
    for ending in ("", "_augmented"):
        for memory in (False, True):
            others = [
                name
                for name in VARIANTS
                if name.startswith("torch")
                and name.endswith("augmented") == bool(ending)
                and ("memory" in name) == memory
            ]
            ratios = (measured[f"ours{ending}"][key] / max(measured[name][key] for name in others) for key in keys)
            label = f"ratio to {'in memory' if memory else 'DataLoader'}{ending.replace('_', ', ')}"
            lines.append(f"{label:28}" + "".join(f"{ratio:14.2f}" for ratio in ratios))
    if training := result.get("training"):
        lines.append(f"training waits for data: {training['data_wait']:.2%} of the time")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
