"""Compare both networks on a checkpoint, value by value: `python -m parity_tests.support.walk WEIGHTS`.

Prints every block, convolution and normalisation by its public name, in the order of the forward pass, with the
difference between JAX and PyTorch relative to the largest value.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from parity_tests.support import harness, torch_side
from parity_tests.support.budget import STANDARD
from parity_tests.support.case import Batch, Case
from parity_tests.support.pair import our_pair
from pdrunet_jax.data.images import read_image, resize_image
from pdrunet_jax.model.load import load_weights
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import RunError


@dataclasses.dataclass(frozen=True)
class Options:
    """Run one image through the Flax network and the PyTorch twin and compare every intermediate value."""

    weights: Annotated[Path, tyro.conf.Positional]
    """Run folder, checkpoint folder, .safetensors file, or .pth file of the public code."""
    image: Path | None = None
    """Radiograph; random pixels by default."""
    size: int = 64
    """Height and width, in pixels."""
    dtype: Literal["float64", "float32"] = "float64"
    """Precision of both networks."""
    shortcut: Literal["input", "conv1"] | None = None
    """Shortcut wiring of a .pth file, which does not record it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; raise `RunError` if the two differ by more than the standard allows."""
    options = tyro.cli(Options, args=arguments, prog="python -m parity_tests.support.walk")
    loaded = load_weights(options.weights, shortcut=options.shortcut)
    names = ("shortcut", "norm", "in_channels", "outputs", "filters")
    settings = {name: loaded.options[name] for name in names}
    case = Case(**settings, dtype=options.dtype, shape=(1, options.size, options.size))
    if options.image is None:
        pixels = np.random.default_rng(0).integers(0, 256, (options.size, options.size, case.in_channels), np.uint8)
    else:
        pixels = resize_image(read_image(options.image, case.in_channels), (options.size, options.size))
    arrays = {
        name: array.astype(options.dtype) if array.dtype.kind == "f" else array
        for name, array in to_public(loaded.params, loaded.stats).items()
    }
    torch_side.exact()
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        batch = Batch((pixels[None] / 255).astype(options.dtype), None)
        errors = harness.walk(dataclasses.replace(our_pair(case), given=arrays, batch=lambda number: batch))
    allowed = STANDARD[3][0 if options.dtype == "float64" else 1]
    for name, error in errors.items():
        print(f"{name:24} {error:8.1e}{'' if error <= allowed else '  <-- differs'}")
    wrong = [name for name, error in errors.items() if not error <= allowed]
    if wrong:
        raise RunError(f"{len(wrong)} of {len(errors)} values differ by more than {allowed:g}, the first is {wrong[0]}")
    print(f"all {len(errors)} values agree within {allowed:g}")


if __name__ == "__main__":
    cli.run(main)
