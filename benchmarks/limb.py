"""python -m benchmarks.limb: what weights trained on drawn X-rays are worth, by bone and view.

    held-out    scores of a run on X-rays of bodies that it has not seen
    ablation    training without each of the variations of drawn X-rays, all scored on the same images, which have all
    fine-tune   starting from weights against starting from nothing, with few images of a body never trained on

Every image is drawn from surfaces (docs/phantoms.md). What is finished is not repeated: give the same folder of work.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks import machine, output
from benchmarks.commands import run_command
from pdrunet_jax.data.manifest import read_manifest, write_manifest
from pdrunet_jax.data.phantoms.surfaces.files import DRAWN
from pdrunet_jax.data.phantoms.surfaces.variations import VARIATIONS, Variation
from pdrunet_jax.data.phantoms.surfaces.views import VIEWS, View
from pdrunet_jax.evaluate import compare, scores
from pdrunet_jax.evaluate.scores import ImageScores, ScoringOptions
from pdrunet_jax.model.load import load_weights
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.weights.by_view import read_drawn, scores_by_view, table_of

_TEST_SEED = 1000
"""Seed of the images to score; those to train on have lower ones."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Score weights on X-rays of bodies that they were not trained on."""

    weights: str
    """Run folder, file or name of weights."""
    surfaces: Path
    """Folder of surfaces of those bodies."""
    work: Path = Path("runs/limb")
    """Folder for drawn images and scores."""
    count: int = 400
    """Images."""
    size: int = 512
    """Longest side of the images in pixels."""
    views: tuple[View, ...] = VIEWS
    """Views to draw."""
    output: Path | None = None
    """JSON file for the results."""


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Train without each variation; score on images with all of them."""

    surfaces: Path
    """Folder of surfaces to train on."""
    held_out: Path
    """Folder of surfaces of other bodies, to score on."""
    without: tuple[Variation, ...] = VARIATIONS
    """Variations to leave out, one at a time; training with all of them comes first."""
    work: Path = Path("runs/limb")
    """Folder for drawn images and runs."""
    count: int = 2000
    """Images to train on and to choose the best weights by."""
    test_count: int = 200
    """Images to score on."""
    seeds: tuple[int, ...] = (0, 1)
    """Training seeds."""
    steps: int = 1000
    """Training steps."""
    size: int = 128
    """Height and width that the network works at."""
    filters: int = 16
    """Filters."""
    output: Path | None = None
    """JSON file for the results."""


@dataclasses.dataclass(frozen=True)
class FineTune:
    """Train from weights and from nothing, on a few images of a body that the weights have not seen."""

    weights: str
    """Run folder, file or name of weights."""
    surfaces: Path
    """Folder of surfaces of that body or those bodies."""
    work: Path = Path("runs/limb")
    """Folder for drawn images and runs."""
    images: tuple[int, ...] = (10, 20)
    """Training images; a fifth as many, at least 4, choose the best weights."""
    draws: tuple[int, ...] = (1, 2, 3)
    """Seeds of the images and of the training."""
    test_count: int = 100
    """Images to score on."""
    steps: int = 300
    """Training steps, the same for both."""
    learning_rates: tuple[float, float] = (1e-2, 2e-3)
    """Peak learning rate from nothing (what short trainings do best with, docs/results.md), and from weights."""
    views: tuple[View, ...] = VIEWS
    """Views to draw."""
    size: int | None = None
    """Height and width to train at; those of the weights by default."""
    output: Path | None = None
    """JSON file for the results."""


def how_to_draw(surfaces: Path, several: bool, views: Sequence[View]) -> tuple[str, list[str]]:
    """What folders of X-rays drawn so are called, and the options of `data phantom`: each bone or all, some views."""
    chosen = [] if tuple(views) == VIEWS else list(views)
    name = "_".join((surfaces.name, "layers" if several else "bone", *chosen))
    return name, [*(["--layers"] if several else []), *(["--views", *chosen] if chosen else [])]


def draw(root: Path, surfaces: Path, count: int, size: int, seed: int, *more: str) -> Path:
    """Draw a dataset folder unless it is there."""
    if not root.exists():
        run_command(
            "data", "phantom", root, "--surfaces", surfaces, "--count", count, "--size", size, "--seed", seed, *more
        )
    return root


def scored(weights: str | Path, data: Path, folder: Path, *more: object) -> list[ImageScores]:
    """Scores of weights on every image of a dataset folder, with more options of `evaluate`; kept in `folder`."""
    if not (folder / "per_image.csv").exists():
        run_command("evaluate", "--weights", weights, "--data.root", data, "--split", "all", "--output", folder, *more)
    return scores.read_csv(folder / "per_image.csv")


def train(folder: Path, config: str, data: Path, settings: dict[str, object], *more: object) -> Path:
    """Train with a recipe, settings and more options unless that is done; returns the run folder."""
    if not (folder / "evaluation").exists():
        given = {"data.root": data, "train.samples": 0, "tracking.wandb": "disabled", "workdir": folder, **settings}
        run_command("train", "--config", config, *more, settings=given)
    return folder


def train_briefly(folder: Path, data: Path, settings: dict[str, object]) -> Path:
    """Train with the recipe lower_limb on a dataset folder, for some hundred steps."""
    steps = settings["train.steps"]
    brief = {
        "data.surfaces": None,
        "data.phantoms": 0,
        "optim.ema": 0.0,  # some hundred steps, ending at a learning rate of zero, are too few to average over
        "train.eval-every": steps,
        "train.save-every": steps,
    }
    return train(folder, "lower_limb", data, {**brief, **settings})


def mean_of(runs: Sequence[Sequence[ImageScores]]) -> tuple[ImageScores, ...]:
    """Dice of each image averaged over runs."""
    return tuple(
        dataclasses.replace(rows[0], dice=float(np.mean([row.dice for row in rows])))
        for rows in zip(*runs, strict=True)
    )


def difference(title: str, these: Sequence[ImageScores], others: Sequence[ImageScores]) -> dict[str, Any]:
    """Print and return the mean Dice of both and their paired difference, these minus others."""
    dice = compare.compare(these, compare.Other("other", tuple(others)), ScoringOptions()).macro["dice"]
    interval = f"{dice.mean:+.3f} ({dice.low:+.3f} to {dice.high:+.3f})"
    print(f"| {title} | {dice.this:.3f} | {dice.other:.3f} | {interval} | {dice.images} |", flush=True)
    return dataclasses.asdict(dice)


def held_out(options: HeldOut) -> dict[str, Any]:
    """Draw, score, print the table of bones and views."""
    name, more = how_to_draw(options.surfaces, load_weights(options.weights).multilabel, options.views)
    name = f"held_out_{name}_{options.count}_{options.size}"
    data = draw(options.work / name, options.surfaces, options.count, options.size, _TEST_SEED, *more)
    folder = options.work / f"scores_{Path(options.weights).name}_{name}"
    scored(options.weights, data, folder)
    found = scores_by_view(folder, data)
    print(table_of(found))
    return {"scores": [dataclasses.asdict(each) for each in found], "evaluation": str(folder)}


def ablation(options: Ablation) -> dict[str, Any]:
    """Train with all variations, then without each; print the differences."""
    side, work, found = round(1.3 * options.size), options.work, {}
    count = options.test_count
    test = draw(work / f"ablation_test_{count}_{side}", options.held_out, count, side, _TEST_SEED)
    settings = {"data.size": options.size, "model.filters": options.filters, "train.steps": options.steps}
    print("| without | Dice | with all | difference, 95 % interval | images |\n|---|---|---|---|---|")
    usual: tuple[ImageScores, ...] = ()
    for name in ("", *options.without):
        more = ("--without", name) if name else ()
        data = draw(work / f"ablation_{name}_{options.count}_{side}", options.surfaces, options.count, side, 0, *more)
        runs = []
        for seed in options.seeds:
            folder = work / f"ablation_run_{name}_{options.steps}_{options.size}_{options.filters}_{seed}"
            train_briefly(folder, data, {**settings, "seed": seed})
            runs.append(scored(folder, test, folder / "held_out"))
        mean = mean_of(runs)
        usual = usual or mean
        if name:
            found[name] = difference(name, mean, usual)
    return {"without minus with": found}


def fine_tune(options: FineTune) -> dict[str, Any]:
    """Train both ways on each draw of each number of images; print the differences."""
    loaded, work = load_weights(options.weights), options.work
    name, more = how_to_draw(options.surfaces, loaded.multilabel, options.views)
    assert loaded.size is not None
    size = options.size or max(loaded.size)
    side = round(1.3 * size)
    place = f"{name}_{side}"
    drawn = work / f"tune_test_{place}_{options.test_count}"
    test = draw(drawn, options.surfaces, options.test_count, side, _TEST_SEED, *more)
    found: dict[str, Any] = {}
    print("| images | from weights | from nothing | difference, 95 % interval | test images |\n|---|---|---|---|---|")
    for count in options.images:
        pair: dict[str, list[list[ImageScores]]] = {"weights": [], "nothing": []}
        for seed in options.draws:
            data = work / f"tune_{place}_{count}_{seed}"
            if not data.exists():
                fresh = data.with_name(f"{data.name}_new")
                split(draw(fresh, options.surfaces, 2 * count, side, seed, *more), count, max(4, count // 5))
                fresh.rename(data)
            for way, rate in zip(("nothing", "weights"), options.learning_rates, strict=True):
                folder = work / f"tune_run_{place}_{count}_{seed}_{way}_{options.steps}"
                settings: dict[str, object] = {
                    "data.size": size,
                    "data.multilabel": loaded.multilabel,
                    "model.filters": loaded.options["filters"],
                    "optim.learning-rate": rate,
                    "train.steps": options.steps,
                    "train.batch-size": 4,
                    "seed": seed,
                }
                settings |= {"train.weights": options.weights} if way == "weights" else {}
                train_briefly(folder, data, settings)
                pair[way].append(scored(folder, test, folder / "held_out"))
        found[str(count)] = difference(str(count), mean_of(pair["weights"]), mean_of(pair["nothing"]))
    return {"weights minus nothing, by number of training images": found}


def split(data: Path, count: int, others: int) -> None:
    """Keep `count` training images of a drawn folder and at least `others` of other bodies, to validate on."""
    body_of = {image: body for image, (_, body) in read_drawn(data / DRAWN).items()}
    if len({*body_of.values()}) < 3:
        body_of = {image: image for image in body_of}  # each X-ray counts as a patient, as in `data phantom`
    images_of, chosen = Counter(body_of.values()), list[str]()
    for body in dict.fromkeys(reversed(body_of.values())):
        if sum(images_of[each] for each in chosen) < others:
            chosen.append(body)
    free = [image for image, body in body_of.items() if body not in chosen]
    if len(free) < count:
        raise UserError(
            f"{data} has {len(free)} images of other bodies than those to validate on; give surfaces of more"
        )
    splits = {image: "val" for image, body in body_of.items() if body in chosen} | dict.fromkeys(free[:count], "train")
    if (data / "manifest.csv").exists():
        rows = read_manifest(data).rows
        write_manifest(data, [{**row, "split": splits[row["image"]]} for row in rows if row["image"] in splits])
        return
    for image in body_of:  # one folder of masks a bone
        old, new = image.split("/")[0], splits.get(image, "left_out")
        for path in [data / image, *data.glob(f"{old}/masks/*/{Path(image).stem}.png")]:
            target = data / new / path.relative_to(data / old)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def main() -> None:
    """Run the command."""
    commands: Any = (
        Annotated[HeldOut, tyro.conf.subcommand("held-out")]
        | Annotated[Ablation, tyro.conf.subcommand("ablation")]
        | Annotated[FineTune, tyro.conf.subcommand("fine-tune")]
    )
    options = tyro.cli(commands, prog="python -m benchmarks.limb", description=__doc__)
    options.work.mkdir(parents=True, exist_ok=True)
    functions: dict[type, Any] = {HeldOut: held_out, Ablation: ablation, FineTune: fine_tune}
    found = functions[type(options)](options)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("work", "output")}
    output.write({"machine": machine.facts(), "settings": settings, **found}, options.output)


if __name__ == "__main__":
    main()
