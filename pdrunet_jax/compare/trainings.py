"""The trainings of a comparison: what is to be trained, what is finished, and that all saw the same data."""

import gc
import json
import os
from dataclasses import replace
from pathlib import Path

from pdrunet_jax.compare.options import CompareOptions
from pdrunet_jax.compare.plan import Plan, PlannedModel, for_steps
from pdrunet_jax.config import Config, TrainConfig, diff, read
from pdrunet_jax.evaluate.scores import ScoringOptions
from pdrunet_jax.model.folds import MAY_DIFFER, fold_folder
from pdrunet_jax.runtime.errors import DataError, RunError
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.folds import SETTLED, data_of, is_finished, train_folds
from pdrunet_jax.train.options import TrainOptions
from pdrunet_jax.train.progress import DivergedError
from pdrunet_jax.train.run import run


def training_folder(folder: Path, model: PlannedModel, seed: int) -> Path:
    """The run folder, or the folder of folds, of one training of the comparison in `folder`."""
    return folder / model.folder / f"seed_{seed}"


def settings_of(settings: Config, model: PlannedModel, seed: int) -> Config:
    """The settings of one training; `settings` are those that all have in common."""
    return replace(for_steps(settings, model.steps), model=model.model, seed=seed)


def scores_of(path: Path, plan: Plan) -> Path:
    """The folder with the scores of the training in `path`."""
    return path if plan.folds else RunFolder(path).evaluation / "test"


def train_seed(options: CompareOptions, plan: Plan, seed: int, stop: StopFlag) -> int:
    """Train all networks of `plan` with `seed`, as far as they are not finished. Returns the exit code.

    Raises `DataError` for a training with other settings or data in its place, and as `train` does.
    """
    for number, model in enumerate(plan.models, 1):
        path = training_folder(options.folder, model, seed)
        config = settings_of(options.settings, model, seed)
        name = config.tracking.name or os.environ.get("WANDB_NAME") or options.folder.absolute().name
        tracking = replace(config.tracking, name=f"{name} {model.network} seed {seed}")
        what = f"seed {seed}, network {number} of {len(plan.models)}, {model.network}"
        if _is_done(path, plan, config.train):
            print(f"{what}: finished, {path}", flush=True)
        else:
            print(f"{what}: {path}", flush=True)
            each = TrainOptions(
                options.config, path, folds=plan.folds or None, settings=replace(config, tracking=tracking)
            )
            try:
                code = (train_folds if plan.folds else run)(each, Group(), stop)
            except DivergedError as error:
                raise RunError(f"{what}: {error} To compare the other networks, leave it out of --models.") from None
            gc.collect()  # the programs of one training are of no use to the next
            if code:
                return code
        _require_planned(path, plan, config)
    return 0


def _is_done(path: Path, plan: Plan, settings: TrainConfig) -> bool:
    """Whether a training is finished and scored by the rules of training; `evaluate` may have scored it by others."""
    runs, summary = runs_of(path, plan), scores_of(path, plan) / "summary.json"
    if not all(is_finished(each, settings) for each in runs):
        return False
    try:
        values = json.loads(read_text(summary))
        usual = ScoringOptions(unit=values["unit"])
        rules = values["tolerance"], values["empty_dice"], values["about"]["threshold"]
        cleaned = any(values["about"].get("cleaning", {}).values())
        parts = [*(each.report for each in runs), summary, RunFolder(path).report] if plan.folds else []
        written = [each.stat().st_mtime_ns for each in parts]  # each folder of folds after all of its folds
        in_order = not written or max(written[:-2]) <= written[-2] <= written[-1]
        return in_order and not cleaned and rules == (usual.tolerance, usual.empty_dice, 0.5)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _require_planned(path: Path, plan: Plan, config: Config) -> None:
    """Raise `DataError` that names the runs in `path` that were not trained with `config` on the data of `plan`."""
    problems = []
    for each in runs_of(path, plan):
        lines = diff(read(each.config_file), config, ignore=(*MAY_DIFFER, *SETTLED))
        lines += ["it was trained on other data"] if data_of(each) not in ("", plan.data) else []
        problems += [f"{each.path}: {line}" for line in lines]
    if problems:
        raise DataError("trainings do not belong to this comparison; move them away to train them again", problems)


def runs_of(path: Path, plan: Plan) -> list[RunFolder]:
    """The runs of one training: one, or one for each fold."""
    return [fold_folder(path, number) for number in range(1, plan.folds + 1)] or [RunFolder(path)]
