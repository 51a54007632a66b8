"""What follows the last step of training: a threshold from the validation images, test scores, the report."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from pdrunet_jax import scores
from pdrunet_jax.baseline import threshold_baseline
from pdrunet_jax.config import Config
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.images import read_image, resize_image
from pdrunet_jax.evaluation import Evaluation, evaluate_split, write_evaluation
from pdrunet_jax.loading import load_model
from pdrunet_jax.report import write_report
from pdrunet_jax.runfolder import RunFolder
from pdrunet_jax.stopping import StopFlag
from pdrunet_jax.thresholds import choose_threshold, store_threshold
from pdrunet_jax.tracking import Picture, Tracker
from pdrunet_jax.wandb_run import ScoreTable

LONGEST_SIDE = 512
"""Pixels of a picture for W&B, which uploads them all."""


def finish(config: Config, run: RunFolder, dataset: Dataset, tracker: Tracker, stop: StopFlag) -> None:
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
    print(scores.table(result.summary))
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
