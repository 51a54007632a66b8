"""python -m benchmarks.profile: time per kind of operation in a training step or inference.

Records the step with JAX's profiler and sums the device operations by kind; --output keeps the trace for Perfetto or
XProf. Operations of different threads may overlap, so shares are of the total time in operations, not of the step.
"""

import collections
import dataclasses
import glob
import gzip
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.contenders import Work, jax_side
from pdrunet_jax.runtime.malloc import configure_malloc

CONTAINERS = ("while", "conditional", "call")
"""Operations that contain others; the trace lists both, so counting these would count time twice."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Profile a training step or inference by kind of operation."""

    what: Literal["train", "infer"] = "train"
    """Profile a training step or inference."""
    size: int = 256
    """Image size in pixels."""
    batch: int = 1
    """Images per step."""
    precision: str = "float32"
    """float32, tf32 or bfloat16."""
    variant: str = "auto"
    """Value of model.conv, or remat, or naive."""
    steps: int = 3
    """Steps to record."""
    lines: int = 15
    """Maximum number of table rows."""
    output: Path | None = None
    """Folder to save the trace in."""


def by_kind(events: Sequence[Mapping[str, object]]) -> dict[str, tuple[float, int]]:
    """Sum seconds and calls per kind of operation in trace events, longest first.

    The kind is the name in the compiled program without its number: `convolution` for `convolution.12`.
    """
    totals: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        arguments = event.get("args")
        if event.get("ph") != "X" or not isinstance(arguments, dict) or "hlo_op" not in arguments:
            continue
        kind = re.sub(r"[.\d]+$", "", str(arguments["hlo_op"]))
        if kind not in CONTAINERS:
            totals[kind].append(float(str(event["dur"])) * 1e-6)
    longest = sorted(totals.items(), key=lambda item: -sum(item[1]))
    return {kind: (sum(seconds), len(seconds)) for kind, seconds in longest}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.profile")
    configure_malloc()
    import jax

    sides = jax_side(options.variant, Work(options.size, options.batch, options.precision))
    call = sides.train if options.what == "train" else sides.infer
    call()
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(options.output or temporary)
        with jax.profiler.trace(folder):
            for _ in range(options.steps):
                call()
        path = max(glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True))
        with gzip.open(path, "rt", encoding="utf-8") as file:
            kinds = by_kind(json.load(file)["traceEvents"])
    total = sum(seconds for seconds, _ in kinds.values())
    print(f"{options.what}, {options.size}x{options.size}, batch {options.batch}, {sides.notes['device']}\n")
    print("| operation | calls per step | ms per step | share |\n|---|---|---|---|")
    for kind, (seconds, calls) in list(kinds.items())[: options.lines]:
        per_step = seconds / options.steps * 1e3
        print(f"| {kind} | {calls / options.steps:g} | {per_step:.1f} | {seconds / total:.0%} |")
    print(f"| total | | {total / options.steps * 1e3:.1f} | 100% |")


if __name__ == "__main__":
    main()
