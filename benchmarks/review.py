"""python -m benchmarks.review: does confidence tell good masks from bad ones, and does `data next` beat random choice?

Both on a folder of chest X-rays with lungs, split by patient:

- confidence: five networks, one for each fold, and every image scored by the network that has not seen its patient.
- next: from some images, drawn by a seed, train; add as many chosen by `data next`, or the least confident, or drawn at
  random; train again from the beginning. All networks are scored on the same test images.

Runs that are finished are not repeated.
"""

import csv
import dataclasses
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import ndimage, stats

from benchmarks import machine, output
from benchmarks.commands import run_command
from pdrunet_jax import config
from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.layers import read_truth
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.data.split import Sample
from pdrunet_jax.data.views import Viewer
from pdrunet_jax.evaluate import scores
from pdrunet_jax.model.confidence import confidences
from pdrunet_jax.model.load import load_model
from pdrunet_jax.predict.inference import segment

FOLDS = 5
TEST_FOLDS = 2  # of the five, whose patients test the networks of "next"

Rows = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure confidence and the choice of images."""

    lungs: Path
    """Dataset folder with images/, masks/, a manifest with patients, and dataset.toml."""
    work: Path = Path("runs/review")
    """Folder for splits and runs."""
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Folds to measure confidence on."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Draws of the first images for `next`."""
    choices: tuple[str, ...] = ("random", "data next", "least confident")
    """Ways to choose the images of the second round of `next`; the first is compared with the others."""
    size: int = 96
    """Height and width that the networks of `next` work at."""
    steps: int = 120
    """Training steps of the networks of `next`."""
    first: int = 10
    """Images in the first round of `next`, and added in the second."""
    run: Path | None = None
    """A run on the same folder, to measure confidence on its validation and test images, too."""
    only: tuple[str, ...] = ("confidence", "next", "ensemble")
    """What to measure: confidence, run, next, ensemble."""
    output: Path | None = None
    """JSON file for the results."""


