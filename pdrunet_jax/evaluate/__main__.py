"""`python -m pdrunet_jax.evaluate`: score a model on a dataset, per image and in summary, and compare two models.

--predictions scores masks made elsewhere (see `pdrunet_jax.evaluate.predictions`).
Scores are computed at each input's own resolution, without ignored pixels (see `pdrunet_jax.evaluate.evaluation`).
--against compares with another evaluation of the same images (see `pdrunet_jax.evaluate.compare`).
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from pdrunet_jax import config as configuration
from pdrunet_jax.config import Config, DataConfig, MaskValue
from pdrunet_jax.data.dataset import Dataset, open_dataset, require_same_data
from pdrunet_jax.data.fit import Fit
from pdrunet_jax.data.folder import read_description
from pdrunet_jax.data.masks import UNNAMED
from pdrunet_jax.evaluate import compare, scores
from pdrunet_jax.evaluate.evaluation import (
    Evaluation,
    EvaluationOptions,
    evaluate_split,
    read_spacings,
    write_evaluation,
)
from pdrunet_jax.evaluate.folds import OUT_OF_FOLD, evaluate_out_of_fold, fold_table, out_of_fold
from pdrunet_jax.evaluate.predictions import evaluate_predictions
from pdrunet_jax.evaluate.report.page import write_evaluation_report
from pdrunet_jax.evaluate.scores import ScoringOptions
from pdrunet_jax.evaluate.training_images import require_unseen
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.ensemble import weights_digest
from pdrunet_jax.model.folds import find_folds
from pdrunet_jax.model.load import Loaded, build_loaded, find_run, load_any, load_weights
from pdrunet_jax.predict.engines.choice import choose_engine, open_engine, open_members
from pdrunet_jax.predict.engines.engine import (
    DEFAULT_ENGINE,
    DEFAULT_PRECISION,
    Engine,
    EngineChoice,
    EngineName,
    Precision,
    check_engine,
)
from pdrunet_jax.predict.engines.weights import Weights
from pdrunet_jax.predict.inference import segment
from pdrunet_jax.predict.threshold import Threshold, resolve_threshold
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import require_inside
from pdrunet_jax.runtime.processes import DetectCluster, Distributed, Group, join
from pdrunet_jax.runtime.run_folder import RunFolder, environment


@dataclass(frozen=True)
class EvaluateOptions:
    """Score a model, or masks made elsewhere, on a dataset.

    Prints a table; writes report.html, per_image.csv,
    summary.json and more.
    """

    weights: str = ""
    """Run folder, checkpoint, .safetensors or public .pth, or a name of weights that come with the package (`pdrunet
    weights`). A folder of folds averages their probabilities."""
    predictions: Path | None = None
    """Score the masks in this folder, made elsewhere, instead of a model: NAME.png or NAME_mask.png for each image."""
    prediction_classes: dict[str, MaskValue] = field(default_factory=dict)
    """What the values in --predictions mean: class names with a grey value, palette index, "#rrggbb" colour, or several
    (1,2). By default as in the masks of the dataset."""
    data: DataConfig = field(default_factory=DataConfig)
    """Dataset. Defaults come from the run folder's config.toml."""
    split: Literal["train", "val", "test", "all", "out-of-fold"] = "test"
    """Split to score; all takes every image, for a dataset unseen in training. out-of-fold scores every image with the
    fold that was not trained on it; it is the default for a folder of folds on its own data."""
    output: Path | None = None
    """Output folder. Default: the folder of folds for out-of-fold scores; otherwise evaluation/SPLIT in the run folder
    if --data.root is the run's own, else evaluation/WEIGHTS_DATASET/SPLIT, both with the names of their folders or
    files."""
    threshold: Threshold = 0.5
    """Probability above which a pixel is foreground, or validation for the best one on the validation set. Models with
    one output or overlapping classes only; for
    these also one a class, as in bone=0.4,implant=0.6."""
    against: str | None = None
    """Compare on the same images with this evaluation folder, or with these weights (evaluated too, at the size they
    were trained at). Prints a table; writes comparison.json and comparison.csv."""
    allow_training_images: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Score images that the model was trained on too, instead of refusing."""
    engine: EngineChoice = "jax"
    """What computes the network, as in predict."""
    precision: Precision = "float32"
    """Arithmetic of the network, as in predict."""
    scoring: Annotated[EvaluationOptions, tyro.conf.arg(name="")] = field(default_factory=EvaluationOptions)
    detect: DetectCluster = False
    """Evaluate in several processes started by SLURM, Kubernetes or Cloud TPU; the first one writes."""
    distributed: Distributed = field(default_factory=Distributed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises `UserError` for invalid options or data, `RunError` if the results cannot be written."""
    options, loaded = _parse(list(sys.argv[1:] if arguments is None else arguments))
    scoring = options.scoring
    if not 1 <= scoring.batch_size <= 1 << 16:
        raise UserError(f"--batch-size {scoring.batch_size}: must be from 1 to {1 << 16}")
    if not (math.isfinite(scoring.tolerance) and scoring.tolerance >= 0):
        raise UserError(f"--tolerance {scoring.tolerance}: must be a distance of 0 or more")
    if not (math.isnan(scoring.empty_dice) or 0 <= scoring.empty_dice <= 1):
        raise UserError(f"--empty-dice {scoring.empty_dice}: must be between 0 and 1, or nan")
    check_engine(options.engine, options.precision)
    if options.predictions is not None:
        _score_predictions(options, options.predictions)
        return
    with join(options.distributed, options.detect) as group:
        _run(options, loaded or load_any(options.weights), group)


