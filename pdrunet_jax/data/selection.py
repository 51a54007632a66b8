"""Choose the images to annotate next: those a network is unsure of, and unlike each other and its training images.

Two steps. The least confident images of the pool, twice as many as asked for, are candidates, as in Yang et al.,
"Suggestive Annotation: A Deep Active Learning Framework for Biomedical Image Segmentation", MICCAI 2017. Among them,
the one farthest from all training images and all images chosen so far is chosen, again and again: the greedy k-center
algorithm of Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import numpy as np
import tyro
from tqdm import tqdm

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.data.images import FORMATS, decode_image, read_bytes, read_spacing
from pdrunet_jax.data.scan import digest_of
from pdrunet_jax.data.walk import RESULT, passed_over, some, walk_images
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import DataError, RunError, UserError
from pdrunet_jax.runtime.files import atomic_write, is_present, writing

if TYPE_CHECKING:  # the other subcommands of `data` start without JAX
    from pdrunet_jax.data.views import View, Viewer

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


@dataclass
class _Pool:
    """The images to choose from, with what the network makes of them."""

    views: dict[Path, "View"] = field(default_factory=dict)
    annotated: int = 0
    """Images left out because they are annotated already."""
    failed: list[str] = field(default_factory=list)
    """Why others cannot be used."""


def choose_next(options: Next) -> None:
    """Print the images to annotate next, the most useful first, and write their paths to `options.output`.

    Raises `UserError` for an option, an empty pool or an unusable dataset, `RunError` at the end if images of the pool
    could not be read.
    """
    from pdrunet_jax.data.views import Viewer

    if options.count < 1:
        raise UserError(f"--count {options.count}: give at least 1")
    if options.output is not None and is_present(options.output) and not options.overwrite:
        raise UserError(f"{options.output} exists; name another --output, or give --overwrite to replace it")
    paths, unreadable, remarks = _find(options.pool)
    viewer = Viewer(options.weights)
    dataset, note = _annotated(options, viewer.settings)
    print(cli.printable("\n".join([*remarks, note])))
    samples = dataset.of("train") if dataset else ()
    with tqdm(total=len(paths) + len(samples), unit="image", dynamic_ncols=True, disable=None) as progress:
        pool = _view(viewer, paths, {sample.pixels for sample in dataset.samples} if dataset else set(), progress)
        trained = list(_training_features(viewer, dataset, progress)) if dataset else []
    pool.failed[:0] = unreadable
    if pool.annotated:
        print(f"left out: {pool.annotated} images that are annotated already")
    if not pool.views:
        raise DataError(
            f"--pool {options.pool}: holds no image that could be annotated next", pool.failed or ["none left"]
        )
    places = choose(
        np.array([view.confidence for view in pool.views.values()]),
        np.stack([view.features for view in pool.views.values()]),
        np.stack(trained) if trained else None,
        options.count,
    )
    chosen = [list(pool.views)[place] for place in places]
    _report(options, pool, chosen)
    if pool.failed:
        raise RunError(str(DataError(f"{len(pool.failed)} images of the pool could not be used", pool.failed)))


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


def _find(pool: Path) -> tuple[list[Path], list[str], list[str]]:
    """The images below `pool`, what could not be read, and remarks on what was passed over."""
    if not pool.is_dir():
        raise UserError(f"--pool {pool}: no such folder")
    found = walk_images(pool)
    paths = [path for path in found.files if not RESULT.search(path.name)]
    found.passed["masks and results of predictions, by their names"] += sorted({*found.files} - {*paths})
    remarks, unreadable = passed_over(found.passed), [f"{path}: {reason}" for path, reason in found.problems]
    if not paths:
        raise DataError(f"--pool {pool}: contains no image; images are {FORMATS} files", [*remarks, *unreadable])
    return paths, unreadable, remarks


def _annotated(options: Next, settings: DataConfig | None) -> tuple[Dataset | None, str]:
    """The dataset annotated so far, and a line that names it, or says that it is unknown.

    `settings` are those of the data that the run was trained on, if the weights are of a run.
    """
    if options.annotated is None and (settings is None or not Path(settings.root).is_dir()):
        where = f"{options.weights} does not name them" if settings is None else f"{settings.root} is not there"
        return None, f"training images: unknown ({where}); give --annotated FOLDER to choose images unlike them"
    settings = settings or DataConfig()
    dataset = open_dataset(settings if options.annotated is None else replace(settings, root=str(options.annotated)))
    images = f"{len(dataset.of('train'))} of {len(dataset.samples)} annotated images"
    return dataset, f"training images: {images} in {dataset.root}"


def _view(viewer: "Viewer", paths: Sequence[Path], annotated: set[str], progress: "tqdm[NoReturn]") -> _Pool:
    """Look at the images whose pixels are not `annotated`, a set of digests."""
    pool = _Pool()
    for path in paths:
        try:
            data = read_bytes(path, str(path))
            if digest_of(decode_image(data, str(path))[0]) in annotated:
                pool.annotated += 1
            else:
                pixels, _ = decode_image(data, str(path), viewer.channels)
                pool.views[path] = viewer.look(pixels, read_spacing(path), name=str(path))
        except DataError as error:
            pool.failed += error.problems
        except UserError as error:
            pool.failed.append(f"{path}: {error}")
        progress.update()
    return pool


def _training_features(viewer: "Viewer", dataset: Dataset, progress: "tqdm[NoReturn]") -> Iterator[np.ndarray]:
    """The features of each training image."""
    for sample in dataset.of("train"):
        pixels, _ = decode_image(read_bytes(sample.image, sample.id), sample.id, viewer.channels)
        yield viewer.look(pixels, dataset.spacing_of(sample), name=sample.id).features
        progress.update()


def _report(options: Next, pool: _Pool, chosen: Sequence[Path]) -> None:
    """Print the chosen images, and write their paths to `options.output`."""
    print("confidence  image")
    for path in chosen:
        print(cli.printable(f"{pool.views[path].confidence:10.3f}  {path}"))
    if len(chosen) < options.count:
        print(f"the pool has no more than these {len(chosen)}")
    if empty := [str(path) for path, view in pool.views.items() if view.empty and path not in chosen]:
        print(cli.printable(f"nothing was found in {len(empty)} images; look at them too: {some(empty)}"))
    if options.output is not None:
        with writing(options.output):
            atomic_write(options.output, "".join(f"{path}\n" for path in chosen))
        print(f"written to {options.output}")


def _distances(points: np.ndarray, point: np.ndarray) -> np.ndarray:
    return np.sqrt(((points - point) ** 2).sum(axis=-1))
