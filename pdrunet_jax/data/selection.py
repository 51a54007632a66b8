"""Choose the images to annotate next: those a network is unsure of, and unlike each other and its training images.

Two steps. The least confident images of the pool, twice as many as asked for, are candidates, as in Yang et al.,
"Suggestive Annotation: A Deep Active Learning Framework for Biomedical Image Segmentation", MICCAI 2017. Among them,
the one farthest from all training images and all images chosen so far is chosen, again and again: the greedy k-center
algorithm of Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from pdrunet_jax import config
from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.data.fit import Fit, Spacing
from pdrunet_jax.data.images import FORMATS, decode_image, read_bytes, read_spacing
from pdrunet_jax.data.scan import digest_of
from pdrunet_jax.data.walk import RESULT, passed_over, walk_images
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.confidence import confidences
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.load import find_run, load_model
from pdrunet_jax.model.pixels import predict_classes, probabilities, unit_range
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime import compile as compiling
from pdrunet_jax.runtime.errors import DataError, RunError, UserError
from pdrunet_jax.runtime.files import atomic_write, is_present, writing

CANDIDATES = 2
"""Candidates for each image to choose."""

HELP = """Rank images without annotations: annotate the first ones next.

The network is run on every image of the pool. Chosen are images that it is unsure of, and that are unlike each other
and its training images. Images of the pool that are annotated already are left out.
"""


@dataclass(frozen=True)
class Next:
    """Choose the images that should be annotated next."""

    weights: str
    """Run folder, checkpoint, .safetensors or public .pth of the network trained so far."""
    pool: Path
    """Folder of images without annotations, searched recursively."""
    count: int = 10
    """Number of images to choose."""
    annotated: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Dataset folder with the images annotated so far. Default: the one that the run was trained on."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file for the chosen images, one a line: predict takes it as @FILE."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace an existing --output."""


class View(NamedTuple):
    """What a network makes of one image."""

    confidence: float
    """The least of its classes' `confidences`, from 0 to 1."""
    features: np.ndarray
    """(D,) float32: means over the image of every channel of every layer's output."""


def choose_next(options: Next) -> None:
    """Print the images to annotate next, the most useful first, and write their paths to `options.output`.

    Raises `UserError` for an option, an empty pool or an unusable dataset, `RunError` at the end if images of the pool
    could not be read.
    """
    if options.count < 1:
        raise UserError(f"--count {options.count}: give at least 1")
    if options.output is not None and is_present(options.output) and not options.overwrite:
        raise UserError(f"{options.output} exists; name another --output, or give --overwrite to replace it")
    found = walk_images(options.pool)
    paths = [path for path in found.files if not RESULT.search(path.name)]
    found.passed["masks and results of predictions, by their names"] += sorted({*found.files} - {*paths})
    remarks, failed = passed_over(found.passed), [f"{path}: {reason}" for path, reason in found.problems]
    if not paths:
        raise DataError(f"--pool {options.pool}: contains no image; images are {FORMATS} files", [*remarks, *failed])
    model = load_model(options.weights)
    dataset, note = _annotated(options)
    print(cli.printable("\n".join([*remarks, note])))

    # Look at the images of the pool that are not annotated, and at the training images.
    known = {sample.pixels for sample in dataset.samples} if dataset else set()
    samples = dataset.of("train") if dataset else ()
    pool: dict[Path, View] = {}
    trained: list[np.ndarray] = []
    already = 0
    with tqdm(total=len(paths) + len(samples), unit="image", dynamic_ncols=True, disable=None) as progress:
        for path in paths:
            try:
                data = read_bytes(path, str(path))
                if digest_of(decode_image(data, str(path))[0]) in known:
                    already += 1
                else:
                    pixels, _ = decode_image(data, str(path), model.config.in_channels)
                    pool[path] = look(model, pixels, read_spacing(path), name=str(path))
            except DataError as error:
                failed += error.problems
            except UserError as error:
                failed.append(f"{path}: {error}")
            progress.update()
        for sample in samples:
            pixels, _ = decode_image(read_bytes(sample.image, sample.id), sample.id, model.config.in_channels)
            spacing = dataset.spacing_of(sample) if dataset else None
            trained.append(look(model, pixels, spacing, name=sample.id).features)
            progress.update()
    if already:
        print(f"left out: {already} images that are annotated already")
    if not pool:
        raise DataError(f"--pool {options.pool}: holds no image that could be annotated next", failed or ["none left"])

    # Choose.
    views = list(pool.values())
    picked = choose(
        np.array([view.confidence for view in views]),
        np.stack([view.features for view in views]),
        np.stack(trained) if trained else None,
        options.count,
    )
    chosen = [list(pool)[place] for place in picked]
    print("confidence  image")
    for path in chosen:
        print(cli.printable(f"{pool[path].confidence:10.3f}  {path}"))
    if len(chosen) < options.count:
        print(f"the pool has no more than these {len(chosen)}")
    if options.output is not None:
        with writing(options.output):
            atomic_write(options.output, "".join(f"{path}\n" for path in chosen))
        print(f"written to {options.output}")
    if failed:
        raise RunError(str(DataError(f"{len(failed)} images of the pool could not be used", failed)))