def _parse(arguments: list[str]) -> tuple[EvaluateOptions, Loaded | None]:
    """The options, with data settings checked and defaults from the weights; and the weights, if read for that."""
    weights = cli.first_value(arguments, "--weights")
    if weights and cli.first_value(arguments, "--predictions"):
        raise UserError("give either --weights, to score a model, or --predictions, to score masks made elsewhere")
    folds = find_folds(weights) if weights else ()
    run = find_run(weights) if weights else None
    loaded = load_weights(weights) if weights and not (run or folds) else None
    defaults = DataConfig()
    if run:
        defaults = configuration.read(run.config_file).data
    elif folds:
        defaults = replace(configuration.read(folds[0].config_file).data, fold=None)
    elif loaded:
        defaults = _data_of(loaded)
    own_root = defaults.root
    root = cli.first_value(arguments, "--data.root")
    own = root is None or Path(root).resolve() == Path(own_root).resolve()
    if root is not None and not own:
        declared = read_description(Path(root)).declares_coding
        # Never the threshold of one with the classes of the other.
        defaults = defaults.without_coding() if declared else replace(defaults, swap_on_flip=None)
        defaults = replace(defaults, fold=None)
    defaults = defaults.under(arguments)
    default = EvaluateOptions(weights=weights or "", data=defaults, split="out-of-fold" if folds and own else "test")
    options = tyro.cli(EvaluateOptions, args=arguments, default=default, prog=cli.program("evaluate"))
    if not options.weights and options.predictions is None:
        raise UserError("give --weights, to score a model, or --predictions, to score masks made elsewhere")
    if options.predictions is None and options.prediction_classes:
        raise UserError("--prediction-classes says what the values in --predictions mean; give that folder too")
    data = configuration.check(Config(data=options.data), "the command line").data
    if options.split == OUT_OF_FOLD:
        if not folds:
            raise UserError("--split out-of-fold scores a folder of folds: name it with --weights (train --folds)")
        data = replace(data, fold=configuration.read(folds[0].config_file).data.fold)
    place = RunFolder(options.weights) if folds else run
    output = options.output or _default_output(options, place if data.root == own_root else None)
    return replace(options, data=data, output=output), loaded


def _default_output(options: EvaluateOptions, run: RunFolder | None) -> Path:
    """A folder of its own for each weights, dataset and split; in the run folder `run` if the data is the run's own."""
    given = Path(options.weights or options.predictions or "")
    path = given.absolute() if given.exists() else given  # a name of weights has no folder
    step = f"step_{path.name}" if path.parent.name == "checkpoints" else ""
    if options.split == OUT_OF_FOLD:
        return Path(options.weights)
    if run is not None:
        return run.evaluation / step / options.split
    place = path.parent.parent if step else path
    parts = [place.parent.name, place.stem if place.is_file() else place.name, step, Path(options.data.root).name]
    return Path("evaluation") / "_".join(filter(None, parts)) / options.split


