"""Scores of a model on one split of a dataset, and the folder they are written to.

Scores are computed at each input's own resolution: probabilities are brought back to it before they are decided, and
compared with the mask as it was drawn. (Validation during training compares at the network's resolution, which is
faster; the two differ by little.) Ignored pixels count nowhere.
"""

import csv
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdrunet_jax import metrics, pictures, scores
from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.masks import IGNORE, read_mask
from pdrunet_jax.data.partition import Sample
from pdrunet_jax.errors import RunError, UserError
from pdrunet_jax.files import atomic_write
from pdrunet_jax.inference import check_threshold, classify, predict_batches, restore
from pdrunet_jax.model import PDRUNet

WORST = 6
"""Cases on worst.png."""
CASES = (("best", 2), ("median", 2), ("worst", 3))
"""Cases whose panels are kept for the report."""
COLUMNS = [("class" if item.name == "class_name" else item.name) for item in fields(scores.Row)]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split, and what was predicted."""

    dataset: Dataset
    split: str
    samples: tuple[Sample, ...]
    rows: tuple[scores.Row, ...]
    """One for each image and class, in the dataset's order."""
    summary: scores.Summary
    masks: dict[str, bytes]
    """By sample id the predicted class indices at the input's resolution, uint8, compressed by zlib."""

    @property
    def line(self) -> str:
        """`test dice 0.934 (95% 0.921-0.945, 24 images, 24 patients)`."""
        return scores.dice_line(self.split, self.summary)

    def ranked(self) -> list[tuple[Sample, float]]:
        """Samples with their Dice (mean of the classes), best first; those without a defined Dice are left out."""
        values = scores.image_means(self.rows)
        scored = [(sample, values[sample.id]) for sample in self.samples if not np.isnan(values[sample.id])]
        return sorted(scored, key=lambda case: -case[1])


def evaluate_split(
    model: PDRUNet, dataset: Dataset, split: str, config: DataConfig, *, batch_size: int = 8, threshold: float = 0.5
) -> Evaluation:
    """Score `model` on one split, or on every image for "all".

    Args:
        model: From `load_model`, or as it was trained.
        dataset: From `open_dataset`.
        split: "train", "val", "test" or "all".
        config: How images are read and the size that the network works at.
        batch_size: Images in each batch; has no part in the result.
        threshold: Probability above which a pixel is foreground, for one output.

    Raises:
        UserError: The split is empty, model and dataset have different classes, or the threshold does not fit.
    """
    from pdrunet_jax.data.pipeline import eval_batches

    check_threshold(threshold, model.outputs)
    _check_classes(model, dataset)
    samples = dataset.of(split)
    if not samples:
        filled = [name for name in ("train", "val", "test") if dataset.of(name)]
        raise UserError(f"{dataset.root} has no images in the split {split}; --split takes {', '.join(filled)} or all")
    rows: list[scores.Row] = []
    masks = {}
    batches = eval_batches(dataset, split, config, batch_size=batch_size, channels=model.in_channels)
    for batch, logits in predict_batches(model, batches):
        probability = metrics.probabilities(np.asarray(logits))
        for number in np.flatnonzero(batch["valid"]):
            sample = samples[int(batch["index"][number])]
            truth = read_mask(_mask_of(sample), dataset.coding)
            predicted = classify(restore(probability[number], truth.shape), threshold)
            rows += _rows(sample, predicted, truth, dataset.class_names)
            masks[sample.id] = zlib.compress(predicted.tobytes(), 1)
    return Evaluation(dataset, split, samples, tuple(rows), scores.summarise(rows), masks)


def write_evaluation(evaluation: Evaluation, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write per_image.csv, summary.json, worst.png and the report's cases into `folder`, which is made.

    `about` (the weights, settings) goes into summary.json as it is. Raises `RunError` if the folder cannot be written.
    """
    try:
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "per_image.csv", _csv(evaluation.rows))
        if ranked := evaluation.ranked():
            pictures.save(_sheet(evaluation, ranked[: -WORST - 1 : -1]), folder / "worst.png")
        summary = {
            "line": evaluation.line,
            "split": evaluation.split,
            **evaluation.summary.to_dict(),
            "dataset": describe(evaluation.dataset),
            "about": {"resolution": "input", **(about or {})},
            "cases": _write_cases(evaluation, ranked, folder),
        }
        atomic_write(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be written ({error.strerror})") from None


def describe(dataset: Dataset) -> dict[str, Any]:
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


def _rows(sample: Sample, predicted: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> list[scores.Row]:
    counts = metrics.confusion(predicted[None], truth[None], (truth != IGNORE)[None], len(names))
    values = {name: getattr(metrics, name)(counts)[0] for name in scores.METRICS}
    true, positive = (counts.tp + counts.fn)[0], (counts.tp + counts.fp)[0]
    return [
        scores.Row(
            sample.id,
            sample.patient,
            name,
            **{metric: float(value[number]) for metric, value in values.items()},
            pixels_true=int(true[number]),
            pixels_predicted=int(positive[number]),
        )
        for number, name in enumerate(names)
    ]


def _csv(rows: Sequence[scores.Row]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cells = [getattr(row, item.name) for item in fields(row)]
        writer.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells])
    return file.getvalue()


def _case(evaluation: Evaluation, sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, truth and prediction of a sample, at its own resolution."""
    truth = read_mask(_mask_of(sample), evaluation.dataset.coding)
    predicted = np.frombuffer(zlib.decompress(evaluation.masks[sample.id]), np.uint8).reshape(truth.shape)
    return read_image(sample.image, 1), truth, predicted


def _sheet(evaluation: Evaluation, cases: Sequence[tuple[Sample, float]]) -> Image.Image:
    images, truths, predictions = zip(*(_case(evaluation, sample) for sample, _ in cases), strict=True)
    captions = [f"dice {dice:.3f}  {sample.id}" for sample, dice in cases]
    return pictures.sample_sheet(images, truths, predictions, captions)


def _write_cases(evaluation: Evaluation, ranked: list[tuple[Sample, float]], folder: Path) -> list[dict[str, Any]]:
    """Save the panels of the best, median and worst cases, none of them twice; what they are, as JSON values."""
    middle = max(0, len(ranked) // 2 - 1)
    chosen = {"best": ranked, "median": ranked[middle:], "worst": ranked[::-1]}
    cases: list[dict[str, Any]] = []
    seen: set[str] = set()
    for kind, number in sorted(CASES, key=lambda case: case[0] == "median"):  # the ends have the first choice
        for rank, (sample, dice) in enumerate(chosen[kind][:number], 1):
            if sample.id in seen:
                continue
            seen.add(sample.id)
            names = [f"cases/{kind}_{rank}_{panel}.png" for panel in pictures.PANELS]
            for name, picture in zip(names, pictures.panels(*_case(evaluation, sample)), strict=True):
                pictures.save(picture, folder / name)
            cases.append({"kind": kind, "image": sample.id, "dice": dice, "panels": names})
    order = [kind for kind, _ in CASES]
    return sorted(cases, key=lambda case: order.index(case["kind"]))