def write_split(options: Options, name: str, splits: Mapping[str, str]) -> Path:
    """Write a dataset folder with the images in `splits`, which gives the split of each."""
    root = options.work / name
    root.mkdir(parents=True, exist_ok=True)
    for part in ("images", "masks"):
        if not (root / part).exists():
            os.symlink((options.lungs / part).resolve(), root / part)
    (root / "dataset.toml").write_bytes((options.lungs / "dataset.toml").read_bytes())
    with (root / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        rows = (
            (row["image"], row["mask"], row["patient"], splits[row["image"]])
            for row in manifest(options)
            if row["image"] in splits
        )
        csv.writer(file).writerows([("image", "mask", "patient", "split"), *rows])
    return root


def manifest(options: Options) -> Rows:
    """Rows of the manifest."""
    with (options.lungs / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def folds(options: Options) -> dict[str, int]:
    """The fold of each patient, at random."""
    patients = sorted({row["patient"] for row in manifest(options)})
    random.Random(0).shuffle(patients)
    return {patient: number % FOLDS for number, patient in enumerate(patients)}


def train(options: Options, data: Path, name: str, *, size: int, steps: int, seed: int) -> Path:
    """Train a network of 16 filters, unless that is done; returns its run folder."""
    folder = options.work / f"runs_{name}"
    if not (folder / "evaluation" / "test" / "per_image.csv").exists():
        settings = {
            "data.root": data,
            "data.size": size,
            "model.filters": 16,
            "train.batch-size": 4,
            "train.steps": steps,
            "train.eval-every": steps // 2,
            "train.save-every": steps,
            "train.keep-latest": 1,
            "tracking.wandb": "disabled",
            "seed": seed,
            "workdir": folder,
        }
        run_command("train", "--config", "mura", settings=settings, output=sys.stderr)
    return folder


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Dice of two boolean masks (H, W); 1 if both are empty."""
    total = int(one.sum() + other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0


def candidates(probability: np.ndarray, mirrored: np.ndarray) -> dict[str, float]:
    """Numbers that might tell a good mask from a bad one, larger for better ones.

    The arguments are probabilities (H, W) from the image and from its mirror image, turned back.
    """
    mask, mean = probability > 0.5, (probability + mirrored) / 2
    edge = mask & ~ndimage.binary_erosion(mask)
    near = ndimage.distance_transform_edt(~edge) <= max(mask.shape) / 64
    clipped = np.clip(probability, 1e-7, 1 - 1e-7)
    entropy = -(clipped * np.log2(clipped) + (1 - clipped) * np.log2(1 - clipped))
    soft, agreement = confidences(probability, mask)[0], dice(mask, mirrored > 0.5)
    return {
        "expected Dice": soft,
        "expected Dice, mean of two mirror images": confidences(mean, mask)[0],
        "Dice of the masks of two mirror images": agreement,
        "product of the first and the third": soft * agreement,
        "entropy near the outline": 1 - float(entropy[near].mean()) if edge.any() else 0.0,
        "entropy per pixel of outline": -float(entropy.sum()) / max(int(edge.sum()), 1),
        "entropy of the image": 1 - float(entropy.mean()),
    }


def unseen(options: Options) -> Iterator[tuple[Any, Dataset, Sample]]:
    """Each image of the folds, with a network that has not seen its patient."""
    of = {row["image"]: folds(options)[row["patient"]] for row in manifest(options)}
    for fold in options.folds:
        splits = {image: "test" if number == fold else "train" for image, number in of.items()}
        data = write_split(options, f"fold{fold}", splits)
        model = load_model(train(options, data, f"fold{fold}", size=128, steps=300, seed=0))
        dataset = open_dataset(DataConfig(root=str(data)))
        yield from ((model, dataset, sample) for sample in dataset.of("test"))


def of_run(options: Options) -> Iterator[tuple[Any, Dataset, Sample]]:
    """The validation and test images of a run on the same folder, with its network."""
    assert options.run is not None
    settings = config.read(options.run / "config.toml").data
    dataset = open_dataset(dataclasses.replace(settings, root=str(options.lungs)))
    model = load_model(options.run)
    yield from ((model, dataset, sample) for split in ("val", "test") for sample in dataset.of(split))


def measure_confidence(cases: Iterable[tuple[Any, Dataset, Sample]]) -> dict[str, Any]:
    """Correlation of each candidate with Dice, and the confidence in images unlike the training images."""
    found: dict[str, list[float]] = defaultdict(list)
    true: list[float] = []
    odd: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for model, dataset, sample in cases:
        truth = read_truth(sample, dataset.coding)
        pixels = np.clip(np.rint(read_image(sample.image, 1)), 0, 255).astype(np.uint8)
        probability = segment(model, pixels).probability
        mirrored = segment(model, pixels[:, ::-1].copy()).probability[:, ::-1]
        true.append(score(probability, truth))
        for name, value in candidates(probability, mirrored).items():
            found[name].append(value)
        for name, (other, turned) in disturbed(pixels, truth).items():
            probability = segment(model, other).probability
            odd[name].append((score(probability, turned), confidences(probability, probability > 0.5)[0]))
    scored = np.array(true)
    worst = set(np.argsort(scored)[: round(len(scored) / 10)].tolist())
    return {
        "images": len(true),
        "dice": float(scored.mean()),
        "worst tenth": sorted(scored[list(worst)].tolist()),
        "candidates": {name: judge(np.array(values), scored, worst) for name, values in found.items()},
        "unlike the training images": {
            name: dict(zip(("dice", "confidence"), np.mean(values, axis=0).tolist(), strict=True))
            for name, values in {"as it is": list(zip(true, found["expected Dice"], strict=True)), **odd}.items()
        },
    }


def disturbed(pixels: np.ndarray, truth: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images, with their truth, of kinds that training does not contain."""
    return {
        "on its side": (np.rot90(pixels).copy(), np.rot90(truth).copy()),
        "upside down": (pixels[::-1].copy(), truth[::-1].copy()),
        "black and white exchanged": (255 - pixels, truth),
        "very dark": (pixels // 4, truth),
    }


def score(probability: np.ndarray, truth: np.ndarray) -> float:
    """Dice of the lungs, without ignored pixels."""
    valid = truth != IGNORE
    return dice((probability > 0.5) & valid, (truth == 1) & valid)


def measure_ensemble(options: Options) -> dict[str, Any]:
    """Whether the disagreement of the networks of the first rounds of `next` tells more than the confidence of one."""
    models = [load_model(options.work / f"runs_next{seed}_first") for seed in options.seeds]
    dataset = open_dataset(DataConfig(root=str(options.work / f"next{options.seeds[0]}_first")))
    found: dict[str, list[float]] = defaultdict(list)
    true = []
    for sample in dataset.of("test"):
        maps = [segment(model, read_image(sample.image, 1).astype(np.uint8)).probability for model in models]
        mean = np.mean(maps, axis=0)
        true.append(score(mean, read_truth(sample, dataset.coding)))
        found["expected Dice, mean of the networks"].append(confidences(mean, mean > 0.5)[0])
        found["mean of the networks' expected Dice"].append(float(np.mean([confidences(p, p > 0.5)[0] for p in maps])))
        pairs = [dice(one > 0.5, other > 0.5) for one, other in combinations(maps, 2)]
        found["Dice of the networks' masks, mean of all pairs"].append(float(np.mean(pairs)))
    scored = np.array(true)
    worst = set(np.argsort(scored)[: round(len(scored) / 10)].tolist())
    rows = {name: judge(np.array(values), scored, worst) for name, values in found.items()}
    return {"networks": len(models), "images": len(true), "dice": float(scored.mean()), "candidates": rows}


def judge(values: np.ndarray, scored: np.ndarray, worst: set[int]) -> dict[str, float]:
    """How well `values` (N,) order images by their Dice `scored` (N,)."""
    first = set(np.argsort(values)[: round(len(values) / 5)].tolist())
    drawn = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    again = [float(stats.spearmanr(values[rows], scored[rows]).statistic) for rows in drawn]
    return {
        "spearman": float(stats.spearmanr(values, scored).statistic),
        "low": float(np.quantile(again, 0.025)),
        "high": float(np.quantile(again, 0.975)),
        "pearson": float(stats.pearsonr(values, scored).statistic),
        "worst tenth in first fifth": len(worst & first) / len(worst),
        "mean difference from dice": float(np.abs(values - scored).mean()),
    }


def measure_next(options: Options) -> dict[str, Any]:
    """Test Dice after the first round, and after the second with each way of choosing."""
    of = folds(options)
    test = {patient for patient, fold in of.items() if fold < TEST_FOLDS}
    val: set[str] = set()
    for patient in (patient for patient in of if patient not in test):
        if sum(row["patient"] in val for row in manifest(options)) < 6:
            val.add(patient)
    pool = [row["image"] for row in manifest(options) if row["patient"] not in test | val]
    (options.work / "pool").mkdir(exist_ok=True)
    for image in pool:
        link = options.work / "pool" / Path(image).name
        if not link.exists():
            os.symlink((options.lungs / image).resolve(), link)

    def run(name: str, images: Iterable[str], seed: int) -> Path:
        splits = {row["image"]: "test" for row in manifest(options) if row["patient"] in test}
        splits |= {row["image"]: "val" for row in manifest(options) if row["patient"] in val}
        splits |= dict.fromkeys(images, "train")
        return train(
            options, write_split(options, name, splits), name, size=options.size, steps=options.steps, seed=seed
        )

    rounds: list[dict[str, float]] = []
    for seed in options.seeds:
        first = random.Random(seed).sample(pool, options.first)
        folder = run(f"next{seed}_first", first, seed)
        row = {"first": test_dice(folder)}
        for choice in options.choices:
            more = pick(options, choice, folder, [image for image in pool if image not in first], seed)
            row[choice] = test_dice(run(f"next{seed}_{choice.replace(' ', '_')}", [*first, *more], seed))
        rounds.append(row)
        print(row, flush=True)
    return {"pool": len(pool), "added": options.first, "rounds": rounds, "gain over random": gains(options, rounds)}


def pick(options: Options, choice: str, folder: Path, left: Sequence[str], seed: int) -> list[str]:
    """The images of the second round."""
    if choice == "random":
        return random.Random(1000 + seed).sample(list(left), options.first)
    if choice == "least confident":
        viewer = Viewer(folder)
        return sorted(left, key=lambda image: viewer.look(read_image(options.lungs / image, 1)).confidence)[
            : options.first
        ]
    chosen = options.work / f"next{seed}.txt"
    if not chosen.exists():
        words = ["--weights", folder, "--pool", options.work / "pool", "--count", options.first, "--output", chosen]
        command = [sys.executable, "-m", "pdrunet_jax.data", "next", *map(str, words)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return [f"images/{Path(line).name}" for line in chosen.read_text(encoding="utf-8").splitlines()]


def test_dice(folder: Path) -> float:
    """Mean test Dice of a run."""
    rows = scores.read_csv(folder / "evaluation" / "test" / "per_image.csv")
    return float(np.mean([row.dice for row in rows]))


def gains(options: Options, rounds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean difference of each choice from the first, and its 95 % interval (Student's t, over the seeds)."""
    found = {}
    for choice in options.choices[1:]:
        each = np.array([row[choice] - row[options.choices[0]] for row in rounds])
        half = stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.nan
        found[choice] = {
            "mean": float(each.mean()),
            "low": float(each.mean() - half),
            "high": float(each.mean() + half),
        }
    return found


def main() -> None:
    """Run the command."""
    options = tyro.cli(Options, prog="python -m benchmarks.review")
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "confidence": lambda: measure_confidence(unseen(options)),
        "run": lambda: measure_confidence(of_run(options)),
        "next": lambda: measure_next(options),
        "ensemble": lambda: measure_ensemble(options),
    }
    found = {name: measures[name]() for name in options.only}
    for result in (result for result in found.values() if "candidates" in result):
        title = f"{result['images']} images, Dice {result['dice']:.3f}"
        print(f"| {title} | Spearman with Dice (95 %) | worst tenth among the first fifth |")
        print("|---|---|---|")
        for name, row in result["candidates"].items():
            interval = f"{row['spearman']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            print(f"| {name} | {interval} | {row['worst tenth in first fifth']:.0%} |")
        for name, row in result.get("unlike the training images", {}).items():
            print(f"{name}: dice {row['dice']:.3f}, confidence {row['confidence']:.3f}")
    if "next" in found:
        for choice, row in found["next"]["gain over random"].items():
            print(f"{choice} - random: {row['mean']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})")
    settings = {
        name: value for name, value in vars(options).items() if name not in ("lungs", "work", "run", "output", "only")
    }
    output.write({"machine": machine.facts(), "settings": settings, **found}, options.output)


if __name__ == "__main__":
    main()
