"""python -m benchmarks.sharding: memory and communication of a training step on several devices.

Read from the program compiled for virtual devices of the CPU; nothing is run. Speed on such devices would mean nothing,
because they share the cores.
"""

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from benchmarks import machine, output
from pdrunet_jax.config import Config
from pdrunet_jax.runtime.devices import Placement, make_mesh
from pdrunet_jax.train.step import build_model, create_state, make_train_step

MIB = 2**20
KINDS = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")

_CALL = re.compile(rf"= (.+?) ({'|'.join(KINDS)})\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d+|)(?:e\w+)?\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile training steps for several devices and report what each device holds and sends."""

    size: int = 256
    """Image size in pixels."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices that the batch is split over."""
    batch: int = 8
    """Images in the batch."""
    paths: tuple[str, ...] = ("fused", "plain")
    """Values of `model.conv`."""
    precision: str = "float32"
    """float32 or bfloat16."""
    remat: bool = False
    """Recompute activations in the backward pass."""
    output: Path | None = None
    """JSON file for the results."""


class Collective(NamedTuple):
    """One communication between devices."""

    kind: str
    """One of `KINDS`."""
    elements: int
    """Elements of its results on one device."""
    bytes: int
    """Their size."""


def collectives(program: str) -> Iterator[Collective]:
    """Find the communications in the text of a program compiled for CPUs; one in a loop counts once."""
    for line in program.splitlines():
        if found := _CALL.search(line):
            arrays = [
                (math.prod(map(int, filter(None, shape.split(",")))), max(1, int(bits or 8) // 8))
                for _, bits, shape in _ARRAY.findall(found[1])
            ]
            elements = sum(count for count, _ in arrays)
            yield Collective(found[2], elements, sum(count * size for count, size in arrays))


def measure(options: Options, path: str, devices: int) -> dict[str, Any]:
    """Compile a training step and return the memory, in bytes, and communication of one device."""
    config = Config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, conv=path),
        train=dataclasses.replace(config.train, precision=options.precision, remat=options.remat),
    )
    place = Placement(make_mesh(jax.devices()[:devices]))
    graphdef, state = create_state(config, build_model(config, 1))
    shape = (options.batch, options.size, options.size)
    batch = {
        "image": np.zeros((*shape, 1), np.uint8),
        "mask": np.zeros(shape, np.uint8),
        "index": np.zeros(options.batch, np.int32),
        "epoch": np.zeros(options.batch, np.int32),
    }
    started = time.perf_counter()
    train_step = make_train_step(config, graphdef, 1, place.mesh)
    step = train_step.lower(place.replicate(state), place.shard_batch(batch)).compile()
    seconds = time.perf_counter() - started
    found = list(collectives(step.as_text()))
    gathered = max((call.elements for call in found if call.kind == "all-gather"), default=0)
    return {
        "path": path,
        "devices": devices,
        "images": options.batch,
        "compile_s": round(seconds, 1),
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
        "activation_elements": math.prod(shape) * config.model.filters,
        "largest_gather_elements": gathered,
        "calls": {kind: Counter(call.kind for call in found)[kind] for kind in KINDS},
        "bytes": {kind: sum(call.bytes for call in found if call.kind == kind) for kind in KINDS},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.sharding")
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    print("| path | devices | MiB a device | share | sums, MiB (calls) | largest gather, of an activation |")
    print("|---|---|---|---|---|---|")
    results = []
    for path in options.paths:
        for devices in options.devices:
            one = measure(options, path, devices)
            results.append(one)
            first = next(other for other in results if other["path"] == path)
            print(
                f"| {path} | {devices} | {one['temporary_bytes'] / MIB:.0f} "
                f"| {one['temporary_bytes'] / first['temporary_bytes']:.1%} "
                f"| {one['bytes']['all-reduce'] / MIB:.2f} ({one['calls']['all-reduce']}) "
                f"| {one['largest_gather_elements'] / one['activation_elements']:.1%} |",
                flush=True,
            )
    stated = {name: value for name, value in dataclasses.asdict(options).items() if name != "output"}
    output.write({"machine": machine.facts(), "options": stated, "results": results}, options.output)


if __name__ == "__main__":
    main()
