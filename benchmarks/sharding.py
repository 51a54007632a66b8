"""python -m benchmarks.sharding: memory and communication of a training step on a mesh, from the compiled program.

The devices are parts of this CPU, and nothing is run: what XLA has allotted to each device and what it lets them send
is in the compiled program. Speed on such devices would say nothing, as they share the cores.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks import machine, output
from benchmarks.collectives import KINDS, collectives
from pdrunet_jax.config import Config
from pdrunet_jax.runtime.devices import DATA, make_mesh, place_batch, replicate
from pdrunet_jax.train.step import build_model, create_state, make_train_step

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile training steps for meshes and say what each device holds and sends."""

    size: int = 512
    """Image size in pixels."""
    rows: tuple[int, ...] = (1, 2, 4, 8)
    """Parts that a single image is split into."""
    data: tuple[int, ...] = ()
    """Devices that a batch is spread over."""
    batch: int = 8
    """Images of that batch."""
    paths: tuple[str, ...] = ("fused", "plain")
    """Values of `model.conv`."""
    precision: str = "float32"
    """float32 or bfloat16."""
    remat: bool = False
    """Whether blocks are computed twice."""
    output: Path | None = None
    """JSON file of the results."""


def measure(options: Options, path: str, data: int, rows: int) -> dict[str, Any]:
    """Memory in bytes and communications of one device, for a batch of one image where `rows` is what varies."""
    images = options.batch if options.data else 1
    config = Config()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, conv=path),
        train=dataclasses.replace(config.train, precision=options.precision, remat=options.remat),
    )
    mesh = make_mesh(rows, jax.devices()[: data * rows])
    graphdef, state = create_state(config, build_model(config, 1, mesh))
    shape = (images, options.size, options.size)
    batch = {
        "image": np.zeros((*shape, 1), np.uint8),
        "mask": np.zeros(shape, np.uint8),
        "index": np.zeros(images, np.int32),
        "epoch": np.zeros(images, np.int32),
    }
    started = time.perf_counter()
    step = make_train_step(config, graphdef, 1, mesh).lower(replicate(mesh, state), place_batch(mesh, batch)).compile()
    seconds = time.perf_counter() - started
    found = list(collectives(step.as_text()))
    gathered = max((call.elements for call in found if call.kind == "all-gather"), default=0)
    return {
        "path": path,
        "data": mesh.shape[DATA],
        "rows": rows,
        "images": images,
        "compile_s": round(seconds, 1),
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
        "activation_elements": images * options.size**2 * config.model.filters,
        "largest_gather_elements": gathered,
        "calls": {kind: Counter(call.kind for call in found)[kind] for kind in KINDS},
        "bytes": {kind: sum(call.bytes for call in found if call.kind == kind) for kind in KINDS},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.sharding")
    meshes = [(data, 1) for data in options.data] or [(1, rows) for rows in options.rows]
    jax.config.update("jax_num_cpu_devices", max(data * rows for data, rows in meshes))
    print("| path | devices | MiB a device | share | neighbours, MiB | sums, MiB | largest gather, of an activation |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for path in options.paths:
        for data, rows in meshes:
            one = measure(options, path, data, rows)
            results.append(one)
            first = next(other for other in results if other["path"] == path)
            print(
                f"| {path} | {data} x {rows} | {one['temporary_bytes'] / MIB:.0f} "
                f"| {one['temporary_bytes'] / first['temporary_bytes']:.1%} "
                f"| {one['bytes']['collective-permute'] / MIB:.1f} ({one['calls']['collective-permute']}) "
                f"| {one['bytes']['all-reduce'] / MIB:.2f} ({one['calls']['all-reduce']}) "
                f"| {one['largest_gather_elements'] / one['activation_elements']:.1%} |",
                flush=True,
            )
    stated = {name: value for name, value in dataclasses.asdict(options).items() if name != "output"}
    output.write({"machine": machine.facts(), "options": stated, "results": results}, options.output)


if __name__ == "__main__":
    main()
