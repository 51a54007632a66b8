"""Scores of all networks over images and seeds, and their paired differences: the content of compare.json.

A score of a network on an image is the mean over its seeds. Intervals are drawn over whole patients, so they show how
another choice of patients would change the scores; how another seed would is stated next to them, as the scores of each
seed and their standard deviation.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pdrunet_jax.compare.plan import Plan
from pdrunet_jax.compare.speed import Speed
from pdrunet_jax.compare.trainings import runs_of, scores_of, training_folder
from pdrunet_jax.evaluate import scores
from pdrunet_jax.evaluate.compare import difference
from pdrunet_jax.evaluate.report.charts import Points, read_metrics
from pdrunet_jax.evaluate.scores import CSV_COLUMNS, RANGES, ImageScores
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import csv_text

METRICS = ("dice", "nsd", "hd95")
"""Metrics that are compared; compare.csv has all."""
MEAN = "mean of classes"
_DIGITS = 6  # of per_image.csv

Rows = Mapping[str, Mapping[int, Sequence[ImageScores]]]
"""Network to seed to the scores of every image and class."""
Values = Mapping[int, Mapping[str, float]]
"""Seed to image to one score of a network; NaN where it is undefined."""


def read_rows(folder: Path, plan: Plan, seeds: Iterable[int]) -> dict[str, dict[int, list[ImageScores]]]:
    """The scores of every training of the comparison in `folder`. Raises `UserError` if images or classes differ."""
    rows: dict[str, dict[int, list[ImageScores]]] = {}
    for model, seed in itertools.product(plan.models, seeds):
        path = scores_of(training_folder(folder, model, seed), plan) / "per_image.csv"
        rows.setdefault(model.network, {})[seed] = scores.read_csv(path)
    keys = [{(row.image, row.class_name) for row in each} for of_seed in rows.values() for each in of_seed.values()]
    if any(each != keys[0] for each in keys):
        raise UserError(f"the trainings in {folder} were not scored on the same images; score them again (evaluate)")
    return rows


def compute(rows: Rows, plan: Plan, speeds: Mapping[str, Speed], about: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of every network and differences of every pair, as JSON values with None for NaN.

    `about` states what else to record; it must have "unit" and "tolerance" of the scores.
    """
    first = next(iter(next(iter(rows.values())).values()))
    patient_of = {row.image: row.patient for row in first}
    names = list(dict.fromkeys(row.class_name for row in first))
    groups = names if len(names) == 1 else [*names, MEAN]
    values = {
        network: {group: {metric: _values(of_seed, metric, group) for metric in METRICS} for group in groups}
        for network, of_seed in rows.items()
    }
    models = []
    for model in plan.models:
        speed = speeds[model.network]
        statistics = {
            group: {metric: _statistics(metric, each, patient_of) for metric, each in metrics.items()}
            for group, metrics in values[model.network].items()
        }
        facts = {"network": model.network, "folder": model.folder, "steps": model.steps, **asdict(speed)}
        models.append({**facts, "training_seconds": speed.step_seconds * model.steps, "scores": statistics})
    differences = [
        {"network": here, "against": there, "class": groups[-1], "metric": metric}
        | _difference(metric, values[here][groups[-1]][metric], values[there][groups[-1]][metric], patient_of)
        for there, here in itertools.combinations(values, 2)
        for metric in METRICS
    ]
    facts = {
        "images": len(patient_of),
        "patients": len(set(patient_of.values())),
        "classes": names,
        "overall": groups[-1],
    }
    result: dict[str, Any] = scores.without_nan({**about, **facts, "models": models, "differences": differences})
    return result


def mean_by_image(of_seed: Mapping[int, Sequence[ImageScores]], metric: str = "dice") -> dict[str, float]:
    """Score of each image, mean over classes and then over seeds; NaN where no seed defines it."""
    return _over_seeds(_values(of_seed, metric, MEAN))


def to_csv(rows: Rows) -> str:
    """Text of compare.csv: network and seed, then the columns of per_image.csv."""
    lines: list[Sequence[Any]] = [("network", "seed", *CSV_COLUMNS)]
    for network, of_seed in rows.items():
        for seed, each in of_seed.items():
            for row in each:
                cells = (f"{cell:.{_DIGITS}f}" if isinstance(cell, float) else cell for cell in vars(row).values())
                lines.append((network, seed, *cells))
    return csv_text(lines)


def learning_curves(folder: Path, plan: Plan, seeds: Iterable[int]) -> dict[str, Points]:
    """Validation Dice of each network by step, mean over seeds and folds, where all of them have been validated."""
    curves = {}
    for model in plan.models:
        runs = [run for seed in seeds for run in runs_of(training_folder(folder, model, seed), plan)]
        points = [dict(read_metrics(run.metrics).get("val/dice", [])) for run in runs]
        common = sorted(set.intersection(*map(set, points)))
        curves[model.network] = [(step, float(np.mean([each[step] for each in points]))) for step in common]
    return curves


def _values(of_seed: Mapping[int, Sequence[ImageScores]], metric: str, group: str) -> dict[int, dict[str, float]]:
    """Scores of one class, or of `MEAN`, the mean over the classes that define them."""
    return {
        seed: scores.image_means([row for row in rows if group in (row.class_name, MEAN)], metric)
        for seed, rows in of_seed.items()
    }


def _over_seeds(values: Values) -> dict[str, float]:
    """Mean over the seeds that define the score of an image; NaN if none does."""
    means = {}
    for image in next(iter(values.values())):
        defined = [each[image] for each in values.values() if not math.isnan(each[image])]
        means[image] = sum(defined) / len(defined) if defined else math.nan
    return means


def _statistics(metric: str, values: Values, patient_of: Mapping[str, str]) -> dict[str, Any]:
    means = {image: value for image, value in _over_seeds(values).items() if not math.isnan(value)}
    patients = [patient_of[image] for image in means]
    statistic = scores.statistic(list(means.values()), patients, bounds=RANGES.get(metric, (0.0, 1.0)))
    return asdict(statistic) | _by_seed({seed: list(each.values()) for seed, each in values.items()})


def _difference(metric: str, here: Values, there: Values, patient_of: Mapping[str, str]) -> dict[str, Any]:
    """Paired differences of one metric, `here` minus `there`, on the images where both are defined."""
    of_here, of_there = _over_seeds(here), _over_seeds(there)
    pairs = {
        image: (of_here[image], of_there[image])
        for image in of_here
        if not math.isnan(of_here[image] + of_there[image])
    }
    seeds = {seed: [here[seed][image] - there[seed][image] for image in here[seed]] for seed in here}
    return asdict(difference(metric, pairs, patient_of)) | _by_seed(seeds)


def _by_seed(values: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """Mean of each seed over the images that define it, and the standard deviation of these means."""
    defined = {seed: [value for value in each if not math.isnan(value)] for seed, each in values.items()}
    means = [sum(each) / len(each) if each else math.nan for each in defined.values()]
    return {"by_seed": means, "seed_sd": float(np.std(means, ddof=1)) if len(means) > 1 else math.nan}
