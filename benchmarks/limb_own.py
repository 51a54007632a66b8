"""python -m benchmarks.limb_own: what a few X-rays that look different teach the weights of the package.

Draws X-rays of bodies that the weights have not seen and processes them as another maker's detector might: equalised
locally, edges enhanced with halos, grain, a darker gamma. Scores the weights on them as they are and after the recipe
lower_limb_own, at each image size asked for; Dice is taken at the resolution of the images. What is finished is not
repeated: give the same folder of work.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image
from scipy.ndimage import gaussian_filter

from benchmarks import machine, output
from benchmarks.limb import difference, draw, scored, train
from pdrunet_jax.data.phantoms.surfaces.views import View


@dataclasses.dataclass(frozen=True)
class Options:
    """Score weights on X-rays of another look, before and after training on some of them."""

    surfaces: Path
    """Folder of surfaces of the bodies to train on, three or more."""
    test_surfaces: Path
    """Folder of surfaces of other bodies, to score on; three or more."""
    weights: str = "lower-limb"
    """Weights to start from."""
    work: Path = Path("runs/limb_own")
    """Folder for drawn images and runs."""
    views: tuple[View, ...] = ("knee",)
    """Views to draw."""
    count: int = 78
    """Images to train on and, of about a third of the bodies, to validate and test on."""
    test_count: int = 60
    """Images of the other bodies to score on."""
    side: int = 640
    """Longest side of the images in pixels."""
    sizes: tuple[tuple[int, int], ...] = ((192, 192),)
    """Heights and widths that the network works at."""
    steps: tuple[int, ...] = (300,)
    """Training steps."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    output: Path | None = None
    """JSON file for the results."""


def process(folder: Path) -> None:
    """Process every image of a dataset folder as another maker's detector might, in place."""
    random = np.random.default_rng(0)
    for path in sorted((folder / "images").iterdir()):
        with Image.open(path) as image:
            pixels = np.asarray(image, np.float32)
        pixels = (pixels - pixels.min()) / max(float(np.ptp(pixels)), 1.0)
        edges = gaussian_filter(pixels, 1) - gaussian_filter(pixels, 4)
        pixels = pixels - 0.75 * gaussian_filter(pixels, 40) + 2.7 * edges
        pixels += 0.03 * np.abs(random.standard_normal(pixels.shape))
        low, high = np.percentile(pixels, (1, 99))
        pixels = np.clip((pixels - low) / max(high - low, 1e-6), 0, 1) ** 1.5
        Image.fromarray(np.round(255 * pixels).astype(np.uint8)).save(path)


def draw_processed(root: Path, surfaces: Path, count: int, options: Options, seed: int) -> Path:
    """Draw X-rays of plain scenes and process them, unless that is done."""
    if not root.exists():
        fresh = root.with_name(f"{root.name}_new")
        plain = ("--difficulty", "easy", "--without", "implants", "seams", "collimation")
        process(draw(fresh, surfaces, count, options.side, seed, "--views", *options.views, *plain))
        fresh.rename(root)
    return root


def main() -> None:
    """Run the command."""
    options = tyro.cli(Options, prog="python -m benchmarks.limb_own", description=__doc__)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    name = "_".join((*options.views, str(options.side)))
    data = draw_processed(work / f"own_{name}_{options.count}", options.surfaces, options.count, options, 5)
    held_out = work / f"test_{name}_{options.test_count}"
    test = draw_processed(held_out, options.test_surfaces, options.test_count, options, 6)
    print("| size, steps | after | before | difference, 95 % interval | images |\n|---|---|---|---|---|")
    found = {}
    start = Path(options.weights).name
    for height, width in options.sizes:
        pixels, size = f"{height}x{width}", ("--data.size", height, width)
        before = scored(options.weights, test, work / f"before_{start}_{name}_{pixels}", *size, "--data.fit", "pad")
        for steps in options.steps:
            run = work / f"run_{start}_{name}_{pixels}_{steps}_{options.learning_rate:g}"
            settings: dict[str, object] = {
                "optim.learning-rate": options.learning_rate,
                "train.weights": options.weights,
                "train.steps": steps,
            }
            train(run, "lower_limb_own", data, settings, *size)
            after = scored(run, test, run / "scores")
            found[f"{pixels}, {steps}"] = difference(f"{pixels}, {steps}", after, before)
    given: dict[str, Any] = {key: str(each) for key, each in vars(options).items() if key not in ("work", "output")}
    output.write({"machine": machine.facts(), "settings": given, "after minus before": found}, options.output)


if __name__ == "__main__":
    main()
