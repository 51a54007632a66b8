"""python -m pdrunet_jax.predict: masks and everything made of them for files, folders and globs.

In Python, `pdrunet_jax.predict` is the function of that name in `pdrunet_jax.inference`. Importing this module puts
the module in its place (that is how Python treats a package and its modules), so the module can be called like it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from flax import nnx
from tqdm import tqdm

from pdrunet_jax.model.load import class_names, load_model, load_options
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.predict.inference import Augmentation, height_width, predict
from pdrunet_jax.predict.inputs import find_images, name_results, parse_shard, take_shard
from pdrunet_jax.predict.outputs import Areas, Outputs, write_result
from pdrunet_jax.predict.postprocess import Cleaning
from pdrunet_jax.predict.resume import Recipe, finished
from pdrunet_jax.predict.threshold import Threshold, resolve_threshold
from pdrunet_jax.predict.tiling import RADIUS
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.devices import over_devices
from pdrunet_jax.runtime.digest import content_digest
from pdrunet_jax.runtime.errors import DataError, RunError, UserError
from pdrunet_jax.runtime.processes import DetectCluster, Distributed, place_among
from pdrunet_jax.runtime.stop import StopFlag


@dataclass(frozen=True)
class PredictOptions:
    """Segment images: NAME_mask.png, NAME_overlay.png and more for each, at its own resolution, and areas.csv.

    NAME_mask.png is an index image: NumPy reads class indices from it, a viewer shows colours (one class: white on
    black, 255 when read as grey). The folder structure below the inputs' common folder is kept. An image that cannot
    be read does not stop the rest; it is named at the end, and the exit code is 1. Started again, the same command
    goes on with the images that are not done.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...")]
    """Image files, folders (searched recursively) and glob patterns."""
    weights: str
    """Run folder, checkpoint, .safetensors or public .pth."""
    output: Path
    """Folder for the results; is made."""
    size: tuple[int, ...] | Literal["own"] = ()
    """Height and width in pixels that the network works at, one number for both, or own: each image's own. As it was
    trained when left out, and the image's own where the weights do not tell."""
    threshold: Threshold = 0.5
    """Probability above which a pixel is foreground, or validation: the one that scored best on the validation images
    of the training. For one output only."""
    augmentation: Augmentation = "none"
    """Average the probabilities with those of the mirrored image: flip, left to right; flips, top to bottom, too."""
    tile: int | None = None
    """Compute the network in tiles of so many pixels a side, for sizes that memory does not hold at once."""
    halo: int = RADIUS
    """Pixels around a tile that count for it. Exact from 316 on; less is faster, and approximate."""
    cleaning: Annotated[Cleaning, tyro.conf.arg(name="")] = field(default_factory=Cleaning)
    outputs: Annotated[Outputs, tyro.conf.arg(name="")] = field(default_factory=Outputs)
    shard: str | None = None
    """K/N: only the K-th of N shares of the images, for several machines that write to one folder."""
    detect: DetectCluster = False
    """One of several processes, as SLURM, Kubernetes or Cloud TPU have started them, each of which takes its share, as
    with --shard."""
    distributed: Distributed = field(default_factory=Distributed)
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace results that were made otherwise (other weights, other options, another image) instead of refusing."""


def main(arguments: Sequence[str] | None = None) -> int | None:
    """The command."""
    options = tyro.cli(PredictOptions, args=arguments, prog="python -m pdrunet_jax.predict")
    with StopFlag() as stop:
        return _run(options, stop)


def _run(options: PredictOptions, stop: StopFlag) -> int | None:
    shard, table = _share(options, stop)
    size = _size(options.size)
    if (options.tile is not None and options.tile < 1) or options.halo < 0:
        raise UserError(f"--tile {options.tile} --halo {options.halo}: at least 1 and 0 pixels")
    options.outputs.require()
    names = name_results(find_images(options.inputs, options.output))
    share = take_shard(names, shard)
    model, known = load_model(options.weights), load_options(options.weights)
    threshold = resolve_threshold(options.threshold, known, options.weights)
    classes = class_names(model, known.get("class_names"))
    settings = _settings(options, model, classes, size or known.get("size") or "own", threshold)
    recipe = Recipe(settings, tuple(classes), model.outputs, options.outputs)
    targets = {path: options.output / name for path, name in share.items()}
    done = finished(recipe, targets, overwrite=options.overwrite)
    if options.tile and options.halo < RADIUS:
        print(f"tiles with a halo of {options.halo} pixels: the results are approximate; exact from {RADIUS} on")
    if done:
        print(f"{len(done)} of {len(share)} images are done already")

    failed: list[str] = []
    counted = len(done)
    compute = partial(
        predict,
        model,
        size=size,
        threshold=threshold,
        augmentation=options.augmentation,
        tile=options.tile,
        halo=options.halo,
        cleaning=options.cleaning,
    )
    with (
        Areas(options.output / table, ((_name(share, path), record) for path, record in done.items())) as areas,
        _progress(len(share), len(done)) as say,
    ):
        for path, prediction in over_devices(compute, [path for path in share if path not in done]):
            if stop:
                break
            try:
                result = prediction()
            except UserError as error:
                failed += error.problems if isinstance(error, DataError) else [f"{path}: {error}"]
                say(None)
                continue
            record = recipe.record(result, path, targets[path])
            write_result(result, path, targets[path], classes, options.outputs, record)
            areas.add(_name(share, path), record)
            counted += 1
            shares = ", ".join(f"{label} {pixels / result.mask.size:.1%}" for label, pixels in record["pixels"].items())
            say(f"{counted + len(failed)}/{len(share)} {path}: {shares}")
    print(f"{counted} of {len(share)} images segmented; results in {options.output}")
    listing = "\n".join(f"  - {problem}" for problem in failed)
    if stop and counted + len(failed) < len(share):
        if failed:
            print(f"{len(failed)} images could not be read:\n{listing}", file=sys.stderr)
        print(f"stopped by {stop.signal}; the same command goes on from here", file=sys.stderr)
        return cli.STOPPED
    if failed:
        raise RunError(f"{len(failed)} of {len(share)} images could not be read:\n{listing}")
    return None


def _share(options: PredictOptions, stop: StopFlag) -> tuple[tuple[int, int], str]:
    """Which part of the images is meant, counted from 1, and of how many; and the name of its table."""
    among = place_among(options.distributed, options.detect, stop)
    if among is None and options.shard is None:
        return (1, 1), "areas.csv"
    if among is not None and options.shard is not None:
        raise UserError(
            f"--shard {options.shard} with --distributed, which gives each process its share: leave out one"
        )
    number, count = parse_shard(options.shard) if among is None else (among[0] + 1, among[1])
    return (number, count), f"areas_{number}of{count}.csv"


def _size(size: tuple[int, ...] | Literal["own"]) -> tuple[int, int] | Literal["own"] | None:
    if size == "own":
        return "own"
    if not size:
        return None
    return height_width(size, ", or own")


def _settings(
    options: PredictOptions, model: PDRUNet, classes: list[str], size: Any, threshold: float
) -> dict[str, Any]:
    """All that results depend on beside the image, as JSON values."""
    parts: Any = nnx.split(model, nnx.Param, nnx.BatchStat)
    wiring = {"shortcut": model.shortcut, "in_channels": model.in_channels}
    approximate = bool(options.tile) and options.halo < RADIUS
    return {
        "weights": content_digest(to_public(*parts[1:], dead_block=False), wiring),
        "classes": classes,
        "size": list(size) if isinstance(size, tuple | list) else size,
        "threshold": threshold,
        "augmentation": options.augmentation,
        "tile and halo": [options.tile, options.halo] if approximate else None,
        "largest": options.cleaning.largest,
        "min-area": options.cleaning.min_area,
        "fill-holes": options.cleaning.fill_holes,
        "tolerance": options.outputs.tolerance,
    }


def _name(share: Mapping[Path, Path], path: Path) -> str:
    """The image in areas.csv: the name of its results, with its extension."""
    return share[path].with_name(path.name).as_posix()


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """What tells of an image that is done (a line), or failed (None): a bar on a terminal, elsewhere the lines."""
    if not sys.stderr.isatty():
        yield lambda line: print(line, flush=True) if line else None
        return
    with tqdm(total=total, initial=done, unit="image", dynamic_ncols=True) as bar:
        yield lambda line: bar.update()


if __name__ == "__main__":
    cli.run(main)
