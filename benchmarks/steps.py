"""python -m benchmarks.steps: compare training steps and inference of JAX and PyTorch in one run.

Each contender runs in its own process and they take turns, a few repetitions each, so that disturbances of the machine
affect all alike. Ratios are relative to PyTorch's fastest variant.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks import machine, output
from benchmarks.contenders import Work

JAX = ("auto", "plain", "polyphase", "naive")
TORCH = ("nchw", "channels_last", "channels_last compiled")


@dataclasses.dataclass(frozen=True)
class Options:
    """Time training steps and inference of JAX and PyTorch."""

    sizes: tuple[int, ...] = (256,)
    """Image sizes, in pixels."""
    batches: tuple[int, ...] = (1, 4)
    """Batch sizes."""
    filters: int = 40
    """Channels of every hidden layer."""
    precision: str = "float32"
    """float32, tf32 or bfloat16."""
    jax: tuple[str, ...] = JAX
    """JAX variants: auto, native, fused, polyphase, plain, remat, naive."""
    torch: tuple[str, ...] = TORCH
    """PyTorch variants: nchw or channels_last, optionally compiled or retained."""
    rounds: int = 7
    """Turns per contender; the median of all repetitions is reported."""
    repeats: int = 1
    """Repetitions per turn."""
    at_once: int = 0
    """Contenders in memory at the same time, which take turns; 0: all."""
    compile_together: bool = False
    """Compile the contenders that are in memory at the same time together: for GPUs, whose hosts have many cores."""
    stored: bool = False
    """Use cached programs of earlier runs. Otherwise every contender compiles, as on a user's first run."""
    output: Path | None = None
    """JSON file for the results."""


class Contender:
    """A worker process and its measurements."""

    def __init__(self, framework: str, variant: str, work: Work, *, stored: bool) -> None:
        self.name = f"{framework} {variant}"
        # By default JAX preallocates most of a GPU's memory, which would leave none for the others.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._store = tempfile.TemporaryDirectory(prefix="benchmark")
        self._log = Path(self._store.name) / "log"
        if not stored:
            environment |= dict.fromkeys(("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), self._store.name)
        command = [sys.executable, "-m", "benchmarks.worker", framework, variant, json.dumps(dataclasses.asdict(work))]
        pipe = subprocess.PIPE
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
        self.seconds: dict[str, list[float]] = {"train": [], "infer": []}
        self.notes: dict[str, Any] = {}
        self.failed = False

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.failed = self.failed or not line
        return json.loads(line) if line else None

    def start(self) -> None:
        """Wait until the worker has compiled, then warm up with one training step and one inference."""
        self.notes = self._answer() or {}
        for order in self.seconds:
            self.turn(order, 1, keep=False)

    def ask(self, order: str, count: int) -> Any:
        """Send an order and wait for the answer; None if the process died."""
        if self.failed:
            return None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{order} {count}\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # killed, usually out of memory; the others continue
            self.failed = True
            return None
        return self._answer()

    def turn(self, order: str, count: int, *, keep: bool = True) -> None:
        """Time `count` repetitions."""
        answer = self.ask(order, count)
        if keep and answer:
            self.seconds[order] += answer

    def end(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.wait()
        if self.failed and (log := self._log.read_text("utf-8", "replace").strip()):
            self.notes["error"] = "\n".join(log.splitlines()[-20:])
        self._store.cleanup()

    def result(self) -> dict[str, Any]:
        """Medians, all times, and the notes of the worker."""
        times: dict[str, Any] = {}
        for order, seconds in self.seconds.items():
            if seconds:
                times |= {f"{order}_s": statistics.median(seconds), f"{order}_all_s": seconds}
        return {"name": self.name, **times, **self.notes, "failed": self.failed}


def measure(work: Work, options: Options) -> list[dict[str, Any]]:
    """Measure all contenders on one piece of work; those that are in memory at the same time take turns."""
    sides = [("jax", variant) for variant in options.jax] + [("torch", variant) for variant in options.torch]
    count = options.at_once or len(sides)
    groups = [sides[first : first + count] for first in range(0, len(sides), count)]
    return [result for group in groups for result in _compete(group, work, options)]


def _compete(sides: Sequence[tuple[str, str]], work: Work, options: Options) -> list[dict[str, Any]]:
    contenders = []
    for framework, variant in sides:
        contenders.append(Contender(framework, variant, work, stored=options.stored))
        if not options.compile_together:
            contenders[-1].start()
    for contender in contenders if options.compile_together else ():
        contender.start()
    for _ in range(options.rounds):
        # Inference is short: one burst of load on a shared host could cover all of it, so it is measured three times.
        for order in ("train", "infer", "infer", "infer"):
            for contender in contenders:
                contender.turn(order, options.repeats)
    for contender in contenders:
        memory = contender.ask("memory", 2) or {}
        contender.notes |= {f"{kind}_mib": size / 2**20 for kind, size in memory.items() if size}
        contender.end()
    return [contender.result() for contender in contenders]


def table(results: Sequence[dict[str, Any]], work: Work, limits: dict[str, float]) -> str:
    """Format the results of one piece of work as a Markdown table."""
    # "retained" is out of competition: PyTorch users do not have it. It shows how much of our lead is the allocator.
    rivals = [row for row in results if row["name"].startswith("torch") and "retained" not in row["name"]]
    theirs = [row for row in rivals if "train_s" in row]
    best = {key: min((row[key] for row in theirs), default=float("nan")) for key in ("train_s", "infer_s")}
    flops = machine.FLOPS_PER_PIXEL * (work.filters / 40) ** 2 * work.size**2 * work.batch  # a little more, in truth
    lines = [
        f"{work.size}x{work.size}, {work.filters} filters, batch {work.batch}, {work.precision}",
        "",
        "| | train step | ratio | share of peak | inference | ratio | share of peak | memory | compile |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        if "train_s" not in row:
            reasons = [line for line in str(row.get("error", "")).splitlines() if "Error" in line] or ["no message"]
            lines.append(f"| {row['name']} | failed: {reasons[-1][:200]} |")
            continue
        memory = row.get("device_mib", row.get("resident_mib", 0))
        train, infer = (f"{1e3 * row[key]:.{0 if row[key] > 0.1 else 1}f} ms" for key in ("train_s", "infer_s"))
        lines.append(
            f"| {row['name']} | {train} | {row['train_s'] / best['train_s']:.2f} "
            f"| {3 * flops / row['train_s'] / limits['flops']:.0%} "
            f"| {infer} | {row['infer_s'] / best['infer_s']:.2f} "
            f"| {flops / row['infer_s'] / limits['flops']:.0%} "
            f"| {memory:,.0f} MiB | {row.get('compile_train_s', 0):.1f} s |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.steps")
    limits = machine.roofline(options.precision)
    print(f"{machine.facts()['processor']}, {machine.facts()['cores']} cores")
    print(f"peak: {limits['flops'] / 1e9:,.0f} GFLOP/s, {limits['bytes_per_s'] / 1e9:,.0f} GB/s\n")
    runs = []
    for size in options.sizes:
        for batch in options.batches:
            work = Work(size, batch, options.precision, options.filters)
            results = measure(work, options)
            runs.append({"work": dataclasses.asdict(work), "results": results})
            print(table(results, work, limits), flush=True)
            print()
            output.write({"machine": machine.facts(), "limits": limits, "runs": runs}, options.output)


if __name__ == "__main__":
    main()
