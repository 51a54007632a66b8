"""Final evaluation: pick a threshold on the validation set, score the test set, write the report.

Also best.safetensors, the weights with the best validation score, and the baseline that every model should beat.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.config import Config, DataConfig, settings_digest
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.fit import Box
from pdrunet_jax.data.images import read_image, resize_image
from pdrunet_jax.data.masks import IGNORE, read_mask, resize_mask
from pdrunet_jax.evaluate import scores
from pdrunet_jax.evaluate.calibration import THRESHOLDS, Histograms
from pdrunet_jax.evaluate.evaluation import (
    Evaluation,
    EvaluationOptions,
    evaluate_split,
    predicted_probabilities,
    write_evaluation,
)
from pdrunet_jax.evaluate.report.page import write_report
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.files import write_safetensors
from pdrunet_jax.model.load import load_model
from pdrunet_jax.model.sides import SWAP, VERTICAL, find_pairs
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.predict.threshold import store_threshold, thresholds_text
from pdrunet_jax.runtime.digest import CONTENT, SETTINGS, content_digest
from pdrunet_jax.runtime.errors import DataError
from pdrunet_jax.runtime.files import require_inside
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.progress import Progress
from pdrunet_jax.train.step import TrainState
from pdrunet_jax.train.tracking import Tracker
from pdrunet_jax.train.wandb_run import Picture, ScoreTable

LONGEST_SIDE = 512
"""Longest side of a picture for W&B, in pixels; all of them are uploaded."""


def threshold_baseline(dataset: Dataset, split: str) -> float:
    """Mean Dice of the best global grey threshold on a split of a dataset with one class, without ignored pixels."""
    images, masks = [], []
    for sample in dataset.of(split):
        mask = read_mask(sample.mask, dataset.coding)
        valid = mask != IGNORE
        images.append(read_image(sample.image)[..., 0].round().astype(np.uint8)[valid])
        masks.append(mask[valid])
    return threshold_dice(images, masks)


def threshold_dice(images: Sequence[NDArray[np.uint8]], masks: Sequence[NDArray[np.uint8]]) -> float:
    """Mean Dice per image of the best single grey threshold, with either its bright or its dark side as foreground.

    `images` are grey, uint8, each of any shape; in `masks`, of the same shapes, everything but 0 is foreground. The
    threshold is chosen and scored on the same images, which flatters it.
    """
    return float(np.mean([_scores(image, mask) for image, mask in zip(images, masks, strict=True)], axis=0).max())


def _scores(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Dice of every threshold t: first for pixels >= t, then for pixels <= t, t = 0..255."""
    foreground = np.bincount(image[mask > 0].ravel(), minlength=256).astype(np.float64)
    everything = np.bincount(image.ravel(), minlength=256).astype(np.float64)
    hits = np.concatenate([foreground[::-1].cumsum()[::-1], foreground.cumsum()])
    predicted = np.concatenate([everything[::-1].cumsum()[::-1], everything.cumsum()])
    total = predicted + foreground.sum()
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)


def save_best(
    run: RunFolder, config: Config, dataset: Dataset, outputs: int, state: TrainState, progress: Progress
) -> None:
    """Write best.safetensors: the weights of `progress.best_step` under the public names. Raises `RunError`."""
    arrays = to_public(*state.weights)
    options = {
        **weights_options(config, dataset, outputs),
        "step": progress.best_step,
        "val_dice": progress.best_dice,
        SETTINGS: settings_digest(config),
    }
    write_safetensors(run.best, arrays, {**options, CONTENT: content_digest(arrays, options)})


def weights_options(config: Config, dataset: Dataset, outputs: int) -> dict[str, Any]:
    """What weights need to be used, as JSON values: the network's options, how images are fitted, the class names."""
    options: dict[str, Any] = {
        **config.model.wiring(),
        "dropout": config.model.dropout,
        "outputs": outputs,
        "size": list(config.data.height_width),
        "fit": config.data.fit,
        **({} if config.data.spacing is None else {"spacing": config.data.spacing}),
        **({"multilabel": True} if dataset.multilabel else {}),
        "class_names": list(dataset.class_names),
    }
    if dataset.swap_on_flip is not None and (dataset.swap_on_flip or any(find_pairs(dataset.class_names))):
        options |= {SWAP: [list(pair) for pair in dataset.swap_on_flip], VERTICAL: bool(config.augment.flip_vertical)}
    return options


class Choice(NamedTuple):
    """The best threshold on the validation set; one for each class if classes overlap."""

    threshold: float | tuple[float, ...]
    """Of `calibration.THRESHOLDS`; of several equally good ones, the one nearest 0.5."""
    dice: float
    """Mean Dice (mean of classes) at this threshold, at the images' own resolution."""
    dice_at_half: float
    """Mean Dice at 0.5."""


