"""Training images drawn anew from bone surfaces: image k of a run depends on its seed and k alone."""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.cache import Resized
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.fit import Fit
from pdrunet_jax.data.images import decode_image
from pdrunet_jax.data.phantoms.surfaces.bodies import Body, read_bodies, surface_files
from pdrunet_jax.data.phantoms.surfaces.drawing import CLASSES, Drawing, draw_xray
from pdrunet_jax.data.phantoms.surfaces.files import DRAWN, label_image, training_size
from pdrunet_jax.data.walk import some
from pdrunet_jax.runtime.errors import DataError, UserError

_OF_TRAINING = 1 << 64
"""Added to a run's seed: the images that `write_xrays` draws have seeds below it, so that none is drawn twice."""


@dataclass(frozen=True)
class DrawnAnew:
    """An endless supply of training images."""

    bodies: tuple[Body, ...]
    fit: Fit
    names: tuple[str, ...]
    """Classes of the dataset: bones, or one class for all of them."""
    overlap: bool
    """Whether masks have a layer for each class."""
    digest: str
    """SHA-256 of the surfaces' files."""

    def image(self, number: int, seed: int, channels: int) -> Resized:
        """Image `number` of a run with `seed`, as from `Dataset`: (H, W, C) and (H, W) or (H, W, K), uint8."""
        size = training_size(max(self.fit.size))
        drawn = draw_xray(self.bodies, number, seed=seed % _OF_TRAINING + _OF_TRAINING, size=size)
        return self.fit.image(_as_read(drawn, channels)), self.fit.mask(self._mask(drawn))

    def images(self, numbers: Sequence[int], seed: int, channels: int) -> list[Resized]:
        """Several images, as `image` draws them."""
        return [self.image(number, seed, channels) for number in numbers]

    def _mask(self, drawn: Drawing) -> np.ndarray:
        shape = drawn.image.shape
        if not set(self.names) <= set(CLASSES):
            return np.logical_or.reduce([np.zeros(shape, np.bool_), *drawn.masks.values()]).astype(np.uint8)
        if not self.overlap:
            kept = {name: mask for name, mask in drawn.masks.items() if name in self.names}
            return label_image(kept, self.names, shape)
        none = np.zeros(shape, np.bool_)
        return np.stack([drawn.masks.get(name, none) for name in self.names], axis=-1).astype(np.uint8)


def draws_anew(dataset: Dataset, config: DataConfig) -> Dataset:
    """The dataset with training images drawn from `config.surfaces`, from bodies that are not in its other splits.

    The table that `data phantom` writes tells which bodies validation and test images show. Raises `UserError` if the
    surfaces cannot be read, or the classes of `dataset` are not bones that are drawn.
    """
    assert config.surfaces is not None
    folder = Path(config.surfaces)
    if config.fold:
        raise UserError("training images that are drawn from data.surfaces have no folds; leave one of both out")
    bones = [name for name in dataset.class_names if name in CLASSES]
    if bones != list(dataset.class_names) and len(dataset.class_names) > 1:
        raise UserError(
            f"{dataset.root} has the classes {', '.join(dataset.class_names)}, and what is drawn from data.surfaces "
            f"has {', '.join(CLASSES)}, or one class for all bones: choose data.classes among them"
        )
    bodies = read_bodies(folder)
    kept = tuple(sample for sample in dataset.samples if sample.split != "train")
    held = _bodies_of(dataset.root, {sample.id for sample in kept})
    free = [body for body in bodies if body.name not in held]
    notes = [f"training images are drawn from {len(free or bodies)} bodies in {folder}, anew for every step"]
    if ignored := len(dataset.samples) - len(kept):
        notes.append(f"the {ignored} training images in {dataset.root} are not used")
    if free and len(free) < len(bodies):
        names = [body.name for body in bodies if body.name in held]
        notes.append(f"{len(names)} bodies are held out, because validation or test images show them: {some(names)}")
    if not free:
        notes.append("warning: validation and test images show every body that is trained on; scores favour them")
    drawn = DrawnAnew(tuple(free or bodies), Fit.of(config), dataset.class_names, dataset.multilabel, _digest(folder))
    return replace(dataset, samples=kept, notes=(*dataset.notes, *notes), drawn=drawn)


def _bodies_of(root: Path, images: set[str]) -> set[str]:
    """The bodies that `images` of a folder of drawn X-rays show; none if the folder is not of that kind."""
    path = root / DRAWN
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"image", "body"} <= rows[0].keys():
        raise DataError(str(path), [f"{path}: no columns image and body; draw the folder again"])
    return {row["body"] for row in rows if row["image"] in images}


def _as_read(drawn: Drawing, channels: int) -> np.ndarray:
    """Pixels (H, W, C) as if the drawing had been written to its file and read again."""
    content, picture = io.BytesIO(), Image.fromarray(drawn.image)
    if drawn.quality is None:
        picture.save(content, "PNG", compress_level=1)
    else:
        picture.save(content, "JPEG", quality=drawn.quality)
    return decode_image(content.getvalue(), "a drawn X-ray", channels)[0]


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in surface_files(folder):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
