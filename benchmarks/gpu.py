"""python -m benchmarks.gpu: measure on a GPU everything that the docs want to know, most important first.

It ends within its time limit by itself. Results are written after every part, so nothing is lost when it is cut off:
one JSON file, and one page with the tables as printed.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from benchmarks import machine, output

TORCH = ("channels_last", "channels_last compiled")
NO_WANDB = ("--tracking.wandb", "disabled")
LEAST = 20
"""Seconds below which no further part is begun."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure parity, speed, memory and a training on a GPU, within a time limit."""

    minutes: float = 25
    """Time limit."""
    output: Path = Path("benchmarks/results/gpu")
    """Folder for results.json, page.md, the tables' JSON files and the training run."""
    only: tuple[str, ...] = ()
    """Run only the parts whose title contains one of these."""
    small: bool = False
    """Small images and few repetitions, to try the command on a computer without a GPU."""


class Part(NamedTuple):
    """A command to run, with the most minutes that it may take."""

    title: str
    command: Sequence[str]
    minutes: float


def parts(options: Options) -> list[Part]:
    """What to run, most important first."""
    small, folder = options.small, options.output
    workers = str(1 if small else min(12, len(os.sched_getaffinity(0))))
    # -v names each test even if the run is cut off; warnings of other versions are no failures.
    pytest = ("pytest", "-v", "-rfE", "--tb=short", "-W", "default", "-p", "no:cacheprovider", "-n", workers)
    parity = (*pytest, "parity_tests", "--torch-process", "--parity-report", str(folder / "parity.json"))

    def table(name: str, sizes: Sequence[int], batches: Sequence[int], jax: Sequence[str], precision: str) -> Part:
        sizes, batches = ([32], batches[:1]) if small else (sizes, batches)
        numbers = ("--sizes", *map(str, sizes), "--batches", *map(str, batches), "--precision", precision)
        rounds = ("--rounds", "1") if small else ("--rounds", "5", "--repeats", "5", "--compile-together")
        memory = ("--at-once", "4")  # more would not fit in 80 GB
        command = ("benchmarks.steps", *numbers, "--jax", *jax, "--torch", *TORCH, *rounds, *memory)
        return Part(f"Steps: {name.replace('_', ' ')}", (*command, "--output", str(folder / f"{name}.json")), 5)

    def profile(variant: str) -> Part:
        work = ("--size", "32") if small else ("--size", "512", "--batch", "8", "--precision", "bfloat16")
        command = ("benchmarks.profile", "--variant", variant, *work, "--lines", "30")
        return Part(f"Profile: {variant}", (*command, "--output", str(folder / f"profile_{variant}")), 2)

    def training(config: str, *options: str) -> Part:
        steps = ("--train.steps", "20", "--train.eval-every", "10", "--data.phantoms", "30") if small else options
        command = ("pdrunet_jax.train", "--config", config, "--data.root", str(folder / f"data_{config}"), *steps)
        return Part(f"Training: {config}", (*command, "--workdir", str(folder / f"run_{config}"), *NO_WANDB), 3)

    paths, best = ("auto", "pallas", "polyphase", "remat", "plain"), ("auto", "pallas")
    return [
        table("bfloat16_512", [512], [8], paths, "bfloat16"),
        Part("Parity on the card", (*parity, *(("-k", "layers") if small else ())), 4),
        training("phantom"),
        table("float32_512", [512], [8], ("auto", "polyphase", "plain"), "float32"),
        training("mura", "--data.phantoms", "300", "--train.precision", "bfloat16", "--train.steps", "2000"),
        table("tf32_512", [512], [8], ("auto", "polyphase"), "tf32"),
        profile("auto"),
        profile("pallas"),
        table("bfloat16_batches", [512], [1, 2, 4, 16, 32, 64], best, "bfloat16"),
        table("bfloat16_sizes", [256, 1024], [1, 4, 16], best, "bfloat16"),
        Part("First start", ("benchmarks.startup", "--output", str(folder / "startup.json")), 4),
        table("float32_sizes", [256, 1024], [1, 4, 16], ("auto",), "float32"),
    ]


def run(part: Part, seconds: float) -> dict[str, Any]:
    """Run a part for at most so many seconds; returns its status, time and output."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *part.command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its own processes can be ended with it
    )
    try:
        text, _ = process.communicate(timeout=seconds)
        status = "done" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        status = "cut off"
    took = time.monotonic() - began
    return {"title": part.title, "command": list(part.command), "status": status, "seconds": took, "output": text}


def page(device: str, results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown: each part with its last lines as printed."""
    sections = [f"# Measured on {device}\n"]
    for each in results:
        lines = "\n".join(each["output"].splitlines()[-60:])
        block = lines if "|---" in lines else f"```\n{lines}\n```"
        command = f"`python -m {' '.join(each['command'])}`"
        sections.append(f"## {each['title']}\n\n{command}: {each['status']}, {each['seconds']:.0f} s\n\n{block}\n")
    return "\n".join(sections)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.gpu")
    end = time.monotonic() + 60 * options.minutes
    ask = "import jax; print(f'{len(jax.devices())} x {jax.devices()[0].device_kind}')"
    device = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for part in parts(options):
        if options.only and not any(word in part.title for word in options.only):
            continue
        left = end - time.monotonic()
        if left < LEAST:
            results.append({"title": part.title, "command": list(part.command), "status": "not begun: no time left"})
            results[-1] |= {"seconds": 0.0, "output": ""}
        else:
            print(f"$ python -m {' '.join(part.command)}", flush=True)
            results.append(run(part, min(60 * part.minutes, left - 5)))
            print(f"{results[-1]['output'][-2000:]}\n{part.title}: {results[-1]['status']}", flush=True)
        facts = {"device": device, "machine": machine.facts(), "parts": results}
        output.write(facts, options.output / "results.json")
        (options.output / "page.md").write_text(page(device, results), encoding="utf-8")
    print(f"results: {options.output}/page.md")


if __name__ == "__main__":
    main()
