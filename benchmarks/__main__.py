"""python -m benchmarks: every figure of docs/performance.md, one benchmark after the other, and the plots.

An hour and a half on two cores; nothing else should run meanwhile. On a machine with a GPU it measures there:
bfloat16 and float32, with PyTorch compiled, at the batches that memory allows.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence

import tyro

RESULTS = "benchmarks/results"

JAX, TORCH = ("auto", "remat", "naive"), ("channels_last", "channels_last compiled")
ALL_JAX, ALL_TORCH = ("auto", "remat", "polyphase", "plain", "naive"), ("nchw", *TORCH, "channels_last retained")
GPU_JAX, GPU_TORCH = ("plain", "polyphase", "fused"), TORCH


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure everything and draw it."""

    only: str = ""
    """Run only those whose command has this in it: steps_cpu, startup, pipeline, plots."""


def steps(
    name: str,
    sizes: Sequence[int],
    batches: Sequence[int],
    jax: Sequence[str],
    torch: Sequence[str],
    *more: str,
) -> list[str]:
    """The arguments of a table of steps, kept in `name`."""
    numbers = ["--sizes", *map(str, sizes), "--batches", *map(str, batches)]
    return ["benchmarks.steps", *numbers, "--jax", *jax, "--torch", *torch, *more, "--output", f"{RESULTS}/{name}.json"]


def cpu() -> list[list[str]]:
    """What is measured on a CPU."""
    return [
        steps("steps_cpu_batch1", [256], [1], ALL_JAX, ALL_TORCH, "--rounds", "7"),
        steps("steps_cpu_batch4", [256], [4], JAX, TORCH, "--rounds", "5"),
        steps("steps_cpu_small", [128], [1, 8, 32], ("auto", "remat"), TORCH[:1], "--rounds", "5"),
        steps("steps_cpu_large", [512], [1], ("auto", "remat"), TORCH, "--rounds", "3"),
        # PyTorch's gradients with channels_last take over five minutes there.
        steps("steps_cpu_largest", [1024], [1], ("auto", "remat"), ("nchw",), "--rounds", "2", "--one-by-one"),
        ["benchmarks.startup", "--output", f"{RESULTS}/startup_cpu.json"],
        ["benchmarks.pipeline", "--rounds", "3", "--train-steps", "60", "--output", f"{RESULTS}/pipeline_cpu.json"],
        ["benchmarks.plots"],
    ]


def gpu() -> list[list[str]]:
    """What is measured on a GPU; larger batches one contender at a time, each then having all the memory."""
    plan = []
    for precision in ("bfloat16", "float32"):
        more = ("--precision", precision, "--rounds", "7", "--repeats", "5", "--one-by-one")
        plan.append(steps(f"steps_gpu_{precision}", [512], [1, 2, 4, 8, 16, 32], GPU_JAX, GPU_TORCH, *more))
        plan.append(steps(f"steps_gpu_sizes_{precision}", [128, 256, 1024], [1, 4], GPU_JAX, GPU_TORCH, *more))
    return [*plan, ["benchmarks.startup", "--output", f"{RESULTS}/startup_gpu.json"], ["benchmarks.plots"]]


def main() -> None:
    """The command."""
    options = tyro.cli(Options, prog="python -m benchmarks")
    import torch

    for command in gpu() if torch.cuda.is_available() else cpu():
        line = " ".join(command)
        if options.only in line:
            print(f"\n$ python -m {line}", flush=True)
            subprocess.run([sys.executable, "-m", *command], check=True)


if __name__ == "__main__":
    main()
