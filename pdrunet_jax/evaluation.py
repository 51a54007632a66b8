"""Scores of a model on one split of a dataset, and the folder they are written to.

Scores are computed at each input's own resolution: probabilities are brought back to it before they are decided, and
compared with the mask as it was drawn. (Validation during training compares at the network's resolution, which is
faster; the two differ by little.) Ignored pixels count nowhere.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdrunet_jax import metrics, pictures, scores
from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.images import read_image, read_spacing
from pdrunet_jax.data.masks import read_mask
from pdrunet_jax.data.partition import Sample
from pdrunet_jax.errors import RunError, UserError
from pdrunet_jax.files import atomic_write
from pdrunet_jax.inference import check_threshold, classify, predict_batches, restore
from pdrunet_jax.model import PDRUNet
from pdrunet_jax.rows import Row, Rules, score, to_csv

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
    rows: tuple[Row, ...]
    """One for each image and class, in the dataset's order."""
    summary: scores.Summary
    masks: dict[str, bytes]
    """By sample id the predicted class indices at the input's resolution, uint8, compressed by zlib."""
    unit_note: str
    """The unit of distances, and why it is that one."""

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


def evaluate_split(
    model: PDRUNet,
    dataset: Dataset,
    split: str,
    config: DataConfig,
    *,
    batch_size: int = 8,
    threshold: float = 0.5,
    tolerance: float = Rules.tolerance,
    empty_dice: float = Rules.empty_dice,
) -> Evaluation:
    """Score `model` on one split, or on every image for "all".

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
    spacings, unit_note = spacings_of(dataset, samples)
    rules = Rules(unit_of(spacings), tolerance, empty_dice)
    rows: list[Row] = []
    masks = {}
    batches = eval_batches(dataset, split, config, batch_size=batch_size, channels=model.in_channels)
    for batch, logits in predict_batches(model, batches):
        probability = metrics.probabilities(np.asarray(logits))
        for number in np.flatnonzero(batch["valid"]):
            sample = samples[int(batch["index"][number])]
            truth = read_mask(_mask_of(sample), dataset.coding)
            predicted = classify(restore(probability[number], truth.shape), threshold)
            spacing = spacings.get(sample.id)
            rows += score(sample.id, sample.patient, predicted, truth, dataset.class_names, rules, spacing)
            masks[sample.id] = zlib.compress(predicted.tobytes(), 1)
    return Evaluation(dataset, split, samples, tuple(rows), scores.summarise(rows, rules), masks, unit_note)


def write_evaluation(evaluation: Evaluation, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write per_image.csv, summary.json, worst.png and the report's cases into `folder`, which is made.

    `about` (the weights, settings) goes into summary.json as it is. Raises `RunError` if the folder cannot be written.
    """
    try:
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "per_image.csv", to_csv(evaluation.rows))
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
