"""python -m benchmarks.fit: test Dice with data.fit = pad and with stretch, on images of several proportions.

Both are trained with the same seeds on the same split. An image's score is its mean over the seeds, and the differences
are paired by image as in `evaluate --against`. Runs that are finished are not repeated.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from benchmarks import machine, output
from benchmarks.commands import run_command
from pdrunet_jax.data.phantoms.phantom import draw
from pdrunet_jax.evaluate import compare, scores
from pdrunet_jax.evaluate.scores import ImageScores, ScoringOptions


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare pad with stretch."""

    work: Path = Path("runs/fit")
    """Folder for drawn images and runs."""
    lungs: str = ""
    """Dataset folder of chest X-rays to include."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    steps: int = 300
    """Training steps."""
    size: int = 128
    """Height and width that the network works at."""
    filters: int = 20
    """Filters."""
    only: tuple[str, ...] = ()
    """Datasets to train on now: lungs, legs, mixed; default: all."""
    output: Path | None = None
    """JSON file for the results."""


def whole_leg(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a whole leg: image and mask (height, width), 255 for femur, tibia and fibula.

    A ruler as bright as bone lies next to the leg, as in pictures that leg lengths are measured on.
    """
    y, x = np.mgrid[:height, :width] / width
    length = height / width
    knee = length * rng.uniform(0.46, 0.56)
    axis = 0.5 + rng.uniform(-0.08, 0.08) + rng.uniform(-0.12, 0.12) * (y / length - 0.5)
    axis = axis + rng.uniform(0.01, 0.05) * np.sin(np.pi * y / length)

    def shaft(top: float, bottom: float, aside: float, half: float, flare: float) -> NDArray[np.bool_]:
        """A bone from `top` to `bottom`, `half` as thick in the middle and wider by `flare` at its ends."""
        along = np.clip((y - top) / (bottom - top), 0, 1)
        thick = half * (1 + flare * np.abs(2 * along - 1) ** 6)
        return np.asarray((np.abs(x - axis - aside) < thick) & (y > top) & (y < bottom))

    half = rng.uniform(0.055, 0.075)
    side = rng.choice((-1, 1))
    bones = [
        shaft(0.05 * length, knee - 0.02, 0, half, 1.0),
        shaft(knee + 0.02, 0.95 * length, 0, 0.9 * half, 0.9),
        shaft(knee + 0.12, 0.93 * length, side * rng.uniform(0.13, 0.17), 0.35 * half, 0.6),
    ]
    mask = np.any(bones, axis=0)
    tissue = np.clip(1 - ((x - axis) / rng.uniform(0.3, 0.4)) ** 2, 0, 1)
    ruler = np.abs(x - (0.5 + side * rng.uniform(-0.45, -0.38))) < 0.03
    grey = 0.25 * tissue + 0.22 * mask + 0.3 * ruler * (np.sin(80 * y) > -0.6)
    grey += 0.1 * ndimage.gaussian_filter(rng.standard_normal(grey.shape), width / 12) * width / 12
    grey = ndimage.gaussian_filter(grey, width / 160) + 0.05 * rng.standard_normal(grey.shape)
    return np.clip(255 * (0.15 + grey), 0, 255).astype(np.uint8), np.where(mask, 255, 0).astype(np.uint8)


def draw_legs(root: Path, count: int, height: int, width: int, *, squares: int = 0) -> Path:
    """Write `count` whole legs and `squares` square phantoms as a dataset folder."""
    drawn = [whole_leg(np.random.default_rng((7, number)), height, width) for number in range(count)]
    phantoms = (draw(3 * number, size=256) for number in range(squares))
    drawn += [(each.image, each.mask * np.uint8(255)) for each in phantoms]
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for number, (image, mask) in enumerate(drawn):
        Image.fromarray(image).save(root / "images" / f"{number:03}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number:03}.png")
    (root / "dataset.toml").write_text("classes = { bone = 255 }\n", encoding="utf-8")
    return root


def train(options: Options, data: str, fit: str, seed: int, folder: Path) -> tuple[ImageScores, ...]:
    """Train one network unless that is done; returns its test scores."""
    table = folder / "evaluation" / "test" / "per_image.csv"
    if not table.exists():
        settings = {
            "data.root": data,
            "data.fit": fit,
            "data.size": options.size,
            "model.filters": options.filters,
            "train.batch-size": 4,
            "train.steps": options.steps,
            "train.eval-every": options.steps // 3,
            "train.save-every": options.steps,
            "tracking.wandb": "disabled",
            "seed": seed,
            "workdir": folder,
        }
        run_command("train", "--config", "mura", settings=settings)
    return tuple(scores.read_csv(table))


def mean_over_seeds(runs: Sequence[Sequence[ImageScores]]) -> tuple[ImageScores, ...]:
    """Scores of each image averaged over runs."""
    return tuple(
        dataclasses.replace(
            rows[0], **{name: float(np.mean([getattr(row, name) for row in rows])) for name in scores.METRICS}
        )
        for rows in zip(*runs, strict=True)
    )


def main() -> None:
    """Run the command."""
    options = tyro.cli(Options)
    data = {
        **({"lungs": options.lungs} if options.lungs else {}),
        "legs": str(draw_legs(options.work / "legs", 60, 640, 160)),
        "mixed": str(draw_legs(options.work / "mixed", 30, 640, 80, squares=30)),
    }
    found: dict[str, Any] = {}
    print("| data | stretch | pad | pad - stretch, 95 % interval | p | test images |\n|---|---|---|---|---|---|")
    for name in options.only or data:
        runs = {
            fit: [
                train(options, data[name], fit, seed, options.work / f"{name}_{fit}_{seed}") for seed in options.seeds
            ]
            for fit in ("stretch", "pad")
        }
        other = compare.Other("stretch", mean_over_seeds(runs["stretch"]))
        dice = compare.compare(mean_over_seeds(runs["pad"]), other, ScoringOptions()).macro["dice"]
        found[name] = dataclasses.asdict(dice)
        difference = f"{dice.mean:+.3f} ({dice.low:+.3f} to {dice.high:+.3f})"
        print(
            f"| {name} | {dice.other:.3f} | {dice.this:.3f} | {difference} | {dice.p:.3f} | {dice.images} |", flush=True
        )
    settings = {key: str(value) for key, value in vars(options).items() if key in ("seeds", "steps", "size", "filters")}
    output.write({"machine": machine.facts(), "settings": settings, "pad minus stretch": found}, options.output)


if __name__ == "__main__":
    main()