def fitted_as(data: DataConfig, loaded: Loaded) -> DataConfig:
    """`data` with the size, fit and spacing that `loaded` was trained with, if known."""
    return replace(data, size=loaded.size, fit=loaded.fit, spacing=loaded.spacing) if loaded.size else data


def _data_of(loaded: Loaded) -> DataConfig:
    """Default settings of data for weights without a run."""
    return replace(fitted_as(DataConfig(), loaded), multilabel=loaded.multilabel)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A model to evaluate."""

    weights: str
    loaded: Loaded
    threshold: float | tuple[float, ...]


def _run(options: EvaluateOptions, loaded: Loaded, group: Group) -> None:
    """Evaluate; in the main process, print and write the results."""
    # Check everything before computing anything.
    threshold = resolve_threshold(options.threshold, loaded.options, options.weights)
    candidate = _Candidate(options.weights, loaded, threshold)
    dataset = open_dataset(options.data)
    if options.split == OUT_OF_FOLD:
        dataset = out_of_fold(dataset)
    require_same_data(group, dataset)
    other, rival = _opponent(options, dataset)
    judged = {each: _matched(each, dataset) for each in (candidate, rival) if each}
    if options.split != "train" and not options.allow_training_images:
        for each in judged:
            if not (each.loaded.members and options.split == OUT_OF_FOLD):  # there each fold is checked by itself
                require_unseen(each.weights, dataset.of(options.split), dataset)
    for note in dataset.notes:
        group.log(note)

    # Score the model, and the one to compare with unless its scores are known.
    began = time.monotonic()
    evaluation, engine = _evaluate(candidate, judged[candidate], options.data, options, group)
    seconds = time.monotonic() - began
    if rival:
        resized = fitted_as(options.data, rival.loaded)
        other = compare.Other(rival.weights, _evaluate(rival, judged[rival], resized, options, group)[0].rows)
    if not group.is_main:
        return

    about: dict[str, Any] = {
        "weights": options.weights,
        "data": options.data.root,
        "size": list(options.data.height_width),
        "fit": options.data.fit,
        "spacing": options.data.spacing,
        "engine": engine,
        "precision": options.precision,
        "threshold": threshold,
        "threshold_from": "validation" if options.threshold == "validation" else "option",
        "cleaning": asdict(options.scoring.cleaning),
        "seconds": round(seconds, 3),
    }
    if options.split == OUT_OF_FOLD:
        about["folds"] = fold_table(evaluation)
        if options.threshold == "validation":
            about["threshold_from"] = "validation: each fold has its own, and this is their mean"
    _finish(options, evaluation, other, about, environment(jax.devices()[0].device_kind))


def _score_predictions(options: EvaluateOptions, folder: Path) -> None:
    """Score masks made elsewhere; print and write the results."""
    began = time.monotonic()
    dataset = open_dataset(options.data)
    other, rival = _opponent(options, dataset)
    if rival:
        raise UserError(f"--against {options.against}: with --predictions, name a finished evaluation folder")
    evaluation, notes = evaluate_predictions(
        folder, dataset, options.split, options.scoring, options.prediction_classes
    )
    for note in (*dataset.notes, *notes):
        print(cli.printable(note))
    about = {
        "predictions": str(folder),
        "data": options.data.root,
        "cleaning": asdict(options.scoring.cleaning),
        "seconds": round(time.monotonic() - began, 3),
    }
    _finish(options, evaluation, other, about, environment())


def _finish(
    options: EvaluateOptions,
    evaluation: Evaluation,
    other: compare.Other | None,
    about: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Print and write the results."""
    folder = options.output or Path("evaluation")
    run = find_run(options.weights) if options.weights else None
    if run and run.evaluation in folder.parents:
        require_inside(run.path, folder)
    write_evaluation(evaluation, folder, about, facts)
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
    # A folder of folds holds the scores out of fold; on other images it is weights.
    known = options.split == OUT_OF_FOLD or not find_folds(against)
    if known and (other := compare.read_other(Path(against))):
        unit = read_spacings(dataset, samples)[1]
        if samples:
            compare.check_rules(ScoringOptions(unit, options.scoring.tolerance, options.scoring.empty_dice), other)
            compare.check_pairs(((sample.id, name) for sample in samples for name in dataset.class_names), other)
        return other, None
    loaded = load_any(against)
    return None, _Candidate(against, loaded, resolve_threshold(options.threshold, loaded.options, against))


