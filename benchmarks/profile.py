"""python -m benchmarks.profile: where the time of a training step or an inference goes, by kind of operation.

JAX's profiler records the step; its trace stays in --output, to be opened in Perfetto or XProf. The table adds up what
ran on the device by kind of operation. Operations of several threads may overlap, so that the shares are of the time
that is spent in operations, not of the step.
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
"""Operations made of others, which the trace has as well: counted, they would be there twice."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Say where a step's time goes."""

    what: Literal["train", "infer"] = "train"
    """A training step or an inference."""
    size: int = 256
    """Image size in pixels."""
    batch: int = 1
    """Images a step."""
    precision: str = "float32"
    """float32, tf32 or bfloat16."""
    variant: str = "auto"
    """`model.conv`, or remat, or naive."""
    steps: int = 3
    """Steps that are recorded."""
    lines: int = 15
    """Lines of the table."""
    output: Path | None = None
    """Folder that keeps the trace."""


def by_kind(events: Sequence[Mapping[str, object]]) -> dict[str, tuple[float, int]]:
    """Seconds and calls of each kind of operation in a trace's events, longest first.

    A kind is an operation's name in the compiled program without its number: `convolution.12` is a convolution.
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
    """The command."""
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
    print("| operation | calls a step | ms a step | share |\n|---|---|---|---|")
    for kind, (seconds, calls) in list(kinds.items())[: options.lines]:
        per_step = seconds / options.steps * 1e3
        print(f"| {kind} | {calls / options.steps:g} | {per_step:.1f} | {seconds / total:.0%} |")
    print(f"| all | | {total / options.steps * 1e3:.1f} | 100% |")


if __name__ == "__main__":
    main()