def choose_threshold(
    model: Network, dataset: Dataset, config: DataConfig, *, batch_size: int = 8, stop: StopFlag | None = None
) -> Choice | None:
    """Find the threshold with the highest mean Dice on the validation set; None if asked to stop, between two images.

    `model` must have one output, or overlapping classes. `config` says how to read images, and the size that the
    network works at.
    """
    histograms = Histograms(dataset.class_names)
    for _, probability, truth in predicted_probabilities(model, dataset, "val", config, batch_size=batch_size):
        if stop:
            return None
        histograms.add(probability, truth)
    curves = list(histograms.curves().values())
    chosen, dice = zip(*(each.best for each in curves), strict=True)
    half = [each.dice[THRESHOLDS.index(0.5)] for each in curves]
    return Choice(chosen if model.multilabel else chosen[0], float(np.mean(dice)), float(np.mean(half)))


def final_evaluation(
    config: Config, run: RunFolder, dataset: Dataset, progress: Progress, tracker: Tracker, stop: StopFlag
) -> str | None:
    """Pick a threshold on the validation set, score the best weights on the test set, and write the report.

    The threshold is stored with the weights; the scores are those at 0.5. Raises `DataError` if the data has
    changed since it was opened.

    Returns:
        The line with the test Dice, to be printed last; None if asked to stop, in which case the next start does it.
    """
    model, batch_size = load_model(run.path), config.train.batch_size
    about: dict[str, Any] = {"weights": str(run.best), "threshold": 0.5, "steps": config.train.steps}
    if config.train.patience:
        about["patience"] = config.train.patience
    if progress.stopped_early(config.train) and progress.step < config.train.steps:
        about["stopped_early"] = progress.step
    choice = None
    if model.outputs == 1 or model.multilabel:
        choice = choose_threshold(model, dataset, config.data, batch_size=batch_size, stop=stop)
        if choice is None:
            tracker.status = "stopped"
            return None
    split = "test" if dataset.of("test") else "val"
    result = evaluate_split(model, dataset, split, config.data, EvaluationOptions(batch_size=batch_size))
    if changed := dataset.changed():
        remedy = "Restore them and start the same command again; no scores were written"
        raise DataError(f"images or masks of {dataset.root} have changed since training was started. {remedy}", changed)
    if choice and store_threshold(run.best, choice.threshold):
        about["validation_threshold"] = choice.threshold
        tracker.say(
            f"best threshold on the validation set: {thresholds_text(choice.threshold, dataset.class_names)} "
            f"(Dice {choice.dice:.3f}, "
            f"{choice.dice_at_half:.3f} at 0.5); use it with --threshold validation"
        )
    require_inside(run.path, run.evaluation / split)
    write_evaluation(result, run.evaluation / split, about)
    report = write_report(run.path)
    tracker.scores(progress.step, split, _numbers(result), _table(result), _pictures(result))
    print(result.text())
    if len(dataset.class_names) == 1:
        print(f"for comparison, the best global threshold scores {threshold_baseline(dataset, split):.3f}")
    print(f"report: {report}")
    return scores.dice_line(split, result.summary)


def _numbers(result: Evaluation) -> dict[str, float]:
    """Mean of every score over the classes, with the bounds of its interval."""
    numbers: dict[str, float] = {"images": result.summary.images, "patients": result.summary.patients}
    for name, each in result.summary.macro.items():
        numbers |= {name: each.mean, f"{name}_low": each.low, f"{name}_high": each.high}
    return numbers


def _table(result: Evaluation) -> ScoreTable:
    columns = [item.name for item in dataclasses.fields(result.rows[0])]
    return columns, [[getattr(row, name) for name in columns] for row in result.rows]


def _pictures(result: Evaluation) -> Iterator[Picture]:
    """Best, median and worst cases, at screen size, all padded to one size as W&B's viewer needs."""
    cases = []
    for kind, _, sample, dice in result.cases():
        image = read_image(sample.image, 1)
        height, width = image.shape[:2]
        scale = min(1.0, LONGEST_SIDE / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        masks = [resize_mask(mask, size) for mask in result.masks_of(sample)]
        cases.append((f"{kind}, dice {dice:.3f}  {sample.id}", [resize_image(image, size)[..., 0], *masks]))
    size = tuple(np.max([pixels[0].shape for _, pixels in cases], axis=0).tolist()) if cases else (0, 0)
    for name, pixels in cases:
        image, truth, prediction = (Box(0, 0, *each.shape[:2]).place(each, size, 0) for each in pixels)
        yield Picture(name, image, prediction, truth)
