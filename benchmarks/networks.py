"""python -m benchmarks.networks: parameters, training step and inference of PDR-UNet, U-Net and FusionNet.

The networks take turns, as in `benchmarks.steps`. The fastest of the repetitions is reported: on a shared machine, it
is the one that was disturbed least.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks import machine, output
from benchmarks.contenders import Work
from benchmarks.steps import Contender
from pdrunet_jax.config import Config
from pdrunet_jax.model.build import with_network
from pdrunet_jax.model.weights import name_table

NETWORKS = (
    "name=pdrunet filters=40",
    "name=unet depth=4 filters=7",
    "name=unet depth=3 filters=14",
    "name=unet depth=4 filters=32",
    "name=unet depth=4 filters=64",
    "name=fusionnet depth=3 filters=9",
    "name=fusionnet depth=4 filters=16",
    "name=fusionnet depth=4 filters=24",
)
"""The default network, the same number of parameters, about the same time, and the paper's U-Net."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare networks by parameters and time."""

    networks: tuple[str, ...] = NETWORKS
    """Name and options of each network, as in "unet filters=32"."""
    size: int = 128
    """Image size, in pixels."""
    batch: int = 4
    """Batch size."""
    rounds: int = 3
    """Turns per network, of three repetitions each."""
    output: Path | None = None
    """JSON file for the results."""


def parameters(network: str) -> int:
    """Number of parameters of a network with one input and one output channel."""
    settings = with_network(Config(), network).model
    options = {key: value for key, value in settings.wiring().items() if key != "shortcut"} | {"outputs": 1}
    return sum(math.prod(row.shape) for row in name_table(**options) if row.parameter)


def measure(options: Options) -> list[dict[str, Any]]:
    """Time all networks, in turns."""
    work, contenders = Work(options.size, options.batch), []
    for network in options.networks:  # one at a time: compilation uses all cores
        contender = Contender("jax", f"auto {network}", work, stored=False)
        contender.start()
        contenders.append(contender)
    for _ in range(options.rounds):
        for order in ("train", "infer", "infer"):
            for contender in contenders:
                contender.turn(order, 3)
    for contender in contenders:
        contender.end()
    return [
        {**contender.result(), "network": network, "parameters": parameters(network)}
        for contender, network in zip(contenders, options.networks, strict=True)
    ]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Format the results as a Markdown table."""
    lines = ["| network | parameters | training step | inference |", "|---|---|---|---|"]
    for row in results:
        train, infer = (min(row[f"{order}_all_s"]) * 1e3 for order in ("train", "infer"))
        lines.append(f"| {row['network']} | {row['parameters']:,} | {train:.0f} ms | {infer:.0f} ms |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.networks")
    results = measure(options)
    settings = {"size": options.size, "batch": options.batch}
    output.write({"machine": machine.facts(), "settings": settings, "results": results}, options.output)
    print(table(results))


if __name__ == "__main__":
    main()
