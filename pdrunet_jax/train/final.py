"""What no model should score below: the best that a single grey value can do.

best.safetensors: the weights of a run that scored best on its validation images, with what is needed to use them.

What follows the last step of training: a threshold from the validation images, test scores, the report.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.config import Config, DataConfig
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.images import read_image, resize_image
from pdrunet_jax.data.masks import IGNORE, read_mask
from pdrunet_jax.evaluate import scores
from pdrunet_jax.evaluate.calibration import THRESHOLDS, Curves, Histograms
from pdrunet_jax.evaluate.evaluation import Evaluation, evaluate_split, write_evaluation
from pdrunet_jax.evaluate.report.page import write_report
from pdrunet_jax.model.files import write_safetensors
from pdrunet_jax.model.load import load_model
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.predict.threshold import store_threshold
from pdrunet_jax.runtime.digest import CONTENT, content_digest
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.progress import Progress
from pdrunet_jax.train.step import TrainState
from pdrunet_jax.train.tracking import Tracker
from pdrunet_jax.train.wandb_run import Picture, ScoreTable


def threshold_baseline(dataset: Dataset, split: str) -> float:
    """Mean Dice of the best global threshold on one split of a dataset with one class, ignored pixels left out."""
    images, masks = [], []
    for sample in dataset.of(split):
        if sample.mask is not None:
            mask = read_mask(sample.mask, dataset.coding)
            valid = mask != IGNORE
            images.append(read_image(sample.image)[..., 0].round().astype(np.uint8)[valid])
            masks.append(mask[valid])
    return threshold_dice(images, masks)


def threshold_dice(images: Sequence[NDArray[np.uint8]], masks: Sequence[NDArray[np.uint8]]) -> float:
    """Mean Dice per image of the best single grey threshold of all, taking its bright or its dark side.

    Chosen and scored on the same images, so it flatters the threshold.

    Args:
        images: any number of grey images, uint8, each of any shape.
        masks: of the same shapes; what is not 0 is foreground.
    """
    return float(np.mean([_scores(image, mask) for image, mask in zip(images, masks, strict=True)], axis=0).max())


def _scores(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Dice of every threshold: the pixels of at least 0..255, then those of at most 0..255."""
    foreground = np.bincount(image[mask > 0].ravel(), minlength=256).astype(np.float64)
    everything = np.bincount(image.ravel(), minlength=256).astype(np.float64)
    hits = np.concatenate([foreground[::-1].cumsum()[::-1], foreground.cumsum()])
    predicted = np.concatenate([everything[::-1].cumsum()[::-1], everything.cumsum()])
    total = predicted + foreground.sum()
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)


def save_best(
    run: RunFolder, config: Config, dataset: Dataset, outputs: int, state: TrainState, progress: Progress
) -> None:
    """Write it, under the public names, as the weights of `progress.best_step`. Raises `RunError`."""
    arrays = to_public(state.ema or state.params, state.stats)
    options = {
        "in_channels": config.model.in_channels,
        "outputs": outputs,
        "filters": config.model.filters,
        "shortcut": config.model.shortcut,
        "norm": config.model.norm,
        "dropout": config.model.dropout,
        "size": list(config.data.height_width),
        "class_names": list(dataset.class_names),
        "step": progress.best_step,
        "val_dice": progress.best_dice,
    }
    write_safetensors(run.best, arrays, {**options, CONTENT: content_digest(arrays, options)})


class Choice(NamedTuple):
    """The best threshold of the validation images."""

    threshold: float
    """One of `pdrunet_jax.calibration.THRESHOLDS`; of several that are best the one nearest 0.5."""
    dice: float
    """Mean Dice of the validation images at it, at their own resolution."""
    dice_at_half: float
    """The same at 0.5."""

    @classmethod
    def of(cls, curves: Curves) -> "Choice":
        """From the threshold curve of at least one image."""
        return cls(*curves.best, curves.dice[THRESHOLDS.index(0.5)])