def choose(confidence: np.ndarray, features: np.ndarray, trained: np.ndarray | None, count: int) -> list[int]:
    """Places of `count` images of a pool (all, if it has fewer), the one to annotate first at the beginning.

    Args:
        confidence: (N,) confidence in each image of the pool.
        features: (N, D) `View.features` of the pool.
        trained: (M, D) features of the training images; None if they are unknown: the first image is then the least
            confident.
        count: Images to choose.
    """
    candidates = np.argsort(confidence, kind="stable")[: CANDIDATES * count]
    # Every feature counts the same, however large its values are.
    every = features if trained is None else np.concatenate([features, trained])
    centre, scale = every.mean(axis=0), every.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    points = (features[candidates] - centre) / scale
    if trained is None:
        distance = np.full(len(points), np.inf)
    else:
        distance = np.min([_distances(points, each) for each in (trained - centre) / scale], axis=0)
    chosen: list[int] = []
    for _ in range(min(count, len(points))):
        place = int(distance.argmax())  # the least confident of several
        chosen.append(place)
        distance = np.minimum(distance, _distances(points, points[place]))
        distance[chosen] = -1.0
    return candidates[chosen].tolist()


def look(model: Network, pixels: np.ndarray, spacing: Spacing | None = None, *, name: str = "the image") -> View:
    """Run `model` on an image (H, W, C) in [0, 255], called `name`, at the training size.

    Raises `UserError` if the image cannot be fitted to the network, `RunError` for logits that are not finite.
    """
    shape = pixels.shape[0], pixels.shape[1]
    fit = Fit(model.size or shape, model.fit, model.spacing)
    graphdef, state = nnx.split(model)
    logits, features = _compiled()(graphdef, state, fit.image(pixels, spacing)[None])
    values = fit.box(shape, spacing).crop(np.asarray(logits)[0])[None]
    if not np.isfinite(values).all():
        raise RunError(f"{name}: the network computes NaN or infinity: the weights are not usable; use others")
    probability = np.asarray(probabilities(values, multilabel=model.multilabel))[0]
    mask = np.asarray(predict_classes(values, multilabel=model.multilabel))[0]
    found = confidences(probability[..., 0] if model.outputs == 1 else probability, mask)
    return View(min(found), np.asarray(features)[0])


@cache
def _compiled() -> Any:
    """Compile the network with what its layers put out, at the first call."""

    def run(
        graphdef: nnx.GraphDef[Network], state: nnx.State[Any, Any], images: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        model, means = nnx.merge(graphdef, state), []
        tap = lambda name, values: means.append(values.astype(jnp.float32).mean(axis=(1, 2)))  # noqa: E731
        logits = model(unit_range(images), execution=replace(Execution.of(model.config.conv), tap=tap))
        return logits, jnp.concatenate(means, axis=-1)

    return compiling.jit(run, static_argnums=0)


def _annotated(options: Next) -> tuple[Dataset | None, str]:
    """The dataset annotated so far, and a line that names it, or says that it is unknown."""
    run = find_run(options.weights)
    settings = DataConfig() if run is None else config.read(run.config_file).data
    root = options.annotated or (Path(settings.root) if run is not None else None)
    if root is None or (options.annotated is None and not root.is_dir()):
        where = f"{root} is not there" if root else f"{options.weights} does not name them"
        return None, f"training images: unknown ({where}); give --annotated FOLDER to choose images unlike them"
    dataset = open_dataset(replace(settings, root=str(root)))
    return dataset, f"training images: {len(dataset.of('train'))} of {len(dataset.samples)} annotated images in {root}"


def _distances(points: np.ndarray, point: np.ndarray) -> np.ndarray:
    return np.sqrt(((points - point) ** 2).sum(axis=-1))
