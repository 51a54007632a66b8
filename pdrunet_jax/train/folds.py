"""Cross-validation: train every fold as a run of its own, then score each image with the fold that tests on it."""

import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pdrunet_jax.config import OF_THE_END, Config, TrainConfig
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.evaluate import scores
from pdrunet_jax.evaluate.evaluation import EvaluationOptions, write_evaluation
from pdrunet_jax.evaluate.folds import evaluate_out_of_fold, fold_table, out_of_fold
from pdrunet_jax.evaluate.report.page import write_evaluation_report
from pdrunet_jax.evaluate.training_images import seen_in_training
from pdrunet_jax.model.folds import find_folds, fold_folder, require_alike, started_folds
from pdrunet_jax.model.load import build_loaded, load_any
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.checkpoint import checkpoint_steps, choose_intact, read_meta
from pdrunet_jax.runtime.devices import describe_device
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder, environment
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.options import TrainOptions
from pdrunet_jax.train.run import run, settle_flips

SETTLED = ("augment.flip_horizontal", "augment.flip_vertical", "data.swap_on_flip")
"""Settings that depend on the data too (`settle_flips`)."""


def train_folds(arguments: TrainOptions, group: Group, stop: StopFlag) -> int:
    """Train the folds that `arguments` name, one after the other; once all are there, score them.

    Finished folds are not repeated. Raises `UserError` if the folder holds a run of its own, or folds of other data or
    settings.

    Returns:
        The exit code.
    """
    numbers, count = arguments.fold_numbers
    parent, settings = arguments.run_folder, arguments.settings.train
    if RunFolder(parent).config_file.exists():
        raise UserError(f"{parent} holds a run of its own; choose another --workdir for folds")
    if group.is_main:
        require_alike(started_folds(parent), arguments.settings, count, (*OF_THE_END, *SETTLED))
    for number in numbers:
        fold = fold_folder(parent, number)
        if group.broadcast("finished" if group.is_main and is_finished(fold, settings) else ""):
            group.log(f"fold {number} of {count} is finished: {fold.path}")
            continue
        group.log(f"fold {number} of {count}: {fold.path}")
        each = _options_of(arguments, number, count)
        if code := run(each, group, stop, partial(require_one_training, parent)):
            return code
    if not group.is_main:
        return 0
    if missing := [str(each) for each in range(1, count + 1) if not is_finished(fold_folder(parent, each), settings)]:
        print(f"{parent}: no scores of all images yet; of {count} folds, to train: {', '.join(missing)}", flush=True)
        return 0
    return 0 if _score(parent, arguments.settings, count, stop) else cli.STOPPED


def is_finished(fold: RunFolder, settings: TrainConfig) -> bool:
    """Whether `fold` was trained to its end, scored and reported on."""
    summary = fold.evaluation / "test" / "summary.json"
    try:
        about = json.loads(read_text(summary))["about"]
        ended = (about.get("steps"), about.get("patience", 0)) == (settings.steps, settings.patience)
        return bool(ended and fold.report.stat().st_mtime_ns >= summary.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def require_one_training(parent: Path, config: Config, dataset: Dataset, ignore: tuple[str, ...] = OF_THE_END) -> None:
    """Raise `DataError` that names the folds in `parent` that were trained with other settings or data.

    Settings to `ignore` may differ: while training goes on, some folds may have been prolonged.
    """
    runs = started_folds(parent)
    _, count = config.data.fold_of or (1, 1)
    require_alike(runs, config, count, ignore)
    data = dataset.fingerprint()
    problems = [f"{run.path} was trained on other data" for run in runs.values() if data_of(run) not in ("", data)]
    if problems:
        remedy = "restore the images, masks and patients, or choose another --workdir for new folds"
        raise DataError(f"{dataset.root} has changed since folds were trained on it; {remedy}", problems)
    weights = config.train.weights
    if weights and (seen := seen_in_training(weights, [each for each in dataset.samples if each.fold])):
        raise UserError(
            f"--train.weights {weights} was trained on {len(seen)} images of {dataset.root}, each of which is a test "
            "image of some fold; leave it out, or take weights of other data"
        )


def data_of(fold: RunFolder) -> str:
    """Fingerprint of the data that `fold` was trained on; empty if it has no checkpoint."""
    if not checkpoint_steps(fold.checkpoints):
        return ""
    return str(read_meta(choose_intact(fold.path, "latest"))["extra"].get("data", ""))


def _options_of(arguments: TrainOptions, number: int, count: int) -> TrainOptions:
    """The options of the run of one fold."""
    settings, folder = arguments.settings, arguments.run_folder
    name = settings.tracking.name or os.environ.get("WANDB_NAME") or folder.absolute().name
    settings = replace(
        settings,
        data=replace(settings.data, fold=f"{number}/{count}"),
        tracking=replace(settings.tracking, name=f"{name} fold {number}"),
    )
    return replace(arguments, settings=settings, workdir=fold_folder(folder, number).path)


def _score(parent: Path, config: Config, count: int, stop: StopFlag) -> bool:
    """Print and write the scores of all images in the folder of folds; False if asked to stop."""
    config = replace(config, data=replace(config.data, fold=f"1/{count}"))
    began, dataset = time.monotonic(), open_dataset(config.data)
    require_one_training(parent, settle_flips(config, dataset), dataset, ignore=())
    loaded = load_any(parent)
    members = [(member, 0.5) for member in build_loaded(loaded).members]
    options = EvaluationOptions(batch_size=config.train.batch_size)
    evaluation = evaluate_out_of_fold(
        find_folds(parent), members, out_of_fold(dataset), config.data, options, stop=stop
    )
    if evaluation is None:
        return False
    about: dict[str, Any] = {
        "weights": str(parent),
        "data": config.data.root,
        "size": list(config.data.height_width),
        "fit": config.data.fit,
        "spacing": config.data.spacing,
        "threshold": 0.5,
        "seconds": round(time.monotonic() - began, 3),
        "folds": fold_table(evaluation),
    }
    device = describe_device(config.train.precision, config.train.deterministic)
    write_evaluation(evaluation, parent, about, environment(device))
    print(evaluation.text())
    print(f"report of all folds: {write_evaluation_report(parent)}")
    print(scores.dice_line(evaluation.split, evaluation.summary), flush=True)
    return True
