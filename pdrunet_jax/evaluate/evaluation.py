"""Score a model on one split of a dataset, and write the scores to a folder.

Scores are computed at each input's own resolution: probabilities are resized to the input before the threshold is
applied, and compared with the mask as drawn. (Validation during training compares at the network's resolution, which is
faster; the scores differ slightly.) Ignored pixels are excluded.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from flax.serialization import msgpack_restore, msgpack_serialize

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data import overlay
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.fit import Fit
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.layers import read_truth
from pdrunet_jax.data.pipeline import eval_batches
from pdrunet_jax.data.split import Sample
from pdrunet_jax.evaluate import compare, scores
from pdrunet_jax.evaluate.calibration import Curves, Histograms
from pdrunet_jax.evaluate.scores import ImageScores, ScoringOptions
from pdrunet_jax.model.base import Network
from pdrunet_jax.predict.engines.engine import Engine, facts_of
from pdrunet_jax.predict.engines.network import predict_batches
from pdrunet_jax.predict.inference import finite_probabilities, resize_to_image
from pdrunet_jax.predict.postprocess import Cleaning, clean
from pdrunet_jax.predict.threshold import apply_threshold, check_threshold
from pdrunet_jax.runtime.cli import printable
from pdrunet_jax.runtime.devices import Placement
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, require_inside, writing
from pdrunet_jax.runtime.processes import Group

WORST = 6  # on worst.png
CASES = (("best", 2), ("median", 2), ("worst", 3))  # in the report


@dataclass(frozen=True)
class EvaluationOptions:
    """How masks are predicted and scored, apart from the threshold."""

    batch_size: int = 8
    """Images per batch; does not affect the scores."""
    tolerance: float = ScoringOptions.tolerance
    """Largest distance at which nsd counts a boundary pixel as correct: in mm if the pixel spacing of every image is
    known (DICOM, or spacing in dataset.toml), else in pixels."""
    empty_dice: float = ScoringOptions.empty_dice
    """Dice of a class absent from both truth and prediction; nan excludes it from means."""
    cleaning: Annotated[Cleaning, tyro.conf.arg(name="")] = field(default_factory=Cleaning)


class Case(NamedTuple):
    """An image shown in the report: the `rank`-th (from 1) "best", "median" or "worst", by the mean Dice of classes."""

    kind: str
    rank: int
    sample: Sample
    dice: float


class Scored(NamedTuple):
    """A model, the images that it is scored on, and its threshold."""

    model: Network | Engine
    dataset: Dataset
    threshold: float | tuple[float, ...] = 0.5


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split, and the predicted masks of the cases to show."""

    dataset: Dataset
    split: str
    rows: tuple[ImageScores, ...]
    """One per image and class, in the dataset's order."""
    summary: scores.Summary
    masks: dict[str, bytes]
    """Sample id to predicted class indices (H, W) at the input's resolution: uint8, zlib-compressed."""
    unit_note: str
    """Unit of distances, and the reason for it."""
    curves: dict[str, Curves]
    """Calibration and threshold curve of each class, before cleaning."""

    def text(self) -> str:
        """The scores as printed: an aligned table, then remarks on empty masks and the unit of distances."""
        values = self.summary.to_dict()
        table = scores.aligned(scores.score_table(values), words=2)
        return printable("\n".join([table, *scores.remarks(values), self.unit_note]))

    def ranked(self) -> list[tuple[Sample, float]]:
        """Samples with their Dice (mean of the classes), best first, without those whose Dice is undefined."""
        values = scores.image_means(self.rows)
        samples = self.dataset.of(self.split)
        scored = [(sample, values[sample.id]) for sample in samples if not np.isnan(values[sample.id])]
        return sorted(scored, key=lambda case: -case[1])

    def worst(self) -> list[tuple[Sample, float]]:
        """The cases on worst.png, worst first."""
        return self.ranked()[: -WORST - 1 : -1]

    def cases(self) -> list[Case]:
        """Best, median and worst cases, each image once."""
        ranked = self.ranked()
        middle = max(0, len(ranked) // 2 - 1)
        chosen = {"best": ranked, "median": ranked[middle:], "worst": ranked[::-1]}
        cases: dict[str, Case] = {}
        for kind, number in sorted(CASES, key=lambda case: case[0] == "median"):  # best and worst choose first
            for rank, (sample, dice) in enumerate(chosen[kind][:number], 1):
                cases.setdefault(sample.id, Case(kind, rank, sample, dice))
        order = [kind for kind, _ in CASES]
        return sorted(cases.values(), key=lambda case: order.index(case.kind))

    def masks_of(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Truth and prediction of one of the cases, uint8 (H, W), or (H, W, K) if classes overlap."""
        truth = read_truth(sample, self.dataset.coding)
        return truth, np.frombuffer(zlib.decompress(self.masks[sample.id]), np.uint8).reshape(truth.shape)


def evaluate_split(
    model: Network | Engine,
    dataset: Dataset,
    split: str,
    config: DataConfig,
    options: EvaluationOptions | None = None,
    *,
    threshold: float | tuple[float, ...] = 0.5,
    group: Group | None = None,
) -> Evaluation:
    """Score `model` on the split "train", "val" or "test", or on every image for "all".

    `config` sets how images are read and the input size of the network. With one output, pixels of a probability above
    `threshold` are foreground. All devices of this process are used; the processes of `group` share the batches, and
    all of them receive the result.

    Raises `UserError` if the split is empty, model and dataset have different classes, or the threshold is invalid.
    """
    return evaluate_parts(dataset, split, [Scored(model, dataset, threshold)], config, options, group=group)


def evaluate_parts(
    dataset: Dataset,
    split: str,
    parts: Iterable[Scored],
    config: DataConfig,
    options: EvaluationOptions | None = None,
    *,
    group: Group | None = None,
) -> Evaluation:
    """Score the `split` of `dataset` in `parts`, datasets with some of its images each; else as `evaluate_split`."""
    options, group = options or EvaluationOptions(), group or Group()
    samples = dataset.of(split)
    spacings, unit, unit_note = read_spacings(dataset, samples)
    rules = ScoringOptions(unit, options.tolerance, options.empty_dice)

    # Score this process's images. Which masks the report shows is known only after the last one.
    rows: list[ImageScores] = []
    masks = {}
    histograms = Histograms(dataset.class_names, options.empty_dice)
    for model, part, threshold in parts:
        facts = facts_of(model)
        check_threshold(threshold, facts.outputs, multilabel=facts.multilabel)
        for sample, probability, truth in predicted_probabilities(
            model, part, split, config, batch_size=options.batch_size, stride=(group.index, group.count)
        ):
            histograms.add(probability, truth)
            predicted = clean(apply_threshold(probability, threshold, multilabel=facts.multilabel), options.cleaning)
            spacing = spacings.get(sample.id)
            rows += scores.score(sample.id, sample.patient, predicted, truth, dataset.class_names, rules, spacing)
            masks[sample.id] = zlib.compress(predicted.tobytes(), 1)

    # Merge the processes: first scores and histograms, which select the cases, then only the masks of those cases.
    rows = _gather_scores(group, samples, rows, histograms)
    summary, curves = scores.summarise(rows, rules), histograms.curves()
    evaluation = Evaluation(dataset, split, tuple(rows), summary, {}, unit_note, curves)
    return replace(evaluation, masks=_gather_masks(group, masks, evaluation))


def predicted_probabilities(
    model: Network | Engine,
    dataset: Dataset,
    split: str,
    config: DataConfig,
    *,
    batch_size: int = 8,
    stride: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Sample, np.ndarray, np.ndarray]]:
    """Yield each sample, its probabilities (as in `Prediction`) and its truth (H, W), at its own resolution.

    Arguments and errors as for `evaluate_split`; `stride` (k, n) selects the batches k, k + n, k + 2 n, ...
    """
    facts = facts_of(model)
    if facts.multilabel != dataset.multilabel:
        raise UserError(
            f"the classes of the model {'overlap' if facts.multilabel else 'exclude each other'}, and those of "
            f"{dataset.root} {'overlap' if dataset.multilabel else 'exclude each other'}: give data.multilabel as in "
            "training"
        )
    if facts.foreground_classes != len(dataset.class_names):
        raise UserError(
            f"the model has {facts.foreground_classes} foreground classes, but {dataset.root} has "
            f"{len(dataset.class_names)} ({', '.join(dataset.class_names)}); declare the model's classes with "
            "--data.classes"
        )
    samples = dataset.of(split)
    if not samples:
        filled = [name for name in ("train", "val", "test") if dataset.of(name)]
        raise UserError(f"{dataset.root} has no images in the split {split}; use --split {', '.join(filled)} or all")
    fit, place = Fit.of(config), Placement.here()
    batches = eval_batches(
        dataset, split, config, batch_size=place.eval_batch_size(batch_size), channels=facts.in_channels, stride=stride
    )
    for batch, logits in predict_batches(model, batches, place):
        values = np.asarray(logits)
        for number in np.flatnonzero(batch["valid"]):
            sample = samples[int(batch["index"][number])]
            truth = read_truth(sample, dataset.coding)
            probability = finite_probabilities(values[number], sample.id, multilabel=facts.multilabel)
            box = fit.box(truth.shape, dataset.spacing_of(sample) if fit.spacing else None)
            yield sample, resize_to_image(box.crop(probability), truth.shape[:2]), truth


def read_spacings(dataset: Dataset, samples: Sequence[Sample]) -> tuple[Mapping[str, tuple[float, float]], str, str]:
    """Pixel spacing in mm by sample id (empty unless every image has one), the unit of distances, and the reason."""
    spacings = {}
    for sample in samples:
        spacing = dataset.spacing_of(sample)
        if spacing is None:
            note = f"distances are in pixels: {sample.id} has no pixel spacing, and dataset.toml declares none"
            return {}, "pixels", note
        spacings[sample.id] = spacing
    return spacings, "mm" if spacings else "pixels", "distances are in mm"


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    about: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> None:
    """Write per_image.csv, summary.json, curves.json, worst.png and the report's cases to `folder`, which is created.

    A comparison in it is deleted, because its scores are replaced. `about` (weights, settings) and `environment` are
    copied to summary.json. Raises `RunError` if the folder cannot be written, `UserError` if its
    cases/ is a link out of it.
    """
    curves = {name: each.to_dict() for name, each in evaluation.curves.items()}
    require_inside(folder, folder / "cases")
    with writing(folder):
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        for name in compare.FILES:
            (folder / name).unlink(missing_ok=True)
        atomic_write(folder / "per_image.csv", scores.to_csv(evaluation.rows))
        atomic_write(folder / "curves.json", json.dumps(curves, ensure_ascii=False) + "\n")
        if worst := evaluation.worst():
            images = [read_image(sample.image, 1) for sample, _ in worst]
            truths, predictions = zip(*(evaluation.masks_of(sample) for sample, _ in worst), strict=True)
            captions = [f"dice {dice:.3f}  {sample.id}" for sample, dice in worst]
            overlay.save(overlay.sample_sheet(images, truths, predictions, captions), folder / "worst.png")
        summary = {
            "line": scores.dice_line(evaluation.split, evaluation.summary),
            "split": evaluation.split,
            **evaluation.summary.to_dict(),
            "expected_calibration_error": {name: each["expected_calibration_error"] for name, each in curves.items()},
            "dataset": _describe(evaluation.dataset),
            "about": {"resolution": "input", **(about or {})},
            "environment": environment or {},
            "cases": _write_cases(evaluation, folder),
        }
        atomic_write(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _gather_scores(
    group: Group, samples: Sequence[Sample], rows: Sequence[ImageScores], histograms: Histograms
) -> list[ImageScores]:
    """Rows of all processes in the order of `samples`; adds the counts of all processes to `histograms`."""
    # JSON keeps every digit of a float.
    mine = {"rows": [list(vars(row).values()) for row in rows], "counts": histograms.counts.tolist()}
    parts = [json.loads(part) for part in group.gather(json.dumps(mine).encode())]
    histograms.counts = np.sum([part["counts"] for part in parts], axis=0)
    place = {sample.id: number for number, sample in enumerate(samples)}
    return sorted((ImageScores(*row) for part in parts for row in part["rows"]), key=lambda row: place[row.image])


def _gather_masks(group: Group, masks: Mapping[str, bytes], evaluation: Evaluation) -> dict[str, bytes]:
    """Compressed masks of the cases to show, from all processes."""
    cases = [*(case.sample for case in evaluation.cases()), *(sample for sample, _ in evaluation.worst())]
    shown = list(dict.fromkeys(sample.id for sample in cases))
    parts = map(msgpack_restore, group.gather(msgpack_serialize([masks.get(name) for name in shown])))
    return {name: mask for part in parts for name, mask in zip(shown, part, strict=True) if mask is not None}


def _describe(dataset: Dataset) -> dict[str, Any]:
    """Name, classes, notes, and images and patients per split, as JSON values."""
    splits = {}
    usual = ("train", "val", "test")
    others = sorted({sample.split for sample in dataset.samples} - {*usual})  # of a dataset in folds
    for name in (*(usual if any(map(dataset.of, usual)) else ()), *others):
        samples = dataset.of(name)
        splits[name] = {"images": len(samples), "patients": len({sample.patient for sample in samples})}
    return {
        "name": dataset.name,
        "classes": list(dataset.class_names),
        "multilabel": dataset.multilabel,
        "patients_from": dataset.patients_from,
        "splits": splits,
        "notes": list(dataset.notes),
    }


def _write_cases(evaluation: Evaluation, folder: Path) -> list[dict[str, Any]]:
    """Save the panels of each case; returns the cases as JSON values."""
    cases = []
    for kind, rank, sample, dice in evaluation.cases():
        names = [f"cases/{kind}_{rank}_{panel}.png" for panel in overlay.PANELS]
        drawn = overlay.panels(read_image(sample.image, 1), *evaluation.masks_of(sample))
        for name, picture in zip(names, drawn, strict=True):
            overlay.save(picture, folder / name)
        cases.append({"kind": kind, "image": sample.id, "dice": dice, "panels": names})
    return cases
