"""python -m benchmarks.recipes: which change of a recipe makes PDR-UNet better under a fixed budget?

Trains the recipe and each variant of it on the same folds, and compares their scores image by image. The intervals are
drawn over whole patients; the seed is not in them, so a variant that wins on some folds should win on all of them, and
on other data, before it is believed. Runs that are finished are not repeated.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import machine, output
from benchmarks.commands import run_command
from pdrunet_jax.evaluate import scores
from pdrunet_jax.evaluate.compare import Other, compare
from pdrunet_jax.evaluate.scores import ImageScores, ScoringOptions

PLAIN = "--augment.rotate 0 --augment.scale 0 --augment.translate 0 --augment.contrast 0 --augment.noise 0"
VARIANTS = {
    "recipe": "",
    "dropout 0": "--model.dropout 0",
    "dropout 0.1": "--model.dropout 0.1",
    "flips and gamma": PLAIN,
    "flips and gamma, conv1": f"{PLAIN} --model.shortcut conv1",
    "flips and gamma, rate 1e-2": f"{PLAIN} --optim.learning-rate 1e-2",
    "flips and gamma, conv1, rate 1e-2": f"{PLAIN} --model.shortcut conv1 --optim.learning-rate 1e-2",
    "flips and gamma, dropout 0.1": f"{PLAIN} --model.dropout 0.1",
    "no noise": "--augment.noise 0",
    "no geometry": "--augment.rotate 0 --augment.scale 0 --augment.translate 0",
    "elastic": "--augment.elastic 4",
    "rate 1e-3": "--optim.learning-rate 1e-3",
    "rate 1e-2": "--optim.learning-rate 1e-2",
    "cosine": "--optim.schedule cosine --optim.warmup-steps 20",
    "adamw": "--optim.name adamw --optim.weight-decay 1e-2",
    "beta2 0.99": "--optim.b2 0.99",
    "average 0.98": "--optim.ema 0.98",
    "he": "--model.init he",
    "conv1": "--model.shortcut conv1",
    "cross-entropy": "--loss.name bce",
    "dice only": "--loss.name dice",
    "batch 2": "--train.batch-size 2 --train.steps {double}",
    "batch 8": "--train.batch-size 8 --train.steps {half}",
}
"""Options of each variant. {half} and {double} stand for the steps that see as many images at another batch size."""


@dataclass(frozen=True)
class Options:
    """Compare variants of a recipe."""

    data: Path
    """Dataset folder."""
    work: Path = Path("runs/recipes")
    """Folder for runs."""
    config: str = "mura"
    """Configuration that the variants change."""
    folds: int = 5
    """Number of folds."""
    only_folds: tuple[int, ...] = ()
    """Folds to train; all if empty."""
    size: int = 128
    filters: int = 20
    batch: int = 4
    steps: int = 400
    seed: int = 0
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Names of variants, or options in quotes with a space before them; the first is compared with all others."""
    output: Path | None = None
    """JSON file for the results."""


def train(options: Options, variant: str, fold: int) -> list[ImageScores]:
    """Train one fold of a variant, unless that is done; returns the scores of its test images."""
    changes = VARIANTS.get(variant, variant).format(half=options.steps // 2, double=options.steps * 2)
    settings: dict[str, object] = {
        "config": options.config,
        "data.root": options.data,
        "data.size": options.size,
        "model.filters": options.filters,
        "train.batch-size": options.batch,
        "train.steps": options.steps,
        "train.keep-latest": 1,
        "train.samples": 0,
        "tracking.wandb": "disabled",
        "seed": options.seed,
    }
    given = shlex.split(changes)
    settings |= {name.removeprefix("--"): value for name, value in zip(given[::2], given[1::2], strict=True)}
    steps = int(str(settings["train.steps"]))
    settings |= {"train.eval-every": max(1, steps // 4), "train.save-every": steps}
    folder = options.work / variant.replace(" ", "_").replace("/", "_") / f"seed_{options.seed}"
    scored = folder / f"fold_{fold}" / "evaluation" / "test" / "per_image.csv"
    if not scored.exists():
        settings |= {"fold": f"{fold}/{options.folds}", "workdir": folder}
        run_command("train", settings=settings, output=sys.stderr)
    return scores.read_csv(scored)


def main() -> None:
    """Train and compare, and print a table that grows with each variant."""
    options = tyro.cli(Options, description=__doc__)
    folds = options.only_folds or tuple(range(1, options.folds + 1))
    rules = ScoringOptions()
    first: list[ImageScores] = []
    rows: list[dict[str, Any]] = []
    for variant in options.variants:
        found = [row for fold in folds for row in train(options, variant, fold)]
        summary = scores.summarise(found, rules).macro
        entry: dict[str, Any] = {"variant": variant, "options": VARIANTS.get(variant, variant)}
        entry |= {name: [summary[name].mean, summary[name].low, summary[name].high] for name in ("dice", "nsd", "hd95")}
        first = first or found
        change = compare(found, Other("recipe", tuple(first), rules), rules).macro
        entry["difference"] = {
            name: [change[name].mean, change[name].low, change[name].high, change[name].p] for name in ("dice", "nsd")
        }
        rows.append(scores.without_nan(entry))
        mean, low, high, p = entry["difference"]["dice"]
        print(
            f"{variant:20} dice {entry['dice'][0]:.4f}  difference {mean:+.4f} ({low:+.4f} to {high:+.4f})  p {p:.3f}"
        )
        sys.stdout.flush()
        output.write(
            {
                "machine": machine.facts(),
                "settings": {**vars(options), "data": options.data.name, "work": "", "output": "", "folds": folds},
                "results": rows,
            },
            options.output,
        )


if __name__ == "__main__":
    main()
