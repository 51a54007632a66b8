"""python -m benchmarks.check: CPU time and peak memory of the check of a large dataset, without and with its cache."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from benchmarks import machine, output

_MEASURED = """
import json, resource, sys
from pdrunet_jax.runtime.malloc import configure_malloc
configure_malloc()
from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import inspect_dataset
inspect_dataset(DataConfig(root=sys.argv[1], size=(int(sys.argv[2]),), cache=sys.argv[3]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"cpu_s": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}))
"""


@dataclass(frozen=True)
class Options:
    """Measure the check of a dataset in a process of its own."""

    images: int = 10_000
    """Images in the dataset."""
    source: int = 64
    """Height and width of the PNG files, in pixels."""
    size: int = 256
    """Height and width to which the cache resizes, in pixels."""
    output: Path | None = None
    """JSON file for the results."""


def draw(root: Path, options: Options) -> None:
    """Write grey images, no two alike, with one mask of a bar for each; three images a patient."""
    mask = np.zeros((options.source, options.source), np.uint8)
    mask[options.source // 6 : -options.source // 5, options.source // 3 : -options.source // 3] = 255
    noise = np.random.default_rng(0).integers(0, 100, mask.shape, dtype=np.uint8)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(options.images):
        pixels = noise + mask // 3
        pixels[0, :2] = number % 256, number // 256
        name = f"patient{number // 3:05d}_{number % 3}.png"
        Image.fromarray(pixels).save(root / "images" / name, compress_level=0)
        Image.fromarray(mask).save(root / "masks" / name, compress_level=0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.check")
    numbers = {"images": options.images, "source": options.source, "size": options.size}
    result = {"machine": machine.facts(), "settings": numbers, "pixels_mib": options.images * options.size**2 / 2**19}
    with tempfile.TemporaryDirectory() as name:
        draw(Path(name) / "data", options)
        for cache in ("none", "memory"):
            command = [sys.executable, "-c", _MEASURED, str(Path(name) / "data"), str(options.size), cache]
            result[cache] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"cache {cache:7} {result[cache]['cpu_s']:6.1f} s of CPU time, {result[cache]['peak_mib']:7.0f} MiB")
    output.write(result, options.output)


if __name__ == "__main__":
    main()
