"""python -m pdrunet_jax.evaluate: scores of a model on a dataset, per image and summed up with intervals.

With --against, the differences to another evaluation of the same images, tested (see `pdrunet_jax.compare`). Scores are
computed at each input's own resolution, ignored pixels left out (see `pdrunet_jax.evaluation`).
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from flax import nnx

from pdrunet_jax import config as config_io
from pdrunet_jax.config import Config, DataConfig
from pdrunet_jax.data.dataset import Dataset, open_dataset, require_same_data
from pdrunet_jax.evaluate import compare, scores
from pdrunet_jax.evaluate.compare import comparison_table, remove_comparison, write_comparison
from pdrunet_jax.evaluate.evaluation import Evaluation, evaluate_split, spacings_of, unit_of, write_evaluation
from pdrunet_jax.evaluate.report.page import write_evaluation_report
from pdrunet_jax.evaluate.scores import ScoringOptions
from pdrunet_jax.model.load import load_model, load_options
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.predict.postprocess import Cleaning
from pdrunet_jax.predict.threshold import Threshold, resolve_threshold
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.digest import content_digest
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.processes import DetectCluster, Distributed, Group, join
from pdrunet_jax.runtime.run_folder import RunFolder, environment


@dataclass(frozen=True)
class EvaluateOptions:
    """Score a model on a dataset: a table here, report.html, per_image.csv, summary.json and more in a folder."""

    weights: str
    """Run folder, checkpoint, .safetensors or public .pth."""
    data: DataConfig = field(default_factory=DataConfig)
    """The dataset; what is left out is as the run folder's config.toml has it."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Part of the dataset; all takes every image, for a dataset the model has never seen."""
    output: Path | None = None
    """Folder for the results; evaluation/SPLIT in the run folder for the run's own data, else evaluation here."""
    batch_size: int = 8
    """Images in each batch."""
    threshold: Threshold = 0.5
    """Probability above which a pixel is foreground, or validation: the one that scored best on the validation images
    of the training. For one output only."""
    tolerance: float = ScoringOptions.tolerance
    """Distance up to which nsd counts a boundary as right: in mm if the pixel spacing of every image is known (DICOM,
    or spacing in dataset.toml), else in pixels."""
    empty_dice: float = ScoringOptions.empty_dice
    """Dice of a class that is in neither truth nor prediction; nan leaves it out of means."""
    against: str | None = None
    """What to compare with on the same images: the folder of another evaluation, or weights, which are then evaluated
    too (at the size that they were trained at). A table here, comparison.json and comparison.csv in the folder."""
    cleaning: Annotated[Cleaning, tyro.conf.arg(name="")] = field(default_factory=Cleaning)
    detect: DetectCluster = False
    """Evaluate in several processes, as SLURM, Kubernetes or Cloud TPU have started them; the first one writes."""
    distributed: Distributed = field(default_factory=Distributed)


def run_of(weights: str | Path) -> RunFolder | None:
    """The run folder that `weights` is, or lies in; None if there is none."""
    path = Path(weights)
    places = [path, path.parent if path.name == "best.safetensors" else path]
    if path.parent.name == "checkpoints":
        places.append(path.parent.parent)
    return next((RunFolder(place) for place in places if (place / "config.toml").is_file()), None)


def data_defaults(weights: str) -> DataConfig:
    """Data settings that go with `weights`: the run's, or the size that the file tells."""
    if run := run_of(weights):
        return config_io.parse(run.config.read_text(encoding="utf-8"), str(run.config)).data
    size = load_options(weights).get("size")
    return DataConfig(size=tuple(size)) if size else DataConfig()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options, defaults = _parse(list(sys.argv[1:] if arguments is None else arguments))
    config = config_io.check(Config(data=options.data), "the command line").data
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: at least one image makes a batch")
    if not (math.isfinite(options.tolerance) and options.tolerance >= 0):
        raise UserError(f"--tolerance {options.tolerance}: a distance is 0 or more")
    if not (math.isnan(options.empty_dice) or 0 <= options.empty_dice <= 1):
        raise UserError(f"--empty-dice {options.empty_dice}: give a number from 0 to 1, or nan")
    with join(options.distributed, options.detect) as group:
        _run(options, defaults, config, group)