def _matched(candidate: _Candidate, dataset: Dataset) -> Dataset:
    """The dataset with its classes in the model's order, matched by name. Raises `UserError` if they differ."""
    names = candidate.loaded.options.get("class_names")
    if not names or (len(names) == 1 and UNNAMED in (names[0], *dataset.class_names) and len(dataset.class_names) == 1):
        return dataset
    if sorted(names) == sorted(dataset.class_names):
        return dataset.in_order(names)
    run = find_run(candidate.weights)
    known = configuration.read(run.config_file).data if run else DataConfig()
    coding = read_description(Path(known.root)).coding(known) if run else None
    own = f" ({coding})" if coding and coding.names == tuple(names) else ""
    raise UserError(
        f"the classes differ: {candidate.weights} has {', '.join(names)}{own}; {dataset.root} has "
        f"{', '.join(dataset.class_names)} ({dataset.coding}). Declare its masks with the model's names: "
        f"--data.classes {' '.join(f'{name} VALUE' for name in names)}"
    )


def _evaluate(
    candidate: _Candidate, dataset: Dataset, config: DataConfig, options: EvaluateOptions, group: Group
) -> tuple[Evaluation, EngineName]:
    """The scores of a model, and the engine that computed it."""
    loaded, threshold = candidate.loaded, candidate.threshold
    wiring = {name: loaded.options.get(name) for name in ("shortcut", "up")}
    rules = threshold, Fit.of(config), options.split, options.scoring
    network = build_loaded(loaded)
    engine = _engine(candidate, network, dataset, config, options)
    digest = weights_digest(network, wiring)
    computed = f" {engine.name} {engine.precision}" if isinstance(engine, Engine) else ""
    group.require_same(f"{digest} {rules}{computed}", "start all processes with the same weights and options")
    name = engine.name if isinstance(engine, Engine) else DEFAULT_ENGINE
    if loaded.members and options.split == OUT_OF_FOLD:
        models: Sequence[Network | Engine] = network.members
        if isinstance(engine, Engine):
            models = open_members(Weights(candidate.weights, quiet=True), engine.name, engine.precision)
        at = [resolve_threshold(options.threshold, each.options, candidate.weights) for each in loaded.members]
        runs, members = find_folds(candidate.weights), list(zip(models, at, strict=True))
        evaluation = evaluate_out_of_fold(runs, members, dataset, config, options.scoring, group=group)
        assert evaluation is not None  # nothing asks to stop
        return evaluation, name
    scored = evaluate_split(engine, dataset, options.split, config, options.scoring, threshold=threshold, group=group)
    return scored, name


def _engine(
    candidate: _Candidate, network: Network, dataset: Dataset, config: DataConfig, options: EvaluateOptions
) -> Network | Engine:
    """The network itself, or in the engine that was asked for."""
    samples = dataset.of(options.split)
    if (options.engine, options.precision) == (DEFAULT_ENGINE, DEFAULT_PRECISION) or not samples:
        return network
    weights = Weights(candidate.weights, quiet=True)
    if options.engine != "auto":
        return open_engine(weights, options.engine, options.precision)
    size, spacing = config.height_width, dataset.spacing_of(samples[0])

    def mask(engine: Engine) -> np.ndarray:
        given = segment(engine, samples[0].image, size=size, spacing=spacing, threshold=candidate.threshold)
        return given.mask

    engine, found = choose_engine(weights, options.precision, mask, [size, candidate.threshold])
    print(f"engine: {found}")
    return engine


if __name__ == "__main__":
    cli.run(main)