def choose_threshold(
    model: PDRUNet, dataset: Dataset, config: DataConfig, *, batch_size: int = 8, stop: StopFlag | None = None
) -> Choice | None:
    """The threshold with the highest mean Dice of the validation images; None if it was `stop`ped.

    Args:
        model: Of one output.
        dataset: From `open_dataset`, with validation images.
        config: How images are read and the size that the network works at.
        batch_size: Images in each batch.
        stop: Becomes true when the program is asked to stop.
    """
    from pdrunet_jax.evaluate.evaluation import predicted_probabilities

    histograms = Histograms(dataset.class_names)
    for _, probability, truth in predicted_probabilities(model, dataset, "val", config, batch_size=batch_size):
        if stop:
            return None
        histograms.add(probability, truth)
    return Choice.of(*histograms.curves().values())


LONGEST_SIDE = 512
"""Pixels of a picture for W&B, which uploads them all."""


def final_evaluation(config: Config, run: RunFolder, dataset: Dataset, tracker: Tracker, stop: StopFlag) -> None:
    """Score the best weights on the test images, write the report, close the tracker, and print the scores last.

    The threshold that the validation images choose is kept with the weights; the scores are those at 0.5. When asked
    to stop, the rest is left to the next start.
    """
    try:
        result = _score(config, run, dataset, tracker, stop)
        tracker.finish("stopped" if result is None else "finished")
    except BaseException as error:
        tracker.finish("failed", str(error))
        raise
    if result is not None:
        print(result.line)


def _score(config: Config, run: RunFolder, dataset: Dataset, tracker: Tracker, stop: StopFlag) -> Evaluation | None:
    model, batch_size = load_model(run.path), config.train.batch_size
    about: dict[str, Any] = {"weights": str(run.best), "threshold": 0.5}
    if model.outputs == 1:
        choice = choose_threshold(model, dataset, config.data, batch_size=batch_size, stop=stop)
        if choice is None:
            return None
        if store_threshold(run.best, choice.threshold):
            about["validation_threshold"] = choice.threshold
            tracker.say(
                f"the validation images choose the threshold {choice.threshold:g}: dice {choice.dice:.3f}, "
                f"{choice.dice_at_half:.3f} at 0.5; --threshold validation takes it"
            )
    split = "test" if dataset.of("test") else "val"
    result = evaluate_split(model, dataset, split, config.data, batch_size=batch_size)
    write_evaluation(result, run.path / "evaluation" / split, about)
    report = write_report(run.path)
    tracker.scores(split, _numbers(result), _table(result), _pictures(result))
    print(scores.text_table(result.summary))
    print(*result.remarks(), sep="\n")
    if len(dataset.class_names) == 1:
        print(f"the best global threshold scores {threshold_baseline(dataset, split):.3f} on the same images")
    print(f"report: {report}")
    return result


def _numbers(result: Evaluation) -> dict[str, float]:
    """The mean of every score and the bounds of its interval, over the classes."""
    numbers: dict[str, float] = {"images": result.summary.images, "patients": result.summary.patients}
    for name, each in result.summary.macro.items():
        numbers |= {name: each.mean, f"{name}_low": each.low, f"{name}_high": each.high}
    return numbers


def _table(result: Evaluation) -> ScoreTable:
    columns = [item.name for item in dataclasses.fields(result.rows[0])]
    return columns, [[getattr(row, name) for name in columns] for row in result.rows]


def _pictures(result: Evaluation) -> Iterator[Picture]:
    """The best, median and worst cases, no larger than a screen shows, of one size, which W&B's viewer asks for."""
    cases = []
    for kind, _, sample, dice in result.cases():
        image = read_image(sample.image, 1)
        height, width = image.shape[:2]
        scale = min(1.0, LONGEST_SIDE / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        # The nearest pixel: indices of classes have no mean.
        down, across = (
            ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, (height, width), strict=True)
        )
        masks = [mask[np.ix_(down, across)] for mask in result.masks_of(sample)]
        cases.append((f"{kind}, dice {dice:.3f}  {sample.id}", [resize_image(image, size)[..., 0], *masks]))
    high, wide = np.max([pixels[0].shape for _, pixels in cases], axis=0) if cases else (0, 0)
    for name, pixels in cases:
        image, truth, prediction = (
            np.pad(each, ((0, high - each.shape[0]), (0, wide - each.shape[1]))) for each in pixels
        )
        yield Picture(name, image, prediction, truth)
