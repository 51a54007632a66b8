"""Command `predict`: segment files, folders and globs, and write masks and everything derived from them."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro
from tqdm import tqdm

from pdrunet_jax.data.fit import Spacing
from pdrunet_jax.data.walk import some
from pdrunet_jax.model.pixels import class_names
from pdrunet_jax.model.sides import SWAP, find_pairs
from pdrunet_jax.predict.engines.choice import choose_engine, open_engine
from pdrunet_jax.predict.engines.engine import (
    Engine,
    EngineChoice,
    EngineName,
    Facts,
    Precision,
    check_engine,
    is_installed,
)
from pdrunet_jax.predict.engines.weights import Weights
from pdrunet_jax.predict.inference import (
    Augmentation,
    Input,
    Prediction,
    check_augmentation,
    check_tiles,
    compute_probability,
    finish,
    fit_of,
    height_width,
    read_input,
    row_column,
)
from pdrunet_jax.predict.inputs import find_images, name_results, parse_shard, take_shard
from pdrunet_jax.predict.outputs import Areas, WrittenFiles
from pdrunet_jax.predict.pipeline import Stages, run_stages
from pdrunet_jax.predict.postprocess import Cleaning
from pdrunet_jax.predict.resume import ASSUMED, Composed, Recipe, Work, read_record, survey
from pdrunet_jax.predict.review import report_review
from pdrunet_jax.predict.threshold import Threshold, resolve_threshold
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import DataError, RunError, UserError
from pdrunet_jax.runtime.files import require_inside
from pdrunet_jax.runtime.stop import StopFlag


@dataclass(frozen=True)
class PredictOptions:
    """Segment images. Writes NAME_mask.png, NAME_overlay.png and more for each image, and the table areas.csv.

    Results have the resolution of the image and keep the folder structure below the inputs' common folder.
    NAME_mask.png is an indexed image: NumPy reads class indices, a viewer shows colours (one class: white on black,
    255 when read as grey). Unreadable images are skipped, listed at the end, and make the exit code 1. To resume an
    interrupted run, start the same command again.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...")]
    """Image files, folders (searched recursively), glob patterns, and @FILE for a list of them, one a line."""
    weights: str
    """Run folder, checkpoint, .safetensors or public .pth, or a name of weights that come with the package (`pdrunet
    weights`). A folder of folds averages their probabilities."""
    output: Path
    """Output folder; created if needed."""
    size: tuple[int, ...] | Literal["own"] = ()
    """Size in pixels to run the network at: height and width, one number for both, or own for each image's own
    resolution. Default: the training size, or own if the weights do not state it."""
    spacing: tuple[float, ...] = ()
    """Pixel spacing in mm of images whose files state none: rows and columns, or one number for both. Areas are then
    given in mm2, and weights trained at a fixed data.spacing can be used."""
    threshold: Threshold = 0.5
    """Foreground probability threshold, or validation for the one that scored best on the validation set during
    training. Models with one output or overlapping classes only; for
    these also one a class, as in bone=0.4,implant=0.6."""
    augmentation: Augmentation = "none"
    """Test-time augmentation, averaging probabilities: flip adds the left-right mirror image, flips also top-bottom."""
    swap_on_flip: tuple[tuple[str, str], ...] | None = None
    """Pairs of classes that change places in a mirror image. Default: those that the weights were trained with, or
    whose names differ in left and right alone."""
    tile: int | None = None
    """Run the network in tiles of this many pixels per side, for images that do not fit in memory."""
    halo: int | None = None
    """Extra pixels around each tile. Default: the radius of the network's view, 316 for PDR-UNet, from which on results
    are exact; smaller values are faster and approximate."""
    cleaning: Annotated[Cleaning, tyro.conf.arg(name="")] = field(default_factory=Cleaning)
    files: Annotated[WrittenFiles, tyro.conf.arg(name="")] = field(default_factory=WrittenFiles)
    engine: EngineChoice = "jax"
    """What computes the network. onnxruntime and openvino start faster, on CPUs; they need the extra of that name.
    auto: the fastest installed one whose mask of the first image is that of jax; it says which."""
    precision: Precision = "float32"
    """Arithmetic of the network. bfloat16 is less exact, and faster where the processor has it; not in onnxruntime."""
    confidence: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """State the confidence in each class, from 0 to 1, in areas.csv and on the overlay: about the Dice to expect."""
    review: int | None = None
    """Print the N images that a person should look at first, the least confident ones, and write them to review.csv.
    Implies --confidence."""
    shard: str | None = None
    """K/N: process only the K-th of N shards of the images; several machines can write to one folder."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace results made with other weights, other options or another version of the image, and files that this
    command did not write or that were modified since, instead of refusing."""


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the command; returns the exit code."""
    options = tyro.cli(PredictOptions, args=arguments, prog=cli.program("predict"))
    with StopFlag() as stop:
        return _run(options, stop)


def _run(options: PredictOptions, stop: StopFlag) -> int | None:
    # Check everything that can be checked before the weights are loaded.
    shard = parse_shard(options.shard) if options.shard else (1, 1)
    part = f"_{shard[0]}of{shard[1]}" if options.shard else ""
    confidence = options.confidence or options.review is not None
    size: tuple[int, int] | Literal["own"] | None = "own" if options.size == "own" else height_width(options.size)
    spacing = row_column(options.spacing)
    if (options.tile is not None and options.tile < 1) or (options.halo is not None and options.halo < 0):
        raise UserError(f"--tile {options.tile} --halo {options.halo}: give at least 1 and 0 pixels")
    if options.review is not None and options.review < 1:
        raise UserError(f"--review {options.review}: give at least 1 image")
    options.files.require_packages()
    check_engine(options.engine, options.precision)
    found = find_images(options.inputs, options.output)
    if found.remarks:
        print(cli.printable("\n".join(found.remarks)))
    names = take_shard(name_results(found.images), shard)
    targets = {path: options.output / name for path, name in names.items()}
    require_inside(options.output, *{target.parent for target in targets.values()})

    # Know the network.
    weights = Weights(options.weights)
    if options.swap_on_flip is not None:
        weights.swap(options.swap_on_flip)
    facts = weights.facts
    check_augmentation(options.augmentation, facts.mirror)
    options.files.check(overlap=facts.multilabel)
    if options.tile:
        check_tiles(facts)
    fit_of(facts, (1, 1), size)  # raises if they do not go together
    threshold = resolve_threshold(options.threshold, weights.options, options.weights)
    labels = class_names(facts.foreground_classes, weights.options.get("class_names"))
    settings = _settings(options, weights, labels, size or weights.options.get("size") or "own", threshold)
    if options.augmentation != "none" and (channels := facts.mirror.channels):
        others = channels if facts.multilabel else [index - 1 for index in channels[1:]]
        settings["swapped in mirror images"] = [labels[index] for index in others]
        if SWAP not in weights.options:
            pairs = ", ".join(map(" and ".join, find_pairs(labels)[0]))
            print(cli.printable(f"found by their names: {pairs} change places in mirror images"))
    work = _Work(options, facts, size, spacing, threshold)
    engine = _open_engine(work, weights, targets, settings)
    settings |= {"engine": engine.name, "precision": engine.precision}

    # Find out which images are finished.
    recipe = Recipe(settings, tuple(labels), facts.outputs, options.files, facts.multilabel, confidence)
    works = survey(recipe, targets, overwrite=options.overwrite)
    if _approximate(options, facts):
        print(f"--halo {options.halo}: results are approximate; exact from {facts.radius} on")
    in_table = {path: name.with_name(path.name).as_posix() for path, name in names.items()}
    progress = _Progress(in_table, works, found.problems)
    if progress.done:
        print(f"{progress.done} of {len(names)} images are done already")

    # Segment the others.
    with (
        Areas(
            options.output / f"areas{part}.csv",
            progress.records,
            progress.finished,
            confidence=confidence,
            overwrite=options.overwrite,
        ) as areas,
        # On a terminal; otherwise (disable=None) a line for each image.
        tqdm(total=len(names), initial=progress.done, unit="image", dynamic_ncols=True, disable=None) as bar,
    ):
        write = partial(progress.write, areas=areas, bar=bar)
        stages = Stages(
            work.read, partial(work.compute, engine), partial(work.compose, recipe, targets), write, work.weigh
        )
        pending = [path for path, each in works.items() if not each.done]
        run_stages(stages, pending, engine, lambda: bool(stop))
    return _summarise(options, progress, part, stop)


def _summarise(options: PredictOptions, progress: "_Progress", part: str, stop: StopFlag) -> int | None:
    """Print what came of all images; returns the exit code. Raises `RunError` if some failed."""
    count, failed = len(progress.in_table), progress.failed
    for remark, images in progress.remarks.items():
        print(cli.printable(f"warning: {len(images)} images: {remark}: {some(images)}"))
    print(f"{progress.done} of {count} images segmented; results in {options.output}")
    if options.review and not stop:
        report_review(
            {name: record for name, record in progress.records.items() if name in progress.finished},
            options.review,
            options.output / f"review{part}.csv",
            overwrite=options.overwrite,
        )
    inputs = count + progress.problems
    unreadable = DataError(f"{len(failed)} of {inputs} images could not be read or written", failed)
    if stop and progress.done + len(failed) < inputs:
        if failed:
            print(cli.printable(str(unreadable)), file=sys.stderr)
        print(f"stopped by {stop.signal}; start the same command again to resume", file=sys.stderr)
        return cli.STOPPED
    if failed:
        raise RunError(str(unreadable))
    return None


@dataclass(frozen=True)
class _Work:
    """The work on one image, stage by stage (see `Stages`)."""

    options: PredictOptions
    facts: Facts
    size: tuple[int, int] | Literal["own"] | None
    spacing: Spacing | None
    threshold: float | tuple[float, ...]

    def read(self, path: Path) -> Input:
        return read_input(self.facts, path, size=self.size, spacing=self.spacing)

    def compute(self, engine: Engine, given: Input) -> np.ndarray:
        options = self.options
        return compute_probability(
            engine, given, augmentation=options.augmentation, tile=options.tile, halo=options.halo
        )

    def finish(self, given: Input, probability: np.ndarray) -> Prediction:
        return finish(self.facts, given, probability, threshold=self.threshold, cleaning=self.options.cleaning)

    def compose(
        self, recipe: Recipe, targets: Mapping[Path, Path], path: Path, given: Input, probability: np.ndarray
    ) -> tuple[Prediction, Composed]:
        result = self.finish(given, probability)
        grey = given.pixels if self.facts.in_channels == 1 else None
        overwrite = self.options.overwrite
        return result, recipe.compose(result, path, targets[path], overwrite=overwrite, pixels=grey)

    def weigh(self, given: Input) -> int:
        """Bytes: pixels, probabilities in float32 and what they are computed from, pictures."""
        height, width = given.pixels.shape[:2]
        return 4 * height * width * (2 * self.facts.outputs + 6)


class _Progress:
    """What has become of the images so far."""

    def __init__(self, in_table: Mapping[Path, str], works: Mapping[Path, Work], problems: Sequence[str]) -> None:
        self.in_table = in_table
        self.problems = len(problems)
        self.failed = list(problems)
        self.remarks: dict[str, list[str]] = defaultdict(list)
        self.records = {in_table[path]: work.record for path, work in works.items() if work.record is not None}
        self.finished = {in_table[path] for path, work in works.items() if work.done}
        self.done = len(self.finished)

    def write(self, path: Path, composed: Callable[[], tuple[Prediction, Composed]], *, areas: Areas, bar: Any) -> None:
        """Write the results of an image, or note why there are none, and report it."""
        try:
            result, files = composed()
            files.write()
        except UserError as error:
            self.failed += error.problems if isinstance(error, DataError) else [f"{path}: {error}"]
            bar.update()
            return
        name = self.in_table[path]
        areas.add(name, files.record)
        self.records[name] = files.record
        self.finished.add(name)
        for remark in result.remarks:
            self.remarks[remark].append(str(path))
        self.done += 1
        bar.update()
        if bar.disable:
            area = math.prod(result.mask.shape[:2])
            shares = (f"{label} {pixels / area:.1%}" for label, pixels in files.record["pixels"].items())
            number = self.done + len(self.failed) - self.problems
            print(cli.printable(f"{number}/{len(self.in_table)} {path}: {', '.join(shares)}"), flush=True)


def _open_engine(work: _Work, weights: Weights, targets: Mapping[Path, Path], settings: Mapping[str, Any]) -> Engine:
    """The engine that was asked for; for auto, as for the results that are there, or else the best that agrees."""
    options = work.options
    if options.engine != "auto":
        return open_engine(weights, options.engine, options.precision)
    records = (record for target in targets.values() if (record := read_record(target)))
    if (earlier := next(records, None)) and not options.overwrite:
        made = {**ASSUMED, **earlier["settings"]}
        name = made["engine"]
        if name in get_args(EngineName) and is_installed(name) and made["precision"] == options.precision:
            print(f"engine: {name}, as for the results in {options.output}")
            return open_engine(weights, name, options.precision)
    if (first := next(filter(None, map(partial(_readable, work), targets)), None)) is None:
        return open_engine(weights, "jax", options.precision)

    def mask(engine: Engine) -> np.ndarray:
        return work.finish(first, work.compute(engine, first)).mask

    engine, found = choose_engine(weights, options.precision, mask, dict(settings))
    print(f"engine: {found}")
    return engine


def _readable(work: _Work, path: Path) -> Input | None:
    """The image, read; None if it cannot be read."""
    try:
        return work.read(path)
    except UserError:
        return None


def _settings(
    options: PredictOptions, weights: Weights, labels: list[str], size: Any, threshold: float | tuple[float, ...]
) -> dict[str, Any]:
    """Everything that results depend on, except the image and the engine, as JSON values."""
    facts = weights.facts
    return {
        "weights": weights.digest,
        "classes": labels,
        "size": list(size) if isinstance(size, tuple | list) else size,
        # None where earlier versions, which did not record this, would have computed the same.
        "fit": None if facts.fit == "stretch" or size == "own" else facts.fit,
        "data.spacing": facts.spacing,
        "spacing": list(options.spacing) or None,
        "threshold": list(threshold) if isinstance(threshold, tuple) else threshold,
        "multilabel": facts.multilabel or None,
        "augmentation": options.augmentation,
        "tile and halo": [options.tile, options.halo] if _approximate(options, facts) else None,
        "largest": options.cleaning.largest,
        "min-area": options.cleaning.min_area,
        "fill-holes": options.cleaning.fill_holes,
        "tolerance": options.files.tolerance,
    }


def _approximate(options: PredictOptions, facts: Facts) -> bool:
    """Whether tiles are too close together for exact results."""
    return bool(options.tile) and options.halo is not None and options.halo < facts.radius


if __name__ == "__main__":
    cli.run(main)
