"""python -m benchmarks.scaling: what devices have to send, against how fast links are, on paper.

Nothing is measured here. Bytes and calls follow from the network (`benchmarks.sharding` reads the same figures from the
compiled program); links and the time of a device are assumptions, each an option or a table below. Nothing is taken to
overlap with computation, so that the times of communication are upper bounds under these assumptions.
"""

import dataclasses
from collections.abc import Sequence

import tyro

from pdrunet_jax.model.network import BLOCKS

FILTERS = 40
PARAMETERS = 363_521
CONVOLUTIONS = 2 * len(BLOCKS)
SUMS = 4 * CONVOLUTIONS + 1
"""Sums over all devices that wait for one another on the plain path, which "auto" is on GPUs: two a normalisation
forward and two backward, kernels' gradients along with them, and one for the rest. The fused path needs one less in
each normalisation's backward pass."""

EXCHANGES = 2 * CONVOLUTIONS - 1
"""Exchanges with both neighbours at once: input of each convolution, gradient of each result but the first one's."""


@dataclasses.dataclass(frozen=True)
class Link:
    """One direction of what connects a device to the others."""

    name: str
    bytes_per_s: float
    latency: float
    """Seconds that a sum of a few numbers takes; an exchange with a neighbour takes half of that."""


WITHIN = (
    Link("NVLink 4 (450 GB/s)", 450e9, 20e-6),
    Link("PCIe 5 x16 (63 GB/s)", 63e9, 20e-6),
)
"""Between the devices of a machine."""

BETWEEN = (
    Link("InfiniBand 400 Gb/s", 50e9, 60e-6),
    Link("InfiniBand 200 Gb/s", 25e9, 60e-6),
    Link("Ethernet 100 Gb/s", 12.5e9, 200e-6),
    Link("Ethernet 25 Gb/s", 3.125e9, 200e-6),
)
"""Between machines, one port a device."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Predict steps on several devices from bytes and link speeds."""

    size: int = 512
    """Image size in pixels."""
    activation_bytes: int = 2
    """Bytes of a number in an activation: 2 for bfloat16, 4 for float32."""
    step_ms: float = 2.0
    """Assumed: milliseconds that one device takes for a training step of one image of 512x512 pixels."""
    images: tuple[int, ...] = (1, 8)
    """Images that each device has in a step."""


def halo_bytes(size: int, number: int, dilation: int) -> int:
    """What a part with two neighbours receives for one block in a training step of one image."""
    return 2 * dilation * size * FILTERS * number * 4  # two convolutions, forward and backward


def sum_seconds(link: Link, devices: int, size: int, calls: int) -> float:
    """`calls` sums of together `size` bytes over all devices, in a ring: each sends 2 (n - 1) / n of it."""
    return 2 * (devices - 1) / devices * size / link.bytes_per_s + calls * link.latency


def halo_seconds(link: Link, size: int, number: int) -> float:
    """All exchanges of a step of one image; up and down go opposite ways at the same time."""
    received = sum(halo_bytes(size, number, dilation) for dilation in BLOCKS.values())
    return received / 2 / link.bytes_per_s + EXCHANGES * link.latency / 2


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.scaling")
    gradient, statistics = PARAMETERS * 4, 4 * CONVOLUTIONS * FILTERS * 4
    print(f"gradient {gradient / 1e6:.2f} MB, sums of the normalisations {statistics / 1e3:.1f} kB, {SUMS} calls\n")
    print("| dilation | blocks | received in a block, MB |\n|---|---|---|")
    for dilation in sorted(set(BLOCKS.values())):
        count = list(BLOCKS.values()).count(dilation)
        print(f"| {dilation} | {count} | {halo_bytes(options.size, options.activation_bytes, dilation) / 1e6:.2f} |")
    total = sum(halo_bytes(options.size, options.activation_bytes, dilation) for dilation in BLOCKS.values())
    print(f"| all | {len(BLOCKS)} | {total / 1e6:.1f} |\n")

    image = options.step_ms * 1e-3 * (options.size / 512) ** 2
    heads = "".join(f" efficiency, {count} a device |" for count in options.images)
    print(f"| devices | link | gradient, ms | all sums, ms |{heads}")
    print("|---|---|---|---|" + "---|" * len(options.images))
    for devices, links in ((8, WITHIN), (64, BETWEEN)):
        for link in links:
            alone = sum_seconds(link, devices, gradient, 1)
            seconds = sum_seconds(link, devices, gradient + statistics, SUMS)
            shares = "".join(f" {count * image / (count * image + seconds):.0%} |" for count in options.images)
            print(f"| {devices} | {link.name} | {alone * 1e3:.2f} | {seconds * 1e3:.1f} |{shares}")

    print("\n| parts of an image | link | halo, ms | all sums, ms | step of one image, ms | speed-up |")
    print("|---|---|---|---|---|---|")
    for parts in (2, 4, 8):
        for link in WITHIN:
            halo = halo_seconds(link, options.size, options.activation_bytes)
            seconds = sum_seconds(link, parts, gradient + statistics, SUMS)
            step = image / parts + halo + seconds
            print(
                f"| {parts} | {link.name} | {halo * 1e3:.1f} | {seconds * 1e3:.1f} | {step * 1e3:.1f} "
                f"| {image / step:.1f} |"
            )


if __name__ == "__main__":
    main()
