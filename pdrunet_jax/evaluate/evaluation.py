"""Scores that several processes have computed, each of some images, put together in all of them.

Scores of a model on one split of a dataset, and the folder they are written to.

Scores are computed at each input's own resolution: probabilities are brought back to it before they are decided, and
compared with the mask as it was drawn. (Validation during training compares at the network's resolution, which is
faster; the two differ by little.) Ignored pixels count nowhere.
"""

import base64
import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data import overlay as pictures
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.images import read_image, read_spacing
from pdrunet_jax.data.masks import read_mask
from pdrunet_jax.data.split import Sample
from pdrunet_jax.evaluate import scores
from pdrunet_jax.evaluate.calibration import Curves, Histograms
from pdrunet_jax.evaluate.scores import ImageScores, ScoringOptions, score, to_csv
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.pixels import probabilities
from pdrunet_jax.predict.inference import predict_batches, restore
from pdrunet_jax.predict.postprocess import Cleaning, clean
from pdrunet_jax.predict.threshold import apply_threshold, check_threshold
from pdrunet_jax.runtime.devices import Placement
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import atomic_write
from pdrunet_jax.runtime.processes import Group


def exchange(
    group: Group,
    samples: Sequence[Sample],
    rows: Sequence[ImageScores],
    masks: dict[str, bytes],
    histograms: Histograms,
) -> tuple[list[ImageScores], dict[str, bytes]]:
    """Rows and masks of all processes, in the order of `samples`; `histograms` then counts the images of all.

    The arguments are what this process has. Numbers come back as they were: JSON has every digit of a float.
    """
    mine = {
        "rows": [dataclasses.astuple(row) for row in rows],
        "masks": {name: base64.b64encode(mask).decode() for name, mask in masks.items()},
        "histograms": histograms.counts(),
    }
    parts = [json.loads(part) for part in group.exchange(json.dumps(mine).encode())]
    place = {sample.id: number for number, sample in enumerate(samples)}
    every = sorted((ImageScores(*row) for part in parts for row in part["rows"]), key=lambda row: place[row.image])
    found = {name: base64.b64decode(mask) for part in parts for name, mask in part["masks"].items()}
    for index, part in enumerate(parts):
        if index != group.index:
            histograms.add_counts(part["histograms"])
    return every, {sample.id: found[sample.id] for sample in samples}


