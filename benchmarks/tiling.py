"""python -m benchmarks.tiling: peak memory of a large image, whole and in tiles, and the difference of their logits.

Each figure is the peak resident memory of a separate process, including Python and JAX.
"""

import dataclasses
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import machine, output
from pdrunet_jax.data.phantoms.phantom import draw
from pdrunet_jax.runtime.malloc import configure_malloc


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare tiled with whole-image inference."""

    size: tuple[int, int] = (2000, 1500)
    """Height and width in pixels of the image, a synthetic X-ray."""
    tiles: tuple[int, ...] = (512, 256)
    """Tile sizes in pixels, one run each."""
    weights: str | None = None
    """Run folder, checkpoint, .safetensors or public .pth; default: random weights, 40 filters."""
    output: Path | None = None
    """JSON file for the results."""


def run(image: str, tile: int, weights: str | None, logits: str) -> None:
    """Body of the process: write the logits to a file and print the peak memory in bytes."""
    configure_malloc()  # as every command does, before any library starts its threads
    from flax import nnx

    from pdrunet_jax.config import ModelConfig
    from pdrunet_jax.model.load import load_model
    from pdrunet_jax.model.network import PDRUNet
    from pdrunet_jax.predict.inference import forward, forward_in_tiles

    model = PDRUNet(ModelConfig(), rngs=nnx.Rngs(0)) if weights is None else load_model(weights)
    pixels = np.load(image)
    found = forward_in_tiles(model, pixels, tile) if tile else np.asarray(forward(model, pixels))
    np.save(logits, found)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def in_process(options: Options, tile: int, folder: Path) -> tuple[int, np.ndarray]:
    """Run one case in a process: peak memory in bytes, and logits. Tile 0 is the whole image."""
    file = folder / f"{tile}.npy"
    arguments = ", ".join(map(repr, (str(folder / "image.npy"), tile, options.weights, str(file))))
    code = f"from benchmarks.tiling import run; run({arguments})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout), np.load(file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.tiling")
    settings = {"size": options.size, "weights": options.weights or "random, 40 filters"}
    result: dict[str, Any] = {"machine": machine.facts(), "settings": settings, "runs": []}
    with tempfile.TemporaryDirectory() as name:
        height, width = options.size
        np.save(Path(name) / "image.npy", draw(0, size=max(options.size)).image[None, :height, :width, None])
        whole = np.empty(0)
        for tile in (0, *options.tiles):
            peak, logits = in_process(options, tile, Path(name))
            whole = logits if tile == 0 else whole
            row = {
                "tile": tile or None,
                "peak_bytes": peak,
                "largest_logit": float(np.abs(logits).max()),
                "difference": float(np.abs(logits - whole).max()),
            }
            result["runs"].append(row)
            print(
                f"{f'tile {tile}' if tile else 'whole':10} {peak / 2**30:6.2f} GiB peak, logits up to "
                f"{row['largest_logit']:.3g}, {row['difference']:.1e} from the whole",
                flush=True,
            )
    output.write(result, options.output)


if __name__ == "__main__":
    main()
