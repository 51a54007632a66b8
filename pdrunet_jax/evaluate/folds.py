"""Out-of-fold scores: every image is scored by the one fold that was not trained on it.

The images of all folds together are as large a test set as the dataset allows. `fold_1`, `fold_2`, ... lie in one
folder, which receives the scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.folds import of_all
from pdrunet_jax.evaluate import scores
from pdrunet_jax.evaluate.evaluation import Evaluation, EvaluationOptions, Scored, evaluate_parts
from pdrunet_jax.evaluate.training_images import seen_in_training
from pdrunet_jax.model.base import Network
from pdrunet_jax.predict.engines.engine import Engine
from pdrunet_jax.runtime.errors import DataError
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.runtime.stop import StopFlag

OUT_OF_FOLD = "out-of-fold"
"""Split of the images that take part in folds."""


def out_of_fold(dataset: Dataset) -> Dataset:
    """The dataset, opened with `data.fold`, with all images that take part in folds in one split."""
    samples = tuple(replace(each, split=OUT_OF_FOLD if each.fold else each.split) for each in dataset.samples)
    return replace(dataset, samples=samples, notes=of_all(dataset.notes))


def evaluate_out_of_fold(
    runs: Sequence[RunFolder],
    members: Sequence[tuple[Network | Engine, float | tuple[float, ...]]],
    dataset: Dataset,
    config: DataConfig,
    options: EvaluationOptions | None = None,
    *,
    group: Group | None = None,
    stop: StopFlag | None = None,
) -> Evaluation | None:
    """Score each image of `dataset` with the fold that tests on it; None if asked to stop, between two folds.

    Args:
        runs: the runs of all folds, in order (`find_folds`).
        members: their networks and thresholds.
        dataset: from `out_of_fold`, with its classes in the networks' order.
        config: how to read images, and the size that the networks work at.
        options: rules of scoring.
        group: processes that share the work.
        stop: set to stop.

    Raises:
        UserError: a fold was trained on images that it should test, or its list of training images is missing; or as
            `evaluate_split`.
    """
    require_out_of_fold(runs, dataset)

    def parts() -> Iterator[Scored]:
        for number, (model, threshold) in enumerate(members, 1):
            if stop:
                return
            yield Scored(model, of_fold(dataset, number), threshold)

    evaluation = evaluate_parts(dataset, OUT_OF_FOLD, parts(), config, options, group=group)
    return None if stop else evaluation


def of_fold(dataset: Dataset, number: int) -> Dataset:
    """The part of `dataset` that a fold tests on."""
    return replace(dataset, samples=tuple(sample for sample in dataset.samples if sample.fold == number))


def require_out_of_fold(runs: Sequence[RunFolder], dataset: Dataset) -> None:
    """Raise `UserError` that names each fold that was trained on images that it should test."""
    problems = []
    for number, run in enumerate(runs, 1):
        samples = of_fold(dataset, number).samples
        seen = seen_in_training(run.path, samples)
        if seen is None:
            problems.append(f"{run.training_images} is missing, which shows what the fold was trained on")
        elif seen:
            problems.append(f"{run.path} was trained on {len(seen)} of the {len(samples)} images that it should test")
    if problems:
        remedy = "images, patients or masks have changed since; restore them, or train the folds again elsewhere"
        raise DataError(f"{dataset.root} is not the data of these folds ({remedy})", problems)


def fold_table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """For each fold: its number, images, patients, and mean Dice with the 95 % interval; JSON values."""
    fold_of = {sample.id: sample.fold for sample in evaluation.dataset.samples}
    table = []
    for number in sorted(set(fold_of.values()) - {0}):
        rows = [row for row in evaluation.rows if fold_of[row.image] == number]
        summary = scores.summarise(rows, evaluation.summary.rules)
        dice = summary.macro["dice"]
        entry = {"fold": number, "images": summary.images, "patients": summary.patients}
        table.append(scores.without_nan({**entry, "dice": dice.mean, "low": dice.low, "high": dice.high}))
    return table