WORST = 6
"""Cases on worst.png."""
CASES = (("best", 2), ("median", 2), ("worst", 3))
"""Cases whose panels are kept for the report."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split, and what was predicted."""

    dataset: Dataset
    split: str
    samples: tuple[Sample, ...]
    rows: tuple[ImageScores, ...]
    """One for each image and class, in the dataset's order."""
    summary: scores.Summary
    masks: dict[str, bytes]
    """By sample id the predicted class indices at the input's resolution, uint8, compressed by zlib."""
    unit_note: str
    """The unit of distances, and why it is that one."""
    curves: dict[str, Curves]
    """Calibration and threshold curve of each class, before any cleaning."""

    @property
    def line(self) -> str:
        """`test dice 0.934 (95% 0.921-0.945, 24 images, 24 patients)`."""
        return scores.dice_line(self.split, self.summary)

    def remarks(self) -> list[str]:
        """What a table of the scores does not say: empty masks, the unit of distances."""
        return [*scores.remarks(self.summary.to_dict()), self.unit_note]

    def ranked(self) -> list[tuple[Sample, float]]:
        """Samples with their Dice (mean of the classes), best first; those without a defined Dice are left out."""
        values = scores.image_means(self.rows)
        scored = [(sample, values[sample.id]) for sample in self.samples if not np.isnan(values[sample.id])]
        return sorted(scored, key=lambda case: -case[1])

    def cases(self) -> list[tuple[str, int, Sample, float]]:
        """Kind, rank from 1, sample and Dice of the best, median and worst cases, none of them twice."""
        ranked = self.ranked()
        middle = max(0, len(ranked) // 2 - 1)
        chosen = {"best": ranked, "median": ranked[middle:], "worst": ranked[::-1]}
        cases: list[tuple[str, int, Sample, float]] = []
        seen: set[str] = set()
        for kind, number in sorted(CASES, key=lambda case: case[0] == "median"):  # the ends have the first choice
            for rank, (sample, dice) in enumerate(chosen[kind][:number], 1):
                if sample.id not in seen:
                    seen.add(sample.id)
                    cases.append((kind, rank, sample, dice))
        order = [kind for kind, _ in CASES]
        return sorted(cases, key=lambda case: order.index(case[0]))

    def masks_of(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Truth and prediction of a sample, (H, W) uint8 at its own resolution."""
        truth = read_mask(_mask_of(sample), self.dataset.coding)
        return truth, np.frombuffer(zlib.decompress(self.masks[sample.id]), np.uint8).reshape(truth.shape)


def evaluate_split(
    model: PDRUNet,
    dataset: Dataset,
    split: str,
    config: DataConfig,
    *,
    batch_size: int = 8,
    threshold: float = 0.5,
    tolerance: float = ScoringOptions.tolerance,
    empty_dice: float = ScoringOptions.empty_dice,
    cleaning: Cleaning | None = None,
    group: Group | None = None,
) -> Evaluation:
    """Score `model` on one split, or on every image for "all", with all devices of this process.

    Args:
        model: From `load_model`, or as it was trained.
        dataset: From `open_dataset`.
        split: "train", "val", "test" or "all".
        config: How images are read and the size that the network works at.
        batch_size: Images in each batch; has no part in the result.
        threshold: Probability above which a pixel is foreground, for one output.
        tolerance: Distance up to which `nsd` counts a boundary as right; in mm if the pixel spacing of every image is
            known, else in pixels.
        empty_dice: Dice and IoU where a class is in neither truth nor prediction; NaN leaves it out of means.
        cleaning: What is done to each mask before it is scored.
        group: Processes that do this together, each some of the batches; all of them receive the result.

    Raises:
        UserError: The split is empty, model and dataset have different classes, or the threshold does not fit.
    """
    check_threshold(threshold, model.outputs)
    group = group or Group()
    samples = dataset.of(split)
    spacings, unit_note = spacings_of(dataset, samples)
    rules = ScoringOptions(unit_of(spacings), tolerance, empty_dice)
    rows: list[ImageScores] = []
    masks = {}
    histograms = Histograms(dataset.class_names, empty_dice)
    for sample, probability, truth in predicted_probabilities(
        model, dataset, split, config, batch_size=batch_size, stride=(group.index, group.count)
    ):
        histograms.add(probability, truth)
        predicted = apply_threshold(probability, threshold)
        if cleaning is not None:
            predicted = clean(predicted, cleaning)
        spacing = spacings.get(sample.id)
        rows += score(sample.id, sample.patient, predicted, truth, dataset.class_names, rules, spacing)
        masks[sample.id] = zlib.compress(predicted.tobytes(), 1)
    if group.count > 1:
        rows, masks = exchange(group, samples, rows, masks, histograms)
    summary = scores.summarise(rows, rules)
    return Evaluation(dataset, split, samples, tuple(rows), summary, masks, unit_note, histograms.curves())


def predicted_probabilities(
    model: PDRUNet,
    dataset: Dataset,
    split: str,
    config: DataConfig,
    *,
    batch_size: int = 8,
    stride: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Sample, np.ndarray, np.ndarray]]:
    """Each sample with its probabilities, as in `Prediction`, and its truth (H, W), at its own resolution.

    Arguments and errors as for `evaluate_split`; `stride` (k, n) leaves out all batches but k, k + n, ...
    """
    from pdrunet_jax.data.pipeline import eval_batches

    _check_classes(model, dataset)
    samples = dataset.of(split)
    if not samples:
        filled = [name for name in ("train", "val", "test") if dataset.of(name)]
        raise UserError(f"{dataset.root} has no images in the split {split}; --split takes {', '.join(filled)} or all")
    place = Placement.here()
    batches = eval_batches(
        dataset,
        split,
        config,
        batch_size=place.eval_batch_size(batch_size),
        channels=model.in_channels,
        stride=stride,
    )
    for batch, logits in predict_batches(model, batches, place):
        probability = probabilities(np.asarray(logits))
        for number in np.flatnonzero(batch["valid"]):
            sample = samples[int(batch["index"][number])]
            truth = read_mask(_mask_of(sample), dataset.coding)
            yield sample, restore(probability[number], truth.shape), truth


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    about: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
) -> None:
    """Write per_image.csv, summary.json, curves.json, worst.png and the report's cases into `folder`, which is made.

    `about` (the weights, settings) and `environment` go into summary.json as they are. Raises `RunError` if the folder
    cannot be written.
    """
    try:
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        for name in ("comparison.json", "comparison.csv"):  # of an earlier evaluation, whose scores are replaced
            (folder / name).unlink(missing_ok=True)
        atomic_write(folder / "per_image.csv", to_csv(evaluation.rows))
        curves = {name: each.to_dict() for name, each in evaluation.curves.items()}
        atomic_write(folder / "curves.json", json.dumps(curves, ensure_ascii=False) + "\n")
        if ranked := evaluation.ranked():
            pictures.save(_sheet(evaluation, ranked[: -WORST - 1 : -1]), folder / "worst.png")
        summary = {
            "line": evaluation.line,
            "split": evaluation.split,
            **evaluation.summary.to_dict(),
            "expected_calibration_error": {name: each["expected_calibration_error"] for name, each in curves.items()},
            "dataset": describe_dataset(evaluation.dataset),
            "about": {"resolution": "input", **(about or {})},
            "environment": environment or {},
            "cases": _write_cases(evaluation, folder),
        }
        atomic_write(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be written ({error.strerror})") from None


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Name, classes, notes, and the number of images and patients in each split, as JSON values."""
    splits = {}
    for name in ("train", "val", "test"):
        samples = dataset.of(name)
        splits[name] = {"images": len(samples), "patients": len({sample.patient for sample in samples})}
    return {
        "name": dataset.name,
        "classes": list(dataset.class_names),
        "splits": splits,
        "notes": list(dataset.notes),
    }


def _check_classes(model: PDRUNet, dataset: Dataset) -> None:
    classes = max(model.outputs - 1, 1)
    if classes != len(dataset.class_names):
        raise UserError(
            f"the model tells {classes} foreground classes apart and {dataset.root} has {len(dataset.class_names)} "
            f"({', '.join(dataset.class_names)}); declare the model's classes with --data.classes"
        )


def _mask_of(sample: Sample) -> Path:
    if sample.mask is None:
        raise UserError(f"{sample.id} has no mask to be scored against")
    return sample.mask


def spacings_of(dataset: Dataset, samples: Sequence[Sample]) -> tuple[dict[str, tuple[float, float]], str]:
    """By sample id the pixel spacing in mm if every image has one, else nothing; and a line that says so."""
    spacings = {}
    for sample in samples:
        spacing = read_spacing(sample.image) or dataset.spacing
        if spacing is None:
            return {}, f"distances are in pixels: {sample.id} states no pixel spacing, nor does dataset.toml"
        spacings[sample.id] = spacing
    return spacings, "distances are in mm"


def unit_of(spacings: Mapping[str, tuple[float, float]]) -> str:
    """The unit that distances then have."""
    return "mm" if spacings else "pixels"


def _sheet(evaluation: Evaluation, cases: Sequence[tuple[Sample, float]]) -> Image.Image:
    images = [read_image(sample.image, 1) for sample, _ in cases]
    truths, predictions = zip(*(evaluation.masks_of(sample) for sample, _ in cases), strict=True)
    captions = [f"dice {dice:.3f}  {sample.id}" for sample, dice in cases]
    return pictures.sample_sheet(images, truths, predictions, captions)


def _write_cases(evaluation: Evaluation, folder: Path) -> list[dict[str, Any]]:
    """Save the panels of the best, median and worst cases; what they are, as JSON values."""
    cases: list[dict[str, Any]] = []
    for kind, rank, sample, dice in evaluation.cases():
        names = [f"cases/{kind}_{rank}_{panel}.png" for panel in pictures.PANELS]
        drawn = pictures.panels(read_image(sample.image, 1), *evaluation.masks_of(sample))
        for name, picture in zip(names, drawn, strict=True):
            pictures.save(picture, folder / name)
        cases.append({"kind": kind, "image": sample.id, "dice": dice, "panels": names})
    return cases
