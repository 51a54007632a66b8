"""`python -m pdrunet_jax.evaluate`: score a model on a dataset, per image and in summary, and compare two models.

Scores are computed at each input's own resolution, without ignored pixels (see `pdrunet_jax.evaluate.evaluation`).
--against compares with another evaluation of the same images (see `pdrunet_jax.evaluate.compare`).
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from pdrunet_jax import config as configuration
from pdrunet_jax.config import Config, DataConfig
from pdrunet_jax.data.dataset import Dataset, open_dataset, require_same_data
from pdrunet_jax.evaluate import compare, scores
from pdrunet_jax.evaluate.evaluation import (
    Evaluation,
    EvaluationOptions,
    evaluate_split,
    read_spacings,
    write_evaluation,
)
from pdrunet_jax.evaluate.report.page import write_evaluation_report
from pdrunet_jax.evaluate.scores import ScoringOptions
from pdrunet_jax.model.load import Loaded, build_loaded, find_run, load_weights
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.predict.threshold import Threshold, resolve_threshold
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.digest import content_digest
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.processes import DetectCluster, Distributed, Group, join
from pdrunet_jax.runtime.run_folder import environment


@dataclass(frozen=True)
class EvaluateOptions:
    """Score a model on a dataset. Prints a table; writes report.html, per_image.csv, summary.json and more."""

    weights: str
    """Run folder, checkpoint, .safetensors or public .pth."""
    data: DataConfig = field(default_factory=DataConfig)
    """Dataset. Defaults come from the run folder's config.toml."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Split to score; all takes every image, for a dataset unseen in training."""
    output: Path | None = None
    """Output folder. Default: evaluation/SPLIT in the run folder if --data.root is the run's own, else evaluation."""
    threshold: Threshold = 0.5
    """Probability above which a pixel is foreground, or validation for the best one on the validation set. Models with
    one output only."""
    against: str | None = None
    """Compare on the same images with this evaluation folder, or with these weights (evaluated too, at the size they
    were trained at). Prints a table; writes comparison.json and comparison.csv."""
    scoring: Annotated[EvaluationOptions, tyro.conf.arg(name="")] = field(default_factory=EvaluationOptions)
    detect: DetectCluster = False
    """Evaluate in several processes started by SLURM, Kubernetes or Cloud TPU; the first one writes."""
    distributed: Distributed = field(default_factory=Distributed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises `UserError` for invalid options or data, `RunError` if the results cannot be written."""
    options, loaded = _parse(list(sys.argv[1:] if arguments is None else arguments))
    scoring = options.scoring
    if scoring.batch_size < 1:
        raise UserError(f"--batch-size {scoring.batch_size}: must be at least 1")
    if not (math.isfinite(scoring.tolerance) and scoring.tolerance >= 0):
        raise UserError(f"--tolerance {scoring.tolerance}: must be a distance of 0 or more")
    if not (math.isnan(scoring.empty_dice) or 0 <= scoring.empty_dice <= 1):
        raise UserError(f"--empty-dice {scoring.empty_dice}: must be between 0 and 1, or nan")
    with join(options.distributed, options.detect) as group:
        _run(options, loaded or load_weights(options.weights), group)


def _parse(arguments: list[str]) -> tuple[EvaluateOptions, Loaded | None]:
    """The options, with data settings checked and defaults from the weights; and the weights, if read for that."""
    weights = cli.first_value(arguments, "--weights")
    run = find_run(weights) if weights else None
    loaded = load_weights(weights) if weights and not run else None
    defaults = DataConfig()
    if run:
        defaults = configuration.read(run.config_file).data
    elif loaded and loaded.size:
        defaults = DataConfig(size=loaded.size)
    default = EvaluateOptions(weights=weights or tyro.MISSING, data=defaults)
    options = tyro.cli(EvaluateOptions, args=arguments, default=default, prog=cli.program("evaluate"))
    data = configuration.check(Config(data=options.data), "the command line").data
    own = run.path / "evaluation" / options.split if run and data.root == defaults.root else Path("evaluation")
    return replace(options, data=data, output=options.output or own), loaded


@dataclass(frozen=True)
class _Candidate:
    """A model to evaluate."""

    weights: str
    loaded: Loaded
    threshold: float


def _run(options: EvaluateOptions, loaded: Loaded, group: Group) -> None:
    """Evaluate; in the main process, print and write the results."""
    # Check everything before computing anything.
    threshold = resolve_threshold(options.threshold, loaded.options, options.weights)
    candidate = _Candidate(options.weights, loaded, threshold)
    dataset = open_dataset(options.data)
    require_same_data(group, dataset)
    other, rival = _opponent(options, dataset)
    for each in (candidate, rival):
        _check_order(each, dataset)
    for note in dataset.notes:
        group.log(note)

    # Score the model, and the one to compare with unless its scores are known.
    began = time.monotonic()
    evaluation = _evaluate(candidate, dataset, options.data, options, group)
    seconds = time.monotonic() - began
    if rival:
        resized = replace(options.data, size=rival.loaded.size or options.data.size)
        other = compare.Other(rival.weights, _evaluate(rival, dataset, resized, options, group).rows)
    if not group.is_main:
        return

    about = {
        "weights": options.weights,
        "data": options.data.root,
        "size": list(options.data.height_width),
        "threshold": threshold,
        "threshold_from": "validation" if options.threshold == "validation" else "option",
        "cleaning": asdict(options.scoring.cleaning),
        "seconds": round(seconds, 3),
    }
    folder = options.output or Path("evaluation")
    write_evaluation(evaluation, folder, about, environment(jax.devices()[0].device_kind))
    print(evaluation.text())
    if other:
        comparison = compare.compare(evaluation.rows, other, evaluation.summary.rules)
        compare.write_comparison(comparison, evaluation.rows, other, folder)
        print(compare.comparison_text(comparison))
    print(f"results: {folder}, report: {write_evaluation_report(folder)}")
    print(scores.dice_line(options.split, evaluation.summary))


def _opponent(options: EvaluateOptions, dataset: Dataset) -> tuple[compare.Other | None, _Candidate | None]:
    """What --against names: a finished evaluation, checked to be comparable, or a model to evaluate."""
    against, samples = options.against, dataset.of(options.split)
    if against is None:
        return None, None
    if not Path(against).exists():
        raise UserError(f"--against {against}: there is no such file or folder")
    if other := compare.read_other(Path(against)):
        unit = read_spacings(dataset, samples)[1]
        if samples:
            compare.check_rules(ScoringOptions(unit, options.scoring.tolerance, options.scoring.empty_dice), other)
            compare.check_pairs(((sample.id, name) for sample in samples for name in dataset.class_names), other)
        return other, None
    loaded = load_weights(against)
    return None, _Candidate(against, loaded, resolve_threshold(options.threshold, loaded.options, against))


def _check_order(candidate: _Candidate | None, dataset: Dataset) -> None:
    """Refuse a model with the dataset's classes in another order: one class would be scored as another."""
    names = candidate.loaded.options.get("class_names") if candidate else None
    if names and tuple(names) != dataset.class_names and sorted(names) == sorted(dataset.class_names):
        raise UserError(
            f"the class order differs: the model has {', '.join(names)}, {dataset.root} has "
            f"{', '.join(dataset.class_names)}; declare the classes in the model's order with --data.classes"
        )


def _evaluate(
    candidate: _Candidate, dataset: Dataset, config: DataConfig, options: EvaluateOptions, group: Group
) -> Evaluation:
    loaded, threshold = candidate.loaded, candidate.threshold
    weights = content_digest(
        to_public(loaded.params, loaded.stats, dead_block=False), {"shortcut": loaded.options["shortcut"]}
    )
    rules = threshold, config.height_width, options.split, options.scoring
    group.require_same(f"{weights} {rules}", "start all processes with the same weights and options")
    model = build_loaded(loaded)
    return evaluate_split(model, dataset, options.split, config, options.scoring, threshold=threshold, group=group)


if __name__ == "__main__":
    cli.run(main)
