"""Command `predict`: segment files, folders and globs, and write masks and everything derived from them."""

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from pdrunet_jax.data.walk import some
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.ensemble import weights_digest
from pdrunet_jax.model.load import build_loaded, class_names, load_any
from pdrunet_jax.model.sides import SWAP, find_pairs
from pdrunet_jax.predict.inference import (
    Augmentation,
    check_augmentation,
    check_tiles,
    fit_of,
    height_width,
    row_column,
    segment,
)
from pdrunet_jax.predict.inputs import find_images, name_results, parse_shard, take_shard
from pdrunet_jax.predict.outputs import Areas, WrittenFiles
from pdrunet_jax.predict.postprocess import Cleaning
from pdrunet_jax.predict.resume import Recipe, survey
from pdrunet_jax.predict.review import report_review
from pdrunet_jax.predict.threshold import Threshold, resolve_threshold
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.devices import over_devices
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
    found = find_images(options.inputs, options.output)
    if found.remarks:
        print(cli.printable("\n".join(found.remarks)))
    names = take_shard(name_results(found.images), shard)
    targets = {path: options.output / name for path, name in names.items()}
    require_inside(options.output, *{target.parent for target in targets.values()})

    # Find out which images are finished.
    loaded = load_any(options.weights)
    if options.swap_on_flip is not None:
        for each in (loaded, *loaded.members):
            each.options[SWAP] = options.swap_on_flip
    model = build_loaded(loaded)
    check_augmentation(options.augmentation, model.mirror)
    options.files.check(overlap=model.multilabel)
    if options.tile:
        check_tiles(model)
    fit_of(model, (1, 1), size)  # raises if they do not go together
    threshold = resolve_threshold(options.threshold, loaded.options, options.weights)
    labels = class_names(model, loaded.options.get("class_names"))
    settings = _settings(options, model, labels, size or loaded.options.get("size") or "own", threshold)
    if options.augmentation != "none" and (channels := model.mirror.channels):
        others = channels if model.multilabel else [index - 1 for index in channels[1:]]
        settings["swapped in mirror images"] = [labels[index] for index in others]
        if SWAP not in loaded.options:
            pairs = ", ".join(map(" and ".join, find_pairs(labels)[0]))
            print(cli.printable(f"found by their names: {pairs} change places in mirror images"))
    recipe = Recipe(settings, tuple(labels), model.outputs, options.files, model.multilabel, confidence)
    works = survey(recipe, targets, overwrite=options.overwrite)
    pending = [path for path, work in works.items() if not work.done]
    if _approximate(options, model):
        print(f"--halo {options.halo}: results are approximate; exact from {model.radius} on")
    done = len(works) - len(pending)
    if done:
        print(f"{done} of {len(names)} images are done already")

    # Segment the others.
    compute = partial(
        segment,
        model,
        size=size,
        spacing=spacing,
        threshold=threshold,
        augmentation=options.augmentation,
        tile=options.tile,
        halo=options.halo,
        cleaning=options.cleaning,
    )
    failed = list(found.problems)
    remarks: dict[str, list[str]] = defaultdict(list)
    in_table = {path: name.with_name(path.name).as_posix() for path, name in names.items()}
    records = {in_table[path]: work.record for path, work in works.items() if work.record is not None}
    finished = {in_table[path] for path, work in works.items() if work.done}
    with (
        Areas(
            options.output / f"areas{part}.csv", records, finished, confidence=confidence, overwrite=options.overwrite
        ) as areas,
        # On a terminal; otherwise (disable=None) a line for each image.
        tqdm(total=len(names), initial=done, unit="image", dynamic_ncols=True, disable=None) as progress,
    ):
        for path, prediction in over_devices(compute, pending):
            if stop:
                break
            try:
                result = prediction()
                record = recipe.write(result, path, targets[path], overwrite=options.overwrite)
            except UserError as error:
                failed += error.problems if isinstance(error, DataError) else [f"{path}: {error}"]
                progress.update()
                continue
            areas.add(in_table[path], record)
            records[in_table[path]] = record
            finished.add(in_table[path])
            for remark in result.remarks:
                remarks[remark].append(str(path))
            done += 1
            progress.update()
            if progress.disable:
                area = math.prod(result.mask.shape[:2])
                shares = (f"{label} {pixels / area:.1%}" for label, pixels in record["pixels"].items())
                line = f"{done + len(failed) - len(found.problems)}/{len(names)} {path}: {', '.join(shares)}"
                print(cli.printable(line), flush=True)

    # Summarise.
    for remark, images in remarks.items():
        print(cli.printable(f"warning: {len(images)} images: {remark}: {some(images)}"))
    print(f"{done} of {len(names)} images segmented; results in {options.output}")
    if options.review and not stop:
        report_review(
            {name: record for name, record in records.items() if name in finished},
            options.review,
            options.output / f"review{part}.csv",
            overwrite=options.overwrite,
        )
    inputs = len(names) + len(found.problems)
    unreadable = DataError(f"{len(failed)} of {inputs} images could not be read or written", failed)
    if stop and done + len(failed) < inputs:
        if failed:
            print(cli.printable(str(unreadable)), file=sys.stderr)
        print(f"stopped by {stop.signal}; start the same command again to resume", file=sys.stderr)
        return cli.STOPPED
    if failed:
        raise RunError(str(unreadable))
    return None


def _settings(
    options: PredictOptions, model: Network, labels: list[str], size: Any, threshold: float | tuple[float, ...]
) -> dict[str, Any]:
    """Everything that results depend on, except the image, as JSON values."""
    wiring: dict[str, Any] = {"shortcut": model.config.shortcut, "in_channels": model.config.in_channels}
    if model.config.up == "bilinear_corners":  # the arrays show everything else
        wiring["up"] = model.config.up
    return {
        "weights": weights_digest(model, wiring),
        "classes": labels,
        "size": list(size) if isinstance(size, tuple | list) else size,
        # None where earlier versions, which did not record this, would have computed the same.
        "fit": None if model.fit == "stretch" or size == "own" else model.fit,
        "data.spacing": model.spacing,
        "spacing": list(options.spacing) or None,
        "threshold": list(threshold) if isinstance(threshold, tuple) else threshold,
        "multilabel": model.multilabel or None,
        "augmentation": options.augmentation,
        "tile and halo": [options.tile, options.halo] if _approximate(options, model) else None,
        "largest": options.cleaning.largest,
        "min-area": options.cleaning.min_area,
        "fill-holes": options.cleaning.fill_holes,
        "tolerance": options.files.tolerance,
    }


def _approximate(options: PredictOptions, model: Network) -> bool:
    """Whether tiles are too close together for exact results."""
    return bool(options.tile) and options.halo is not None and options.halo < model.radius


if __name__ == "__main__":
    cli.run(main)