def _run(options: EvaluateOptions, defaults: DataConfig, config: DataConfig, group: Group) -> None:
    """Evaluate, and, in the first process, say and write what was found."""
    threshold = _threshold(options, options.weights)
    dataset = open_dataset(config)
    require_same_data(group, dataset)
    other = _other(options, dataset)
    model = _model(options.weights, dataset)
    rival = None if other or options.against is None else _model(options.against, dataset)
    their_threshold = threshold if rival is None else _threshold(options, str(options.against))
    for note in dataset.notes:
        group.log(note)
    began = time.monotonic()
    evaluation = _evaluate(model, dataset, config, options, threshold, group)
    seconds = time.monotonic() - began
    if rival is not None:
        size = load_options(str(options.against)).get("size")
        resized = dataclasses.replace(config, size=tuple(size)) if size else config
        rows = _evaluate(rival, dataset, resized, options, their_threshold, group).rows
        other = compare.Other(str(options.against), rows)
    if not group.is_main:
        return
    run = run_of(options.weights)
    folder = options.output
    if folder is None:
        own = run is not None and config.root == defaults.root
        folder = run.path / "evaluation" / options.split if run and own else Path("evaluation")
    about = {
        "weights": options.weights,
        "data": config.root,
        "size": list(config.height_width),
        "threshold": threshold,
        "threshold_from": "validation" if options.threshold == "validation" else "option",
        "cleaning": asdict(options.cleaning),
        "seconds": round(seconds, 3),
    }
    write_evaluation(evaluation, folder, about, environment(jax.devices()[0].device_kind))
    print(scores.text_table(evaluation.summary))
    print(*evaluation.remarks(), sep="\n")
    remove_comparison(folder)
    if other is not None:
        comparison = compare.compare(evaluation.rows, other, evaluation.summary.rules)
        write_comparison(comparison, evaluation.rows, other, folder)
        print(comparison_table(comparison))
    print(f"results in {folder}, to look at: {write_evaluation_report(folder)}")
    print(evaluation.line)


def _parse(arguments: list[str]) -> tuple[EvaluateOptions, DataConfig]:
    """The options, and the data settings that the weights came with."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--weights")
    weights = first.parse_known_args(arguments)[0].weights
    defaults = DataConfig() if weights is None else data_defaults(weights)
    default = EvaluateOptions(weights=tyro.MISSING if weights is None else weights, data=defaults)
    return tyro.cli(EvaluateOptions, args=arguments, default=default, prog="python -m pdrunet_jax.evaluate"), defaults


def _other(options: EvaluateOptions, dataset: Dataset) -> compare.Other | None:
    """The evaluation that --against names, if it is one, checked before anything is computed."""
    if options.against is None:
        return None
    if not Path(options.against).exists():
        raise UserError(f"--against {options.against}: there is no such file or folder")
    samples = dataset.of(options.split)
    other = compare.read_other(Path(options.against))
    if other and samples:
        unit = unit_of(spacings_of(dataset, samples)[0])
        compare.check_rules(ScoringOptions(unit, options.tolerance, options.empty_dice), other)
        compare.check_pairs(((sample.id, name) for sample in samples for name in dataset.class_names), other)
    return other


def _model(weights: str, dataset: Dataset) -> PDRUNet:
    _check_order(load_options(weights).get("class_names"), dataset)
    return load_model(weights)


def _threshold(options: EvaluateOptions, weights: str) -> float:
    return resolve_threshold(options.threshold, load_options(weights), weights)


def _evaluate(
    model: PDRUNet, dataset: Dataset, config: DataConfig, options: EvaluateOptions, threshold: float, group: Group
) -> Evaluation:
    rules = config.height_width, options.split, options.batch_size, threshold, options.tolerance, options.empty_dice
    parts: Any = nnx.split(model, nnx.Param, nnx.BatchStat)
    weights = content_digest(to_public(*parts[1:], dead_block=False), {"shortcut": model.shortcut})
    group.require_same(f"{weights} {rules} {options.cleaning}", "give it the weights and options of the first process")
    return evaluate_split(
        model,
        dataset,
        options.split,
        config,
        batch_size=options.batch_size,
        threshold=threshold,
        tolerance=options.tolerance,
        empty_dice=options.empty_dice,
        cleaning=options.cleaning,
        group=group,
    )


def _check_order(names: Sequence[str] | None, dataset: Dataset) -> None:
    """The same classes in another order would be scored one as the other."""
    if names and tuple(names) != dataset.class_names and sorted(names) == sorted(dataset.class_names):
        raise UserError(
            f"the model's classes are {', '.join(names)} in this order, those of {dataset.root} "
            f"{', '.join(dataset.class_names)}; declare them in the model's order with --data.classes"
        )


if __name__ == "__main__":
    cli.run(main)
