"""python -m benchmarks: run all benchmarks behind docs/performance.md in sequence, then draw the plots.

Takes 1.5 hours on two cores of an otherwise idle machine. If there is a GPU, `python -m benchmarks.gpu` runs instead.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence

import tyro

RESULTS = "benchmarks/results"

JAX, TORCH = ("auto", "remat", "fused"), ("channels_last", "channels_last compiled")
ALL_JAX, ALL_TORCH = (*JAX, "polyphase", "plain", "naive"), ("nchw", *TORCH, "channels_last retained")


@dataclasses.dataclass(frozen=True)
class Options:
    """Run all benchmarks and draw the plots."""

    only: str = ""
    """Run only commands that contain this text: steps_cpu, startup, pipeline or plots."""


def steps(
    name: str,
    sizes: Sequence[int],
    batches: Sequence[int],
    jax: Sequence[str],
    torch: Sequence[str],
    *more: str,
) -> list[str]:
    """Command line of a table of steps, saved as NAME.json."""
    numbers = ["--sizes", *map(str, sizes), "--batches", *map(str, batches)]
    return ["benchmarks.steps", *numbers, "--jax", *jax, "--torch", *torch, *more, "--output", f"{RESULTS}/{name}.json"]


def cpu() -> list[list[str]]:
    """Commands to run on a CPU."""
    return [
        steps("steps_cpu_batch1", [256], [1], ALL_JAX, ALL_TORCH, "--rounds", "7"),
        steps("steps_cpu_batch4", [256], [4], JAX, TORCH, "--rounds", "5"),
        steps("steps_cpu_narrow", [128], [4], JAX, TORCH, "--rounds", "7", "--repeats", "2", "--filters", "20"),
        steps("steps_cpu_128", [128], [8], JAX, TORCH, "--rounds", "5"),
        steps("steps_cpu_small", [128], [1, 8, 32], ("auto", "remat"), TORCH[:1], "--rounds", "5"),
        steps("steps_cpu_large", [512], [1], ("auto", "remat"), TORCH, "--rounds", "3"),
        # At this size PyTorch's gradients take over five minutes with channels_last.
        steps("steps_cpu_largest", [1024], [1], ("auto", "remat"), ("nchw",), "--rounds", "2", "--at-once", "1"),
        ["benchmarks.startup", "--output", f"{RESULTS}/startup_cpu.json"],
        ["benchmarks.pipeline", "--rounds", "3", "--train-steps", "60", "--output", f"{RESULTS}/pipeline_cpu.json"],
        ["benchmarks.predict_commands", "--output", f"{RESULTS}/predict_commands_cpu.json"],
        ["benchmarks.deploy", "--output", f"{RESULTS}/deploy_cpu.json"],
        ["benchmarks.check", "--output", f"{RESULTS}/check_cpu.json"],
        ["benchmarks.plots"],
    ]


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, prog="python -m benchmarks")
    import torch

    for command in [["benchmarks.gpu"]] if torch.cuda.is_available() else cpu():
        line = " ".join(command)
        if options.only in line:
            print(f"\n$ python -m {line}", flush=True)
            subprocess.run([sys.executable, "-m", *command], check=True)


if __name__ == "__main__":
    main()
